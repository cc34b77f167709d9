"""The command: `python -m benchmarks [--size-mib 1024] [--repeats 5] [--json FILE] [--only save,restore]`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.facts import environment_facts, memory_bytes
from benchmarks.job import BenchmarkFailedError, measure
from benchmarks.jobless import measure as measure_jobless
from benchmarks.plan import SECTIONS, Plan
from benchmarks.report import add_derived, print_report, to_json
from emergency_ckpt.cli.launcher.ramdisk import temporary_ramdisk
from emergency_ckpt.telemetry.units import format_bytes


def main(argv: Sequence[str]) -> int:
    """Measures, prints, and writes the JSON; the exit code says whether the job came to its end."""
    args = _parser().parse_args(argv)
    facts = environment_facts()
    command = " ".join(["python -m benchmarks", *argv])
    with temporary_ramdisk() as directory:
        plan = Plan(args.size_mib, args.repeats, args.only, args.loop_steps, args.memory_saves, str(directory))
        if shortage := _shortage(plan, directory):
            print(shortage, file=sys.stderr)
            return 1
        try:
            result = measure(plan, _say)
        except BenchmarkFailedError as error:
            print(f"the benchmark failed: {error}", file=sys.stderr)
            return 1
        jobless = measure_jobless(
            plan.sections, directory, plan.size_mib, plan.repeats, args.plan_processes, _say
        )
    add_derived(result.job, plan)
    jobless.add_to(result.job)
    print_report(result, jobless.tables(), plan, facts, command)
    if args.json:
        found = {**to_json(result, plan, facts, command), **jobless.to_json()}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Saves, restores and trains in a real job of two processes (two slices) on this machine, "
        "with this package's manager and with Orbax's emergency manager side by side.",
    )
    parser.add_argument("--size-mib", type=_count, default=256, help="state in each process (default: 256)")
    parser.add_argument("--repeats", type=_count, default=5, help="rounds, beside the first use (default: 5)")
    parser.add_argument("--loop-steps", type=_count, default=4, help="train steps per round (default: 4)")
    parser.add_argument(
        "--memory-saves", type=_count, default=10_000, help="saves in the section memory (default: 10000)"
    )
    parser.add_argument(
        "--plan-processes",
        type=_counts,
        default=(256, 1024, 4096),
        help="sizes of jobs in the section plan (default: 256,1024,4096)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes everything that was measured")
    parser.add_argument(
        "--only",
        type=_sections,
        default=SECTIONS,
        metavar="SECTIONS",
        help=f"some of {','.join(SECTIONS)} (default: all)",
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _sections(text: str) -> tuple[str, ...]:
    wanted = text.split(",")
    if unknown := [name for name in wanted if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"{unknown} are none of {list(SECTIONS)}")
    return tuple(name for name in SECTIONS if name in wanted)


def _shortage(plan: Plan, directory: Path) -> str:
    """Why there is too little memory for the plan; empty when there is enough."""
    available = min(memory_bytes("MemAvailable"), shutil.disk_usage(directory).free)
    if plan.needed_bytes <= available:
        return ""
    return (
        f"--size-mib {plan.size_mib} takes up to {format_bytes(plan.needed_bytes)} of memory, "
        f"{format_bytes(available)} are available; choose a smaller size"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
