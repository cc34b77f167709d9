"""Runs the two processes of a benchmark and collects what they measured.

Whatever ends the run, no process and no file on the ramdisk is left behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.facts import REPOSITORY
from benchmarks.plan import PROCESSES, Plan
from benchmarks.samples import Samples, slowest
from benchmarks.sections import PROGRESS
from benchmarks.worker import result_path
from emergency_ckpt.cli.launcher.job import run_job
from emergency_ckpt.cli.launcher.spec import JobSpec

_TAIL_LINES = 40
# The steady state is that of memory which was touched before, for every contender alike: what one step frees is
# there for the next one, instead of going back to the kernel and coming again page by page (glibc's mallopt).
KEEPS_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


class BenchmarkFailedError(Exception):
    """The job did not come to its end; the message has its last words."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a job measured: the job's samples (the slowest process of each round) and those of each process."""

    state_bytes: int
    job: Samples
    processes: tuple[Samples, ...]
    seconds: float


def measure(plan: Plan, say: Callable[[str], None]) -> Result:
    """Runs the plan below `plan.directory`; `say` gets lines on how far it is. Raises BenchmarkFailedError."""
    directory = Path(plan.directory)
    spec = JobSpec(
        command=(sys.executable, "-m", "benchmarks.worker", plan.to_json()),
        slices=PROCESSES,
        processes_per_slice=1,
        ramdisk_root=directory / "ramdisks",
        log_dir=directory / "logs",
        time_limit_seconds=600 + 2 * plan.size_mib * plan.repeats / 10 + plan.memory_saves / 20,
        environment={
            **KEEPS_FREED_MEMORY,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        },
    )

    def show(process: int, line: str) -> None:
        if line.startswith(PROGRESS):
            say(line.removeprefix(PROGRESS))

    done = run_job(spec, on_output=show)
    if done.exit_code != 0:
        raise BenchmarkFailedError(f"{done.attempts[-1].failure}\n{_last_words(directory / 'logs')}")
    found = [json.loads(result_path(plan, process).read_text()) for process in range(PROCESSES)]
    processes = tuple(Samples(each["values"]) for each in found)
    return Result(found[0]["state_bytes"], slowest(processes), processes, done.seconds)


def _last_words(logs: Path) -> str:
    parts = []
    for path in sorted(logs.iterdir()):
        lines = path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        parts.append("\n".join([f"--- {path.name}", *lines]))
    return "\n".join(parts)
