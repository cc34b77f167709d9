"""The spot demo: a machine is taken away after a notice, and another one goes on from the bucket.

Both machines run the same command with the same flags; what they share is the persistent directory alone. The
times are those of the run, and its end is compared with a run that nothing happened to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from emergency_ckpt.cli.launcher import events
from emergency_ckpt.cli.launcher.job import run_job
from emergency_ckpt.cli.launcher.spec import JobSpec
from emergency_ckpt.config import load_config
from emergency_ckpt.demo.agreement import Check, compare_runs
from emergency_ckpt.demo.display import show_checks
from emergency_ckpt.demo.journal import read_lives
from emergency_ckpt.demo.metadata import SpotMetadata
from emergency_ckpt.demo.options import CONFIG_FILE
from emergency_ckpt.demo.run import ENVIRONMENT, INTERRUPTED, RUN_LIMIT_SECONDS
from emergency_ckpt.demo.summary import DemoError
from emergency_ckpt.errors import ConfigError

_ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
_LEAST_SECONDS_LEFT = 10.0
_NOTICE = "notice"
_TOLD = (_NOTICE, "decision", "durable", "gone", "back", "first step")


@dataclasses.dataclass(frozen=True)
class SpotPlan:
    """What to show. After `notice_step` the first machine is told that it ends in `seconds_left`."""

    steps: int
    processes: int
    notice_step: int
    seconds_left: float

    def __post_init__(self) -> None:
        if self.processes < 1 or not 1 <= self.notice_step < self.steps:
            raise ConfigError(
                f"a notice after step {self.notice_step} of {self.steps} to {self.processes} processes cannot "
                "be shown; at least one process, and steps before and after the notice are needed"
            )
        if self.seconds_left < _LEAST_SECONDS_LEFT:
            raise ConfigError(
                f"--seconds-left is {self.seconds_left:g}; agents ask for notices every 5 s, so that less than "
                f"{_LEAST_SECONDS_LEFT:g} s show nothing"
            )


@dataclasses.dataclass(frozen=True)
class Moment:
    """What happened, and when, in seconds after the notice was given."""

    name: str
    seconds: float
    text: str


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What the demo found out."""

    moments: tuple[Moment, ...]
    checks: tuple[Check, ...]

    @property
    def agrees(self) -> bool:
        return all(check.agrees for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "agrees": self.agrees,
            "moments": [dataclasses.asdict(moment) for moment in self.moments],
            "checks": [check.to_json() for check in self.checks],
        }


def run_spot_demo(plan: SpotPlan, directory: Path, console: Console) -> Timeline:
    """Runs a job in peace, one that has to leave its machine, and shows what happened when.

    Raises DemoError when a job fails in a way that was not asked for; what it wrote lies in the directory.
    """
    peaceful = _Job(plan, directory / "uninterrupted", console)
    peaceful.run("uninterrupted", expected=0)
    moved = _Job(plan, directory / "moved", console)
    with SpotMetadata() as metadata:
        moved.run("machine A", expected=None, metadata=metadata)
    moved.run("machine B", expected=0)
    lives = [read_lives(job.journals) for job in (peaceful, moved)]
    timeline = Timeline(tuple(moved.moments), compare_runs(lives[0], lives[1], plan.steps))
    missing = set(_TOLD) - {moment.name for moment in timeline.moments}
    if missing:
        raise DemoError(f"These did not come to pass: {', '.join(sorted(missing))}; logs are in {directory}")
    show_checks(console, timeline.checks)
    if timeline.agrees:
        console.print("[bold green]The job that moved came to the same end as the other one, bit for bit.[/]")
    return timeline


class _Job:
    """One job on one or two machines after each other."""

    def __init__(self, plan: SpotPlan, root: Path, console: Console) -> None:
        self._plan, self._root, self._console = plan, root, console
        self.journals = root / "journals"
        self.moments: list[Moment] = []
        self._notice_given: float | None = None

    def run(self, machine: str, expected: int | None, metadata: SpotMetadata | None = None) -> None:
        """Runs it on a machine with a fresh ramdisk; `expected`: its exit code, None: that of a preemption."""
        words = [
            str(CONFIG_FILE),
            f"base_output_directory={self._root / 'bucket'}",
            "local_checkpoint_directory={ramdisk}",
            f"demo_journal_directory={self.journals}",
            f"demo_steps={self._plan.steps}",
            "checkpoint_period=100000",  # In the bucket are the first step, and what the notice asks for.
            "checkpoint_log_format=json",
            "enable_autocheckpoint=True",
            f"preemption_sources={'off' if metadata is None else 'aws-spot'}",
        ]
        wanted = load_config(words).preemption_exit_code if expected is None else expected
        spec = JobSpec(
            command=(sys.executable, "-m", "emergency_ckpt.demo.train", *words),
            slices=1,
            processes_per_slice=self._plan.processes,
            log_dir=self._root / "logs" / machine.replace(" ", "-"),
            # The others leave at the same step: the first to end must not have them killed.
            grace_seconds=self._plan.seconds_left,
            time_limit_seconds=RUN_LIMIT_SECONDS,
            environment={**ENVIRONMENT, **({_ENDPOINT: metadata.url} if metadata is not None else {})},
        )
        self._say(f"{machine}: starting, compiling")
        result = run_job(
            spec,
            lambda event: self._note(machine, event, metadata),
            lambda process, line: self._hear(machine, process, line),
        )
        if result.exit_code == INTERRUPTED:
            raise KeyboardInterrupt
        if result.exit_code != wanted:
            failures = "; ".join(attempt.failure for attempt in result.attempts if attempt.failure)
            raise DemoError(
                f"{machine} ended with exit code {result.exit_code} in place of {wanted}: "
                f"{failures or 'too early'}. Its logs: {spec.log_dir}"
            )
        if metadata is not None:
            self._add("gone", f"{machine} has ended with exit code {wanted}, and its memory is lost")

    def _note(self, machine: str, event: events.JobEvent, metadata: SpotMetadata | None) -> None:
        match event:
            case events.StepReported(process=0):
                if event.step % 25 == 0:
                    self._say(f"{machine}: step {event.step} of {self._plan.steps}")
                if metadata is not None and self._notice_given is None and event.step >= self._plan.notice_step:
                    self._notice_given = time.monotonic()
                    metadata.announce(self._plan.seconds_left)
                    self._add(
                        "announced", f"{machine} is going to be terminated in {self._plan.seconds_left:g} s"
                    )
                elif self._notice_given is not None and metadata is None and not self._has("first step"):
                    self._add("first step", f"{machine} has done step {event.step}")
            case _:
                pass

    def _hear(self, machine: str, process: int, line: str) -> None:
        """A line of a process; those of the manager are JSON. Any process may hear of the notice first."""
        if self._notice_given is None or not line.startswith("{"):
            return
        with contextlib.suppress(ValueError, KeyError):
            said = json.loads(line)
            for name in _kinds(said):
                if not self._has(name) and (process == 0 or name == _NOTICE):
                    self._add(name, f"{machine}: {said['message']}")

    def _has(self, name: str) -> bool:
        return any(moment.name == name for moment in self.moments)

    def _add(self, name: str, text: str) -> None:
        assert self._notice_given is not None
        moment = Moment(name, time.monotonic() - self._notice_given, text)
        self.moments.append(moment)
        self._console.print(
            f"[bold yellow]{moment.seconds:7.1f} s  {name:<10}[/]  {escape(text)}",
            highlight=False,
            soft_wrap=True,
        )

    def _say(self, text: str) -> None:
        self._console.print(escape(text), highlight=False)


def _kinds(said: dict[str, Any]) -> Iterator[str]:
    """What a line of the manager says about the preemption, as a name of a moment."""
    match said:
        case {"operation": "preemption", "source": _}:
            yield _NOTICE
        case {"operation": "preemption", "leaves": True}:
            yield "decision"
        case {"operation": "preemption", "in_time": True}:
            yield "durable"
        case {"operation": "restore", "saved_generation": _, "plan": _}:
            yield "back"
        case _:
            pass
