"""Runs the two processes of a benchmark and collects what they measured.

Whatever ends the run, no process and no file on the ramdisk is left behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.facts import REPOSITORY
from benchmarks.plan import JOB_SECTIONS, PROCESSES, Plan
from benchmarks.samples import Samples, joined, slowest
from benchmarks.sections import PROGRESS
from benchmarks.worker import result_path
from emergency_ckpt.cli.launcher.job import run_job
from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from emergency_ckpt.cli.launcher.spec import JobSpec

_TAIL_LINES = 40
# The steady state is that of memory which was touched before. In a train loop, where each step frees what the
# next one takes, that needs glibc's help, for every contender alike: otherwise all of it goes back to the
# kernel and comes again page by page, at every step. It costs memory, so the loop is a job of its own.
_LOOP = "loop"
_KEEPS_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


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
    others = tuple(section for section in plan.sections if section in JOB_SECTIONS and section != _LOOP)
    results: list[Result] = []
    for sections, environment in ((others, {}), ((_LOOP,), _KEEPS_FREED_MEMORY)):
        if not set(sections) & set(plan.sections):
            continue
        directory = Path(plan.directory) / "-".join(sections)
        part = dataclasses.replace(plan, sections=sections, directory=str(directory))
        directory.mkdir()
        results.append(_run(part, environment, say))
        remove_tree(directory)  # The next job needs the memory.
    if not results:
        return Result(0, Samples(), (), 0.0)
    processes = tuple(joined(each) for each in zip(*(result.processes for result in results), strict=True))
    seconds = sum(result.seconds for result in results)
    return Result(results[0].state_bytes, slowest(processes), processes, seconds)


def _run(plan: Plan, environment: Mapping[str, str], say: Callable[[str], None]) -> Result:
    """One job."""
    directory = Path(plan.directory)
    spec = JobSpec(
        command=(sys.executable, "-m", "benchmarks.worker", plan.to_json()),
        slices=PROCESSES,
        processes_per_slice=1,
        ramdisk_root=directory / "ramdisks",
        log_dir=directory / "logs",
        time_limit_seconds=600 + 2 * plan.size_mib * plan.repeats / 10 + plan.memory_saves / 20,
        environment={
            **environment,
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
