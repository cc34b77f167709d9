"""`emergency-ckpt launch`: one JAX job on this machine, as a cluster would run it, failures included.

The work is done by `emergency_ckpt.cli.launcher`; here are its options and what the terminal shows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from emergency_ckpt.cli.launcher import events
from emergency_ckpt.cli.launcher.events import JobResult
from emergency_ckpt.cli.launcher.job import StopRequest, describe_exit, list_processes, run_job
from emergency_ckpt.cli.launcher.spec import JobSpec, KillSpec, parse_exit_codes
from emergency_ckpt.jaxio.launch import VARIABLES

__all__ = ["JobResult", "JobSpec", "KillSpec", "StopRequest", "add_arguments", "run", "run_job"]

_DESCRIPTION = """\
Starts slices x processes-per-slice processes of COMMAND on this machine as one JAX job on CPU devices, each
with a ramdisk directory of its own. When a process fails, all others are ended (SIGTERM, then SIGKILL) and all
are started again, as JobSet does. The exit code is 0 when every process ended with 0; else that of the process
that failed first, 124 after the time limit, 128 + n when signal n stopped the launcher. A signal to end the
launcher goes to the processes, and nothing is restarted after it; SIGUSR1 and SIGUSR2 are passed on to them.

In COMMAND, {ramdisk}, {process}, {slice} and {attempt} are replaced for each process."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options. What follows `--` arrives as `args.command`."""
    parser.usage = "emergency-ckpt launch --slices S --processes-per-slice P [options] -- COMMAND"
    parser.description = _DESCRIPTION
    parser.epilog = "environment of each process:\n" + "\n".join(
        f"  {name}\n      {meaning}" for name, meaning in VARIABLES.items()
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--slices", type=int, default=1, metavar="S", help="number of slices (replicas; default: 1)"
    )
    parser.add_argument(
        "--processes-per-slice", type=int, default=1, metavar="P", help="processes of each slice (default: 1)"
    )
    parser.add_argument(
        "--devices-per-process", type=int, default=1, metavar="D", help="CPU devices (default: 1)"
    )
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="restarts after a failure (default: 0)"
    )
    parser.add_argument(
        "--restart-on",
        metavar="CODES",
        help="restart only after these exit codes of the process that failed first, as in 42,143,SIGKILL "
        "(default: after all but 0)",
    )
    parser.add_argument(
        "--restart-delay",
        type=float,
        default=0,
        metavar="SECONDS",
        help="pause before the first restart (default: 0)",
    )
    parser.add_argument(
        "--backoff",
        type=float,
        default=1,
        metavar="FACTOR",
        help="each further pause is this many times as long; it begins anew after an attempt that lived longer "
        "than the longest pause (default: 1)",
    )
    parser.add_argument(
        "--max-restart-delay",
        type=float,
        default=300,
        metavar="SECONDS",
        help="longest pause (default: 300)",
    )
    parser.add_argument(
        "--machine-devices",
        action="store_true",
        help="let jax find the devices of this machine, in place of CPU devices",
    )
    parser.add_argument(
        "--kill",
        action="append",
        default=[],
        metavar="slice=1@step=30",
        help="SIGKILL all processes of the slice (or of process=0,3@...) at the moment when each of them has "
        "reported that step; repeatable; each happens once, in a later attempt if need be",
    )
    parser.add_argument(
        "--wipe-ramdisk", action="store_true", help="killed processes lose their ramdisk directories as well"
    )
    parser.add_argument(
        "--ramdisk-root",
        type=Path,
        metavar="DIR",
        help="holds process_<k>/ of each process, kept afterwards (default: a fresh directory in memory, "
        "removed afterwards)",
    )
    parser.add_argument(
        "--log-dir",
        type=Path,
        metavar="DIR",
        help="holds process_<k>.attempt_<n>.log (default: a fresh temporary directory)",
    )
    parser.add_argument(
        "--grace", type=float, default=5, metavar="SECONDS", help="between SIGTERM and SIGKILL (default: 5)"
    )
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="for the whole job (default: none)")
    parser.add_argument("--quiet", action="store_true", help="do not show the output of the processes")


def run(args: argparse.Namespace) -> int:
    """Runs the job that the options describe; returns its exit code. Raises ConfigError for bad options."""
    spec = JobSpec(
        command=tuple(args.command),
        slices=args.slices,
        processes_per_slice=args.processes_per_slice,
        devices_per_process=args.devices_per_process,
        restarts=args.restarts,
        kills=tuple(map(KillSpec.parse, args.kill)),
        wipe_ramdisk=args.wipe_ramdisk,
        ramdisk_root=args.ramdisk_root,
        log_dir=args.log_dir,
        restart_on=None if args.restart_on is None else parse_exit_codes(args.restart_on),
        restart_delay_seconds=args.restart_delay,
        backoff=args.backoff,
        max_restart_delay_seconds=args.max_restart_delay,
        machine_devices=args.machine_devices,
        grace_seconds=args.grace,
        time_limit_seconds=args.time_limit,
    )
    result = run_job(spec, _show_event, None if args.quiet else _show_output)
    _show_result(result)
    return result.exit_code


def _show_output(process: int, line: str) -> None:
    print(f"[process {process}] {line}", flush=True)


def _show_event(event: events.JobEvent) -> None:
    text = _describe(event)
    if text:
        _say(f"{event.seconds:7.2f} s  {text}")


def _describe(event: events.JobEvent) -> str:
    """The event in words; empty for those that would only repeat what is shown anyway."""
    match event:
        case events.ProcessStarted():
            return (
                f"attempt {event.attempt}: process {event.process} (slice {event.slice}) started, "
                f"pid {event.pid}, log {event.log}"
            )
        case events.Killed():
            return f"killed {list_processes(event.processes)} as asked for: {event.kill}"
        case events.ProcessEnded():
            step = "no step reported" if event.step is None else f"last step {event.step}"
            return (
                f"process {event.process} (slice {event.slice}) ended: {describe_exit(event.exit_code)}, {step}"
            )
        case events.Stopping():
            return f"{event.reason}; ending the others"
        case events.RamdiskWiped():
            return f"wiped the ramdisk of {list_processes(event.processes)}"
        case events.Restarting():
            delay = f" after {event.delay_seconds:g} s" if event.delay_seconds else ""
            left = f"attempt {event.attempt}, {event.restarts_left} restarts left"
            return f"restarting all processes{delay}, because {event.reason} ({left})"
        case events.NotRestarting():
            how = describe_exit(event.exit_code)
            return f"not restarting: {how} is not among those of --restart-on"
        case _:
            return ""


def _show_result(result: JobResult) -> None:
    failed = [attempt for attempt in result.attempts if attempt.failure]
    if failed:
        _say("failures:")
        for attempt in failed:
            lived = attempt.ended_seconds - attempt.began_seconds
            _say(f"  attempt {attempt.attempt} after {lived:.1f} s: {attempt.failure}")
    for kill in result.kills_left:
        _say(f"--kill {kill} never came to pass: not all of these processes reported step {kill.step}")
    how = "ended well" if result.exit_code == 0 else f"failed: {describe_exit(result.exit_code)}"
    count = len(result.attempts)
    lived = f"after {count} attempt{'s' * (count > 1)} and {result.seconds:.1f} s"
    _say(f"the job {how} {lived}; logs: {result.log_dir}")


def _say(text: str) -> None:
    print(f"[launch] {text}", file=sys.stderr, flush=True)
