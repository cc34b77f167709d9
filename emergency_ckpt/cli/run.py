"""`emergency-ckpt run`: a command, and after its end a hold until the agents have drained what it left.

For places where the container ends with its first process. Signals are passed on, and the exit code is the
command's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from emergency_ckpt.errors import ConfigError, EmergencyCheckpointError

DIRECTORY_VARIABLES = ("M_LOCAL_CHECKPOINT_DIRECTORY", "EMERGENCY_CKPT_LAUNCH_RAMDISK")
_FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

_DESCRIPTION = """\
Runs COMMAND as the first process of a container. When it ends, by itself or killed, the agent that its manager
started on this host may still be draining a step into the persistent tier, and would end with the container: so
this command ends only when the agent has nothing left to do, or when the grace period is over, counted from the
first of the end of COMMAND and a signal to end it. A signal that comes while it holds on, after an earlier one,
ends it at once. An agent that was killed together with COMMAND is started anew where it left work.

The exit code is that of COMMAND, 128 + n when signal n killed it, 127 when it is not there, 126 when it cannot
be run. SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed on to it, unless they are ignored.
Orphans are reaped."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options. What follows `--` arrives as `args.command`."""
    parser.usage = "emergency-ckpt run [options] -- COMMAND"
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--local-directory",
        type=Path,
        action="append",
        metavar="DIR",
        help="the ramdisk directory (local_checkpoint_directory of the job); repeatable; default: the variable "
        + " or ".join(DIRECTORY_VARIABLES),
    )
    parser.add_argument(
        "--grace-seconds",
        type=float,
        default=300.0,
        metavar="N",
        help="hold on for at most N seconds; below the grace period of the pod (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code. Raises ConfigError for options that make no sense."""
    if not args.command:
        raise ConfigError("there is no command to run; give it after --, as in: -- python train.py")
    if not 0 <= args.grace_seconds < float("inf"):
        raise ConfigError(f"--grace-seconds {args.grace_seconds} is no length of time")
    return _Container(args.command, _directories(args.local_directory), args.grace_seconds).run()


def _directories(given: Sequence[Path] | None) -> tuple[Path, ...]:
    found = given or [Path(os.environ[name]) for name in DIRECTORY_VARIABLES if os.environ.get(name)][:1]
    if not found:
        raise ConfigError(
            "the ramdisk directory of the command is not known: give --local-directory, or set the variable "
            + " or ".join(DIRECTORY_VARIABLES)
        )
    return tuple(found)


class _Container:
    """One command, from its start to the end of what it left."""

    def __init__(self, command: Sequence[str], directories: Sequence[Path], grace_seconds: float) -> None:
        self._command = command
        self._directories = directories
        self._grace_seconds = grace_seconds
        self._handle: int | None = None  # of the command, as long as it runs; no other process can have it
        self._early: list[int] = []
        self._told_to_end: float | None = None
        self._ended: float | None = None
        self._hurry = False

    def run(self) -> int:
        # What is ignored (by nohup, say) stays so, here and in the command.
        heard = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            return self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _run(self) -> int:
        try:
            process = subprocess.Popen(self._command)
        except OSError as error:
            where = f" ({error.filename})" if error.filename not in (None, self._command[0]) else ""
            _say(
                f"cannot run {self._command[0]}: {error.strerror}{where}. Give program and arguments after "
                "--, each as a word of its own; a line for a shell is: -- sh -c 'LINE'"
            )
            return 127 if isinstance(error, FileNotFoundError) else 126
        self._handle = os.pidfd_open(process.pid)
        for number in self._early:
            self._send(number)
        code = _reap_until(process.pid)
        process.returncode = code  # It is waited for already.
        self._ended = time.monotonic()
        os.close(self._handle)
        self._hold()
        return code if code >= 0 else 128 - code

    def _send(self, number: int) -> None:
        if self._handle is not None and self._ended is None:
            with contextlib.suppress(OSError):  # It has just ended.
                signal.pidfd_send_signal(self._handle, number)

    def _hold(self) -> None:
        # Nothing of it is needed as long as the command runs.
        from emergency_ckpt.agent.ending import begin_again, wait_until_idle

        assert self._ended is not None
        for directory in self._directories:
            if not directory.is_dir():
                _say(f"{directory} does not exist: no agent was waited for; is it the job's ramdisk directory?")
            try:
                if begin_again(directory):
                    _say(f"the agent of {directory} ended with work left: another one is started")
            except EmergencyCheckpointError as error:
                _say(f"the agent of {directory} ended with work left: {error}")
        left = wait_until_idle(self._directories, 0)
        if left:
            _say(f"the command has ended; holding on: {left}")
            left = wait_until_idle(self._directories, float("inf"), self._is_over)
            _say(f"the grace period is over: {left}" if left else "nothing is left to do")

    def _is_over(self) -> bool:
        """Asked between two looks: a signal may come at any time."""
        assert self._ended is not None
        _reap()
        since = self._ended if self._told_to_end is None else min(self._ended, self._told_to_end)
        return self._hurry or time.monotonic() >= since + self._grace_seconds

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number in _ENDING:
            self._hurry = self._ended is not None and self._told_to_end is not None
            self._told_to_end = self._told_to_end or time.monotonic()
        if self._handle is None:
            self._early.append(number)
        elif not (number == signal.SIGINT and _from_terminal()):
            self._send(number)


def _reap_until(command: int) -> int:
    """Waits for the end of the command; returns its exit status, negative for a signal.

    As the first process of a container this one is given all orphans, and no other would ever reap them.
    """
    while True:
        ended, status = os.wait()
        if ended == command:
            return os.waitstatus_to_exitcode(status)


def _reap() -> None:
    """Reaps all orphans that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _from_terminal() -> bool:
    """Whether a Ctrl-C reaches the command by itself, as a member of the terminal's foreground group."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # Whoever read it is gone; the exit code still counts.
        print(f"[run] {text}", file=sys.stderr, flush=True)
