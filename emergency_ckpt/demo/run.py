"""The failure demo: one run in peace, one that loses a slice, and the comparison of the two.

Both runs are real jobs of real processes, started by the launcher; the second one is the first with a failure.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from emergency_ckpt.cli.launcher import events
from emergency_ckpt.cli.launcher.job import run_job
from emergency_ckpt.cli.launcher.spec import JobSpec, KillSpec
from emergency_ckpt.config import Config, load_config
from emergency_ckpt.demo.display import RunDisplay, run_display, show_summary
from emergency_ckpt.demo.journal import Life, read_lives
from emergency_ckpt.demo.options import CONFIG_FILE
from emergency_ckpt.demo.summary import DemoError, Failure, JobShape, Summary, summarize
from emergency_ckpt.errors import ConfigError
from emergency_ckpt.persistent.store import PersistentStore

RUN_LIMIT_SECONDS = 900

INTERRUPTED = 128 + signal.SIGINT

ENVIRONMENT = {
    # The demo compiles longer than it computes; the next level takes a third longer and makes no step faster.
    "XLA_FLAGS": "--xla_backend_optimization_level=1",
}


@dataclasses.dataclass(frozen=True)
class DemoPlan:
    """What to show. The last slice is killed once all its processes have done `kill_step`."""

    steps: int
    slices: int
    processes_per_slice: int
    kill_step: int

    def __post_init__(self) -> None:
        for flag in ("steps", "slices", "processes_per_slice"):
            if getattr(self, flag) < 1:
                raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(self, flag)}; it must be at least 1")
        if not 1 <= self.kill_step < self.steps:
            raise ConfigError(
                f"--kill-step is {self.kill_step}; expected 1 to {self.steps - 1}, so that steps are left to "
                f"train after the failure (--steps is {self.steps})"
            )

    @property
    def killed_slice(self) -> int:
        return self.slices - 1


def run_demo(plan: DemoPlan, directory: Path, console: Console) -> Summary:
    """Runs both jobs below `directory`, shows them live, and shows the summary at the end.

    Raises DemoError when a job fails in a way that was not asked for; what it wrote lies in the directory.
    """
    kill = KillSpec("slice", (plan.killed_slice,), plan.kill_step)
    reference = _Run(plan, directory, "uninterrupted", kills=())
    interrupted = _Run(plan, directory, "interrupted", kills=(kill,))
    reference.go(console)
    interrupted.go(console)
    config = interrupted.config
    job = JobShape(
        steps=plan.steps,
        slices=plan.slices,
        processes_per_slice=plan.processes_per_slice,
        local_period=config.local_checkpoint_period,
        persistent_period=config.checkpoint_period,
    )
    summary = summarize(job, reference.lives(), interrupted.lives(), interrupted.failure())
    show_summary(console, summary)
    return summary


class _Run:
    """One of the two jobs."""

    def __init__(self, plan: DemoPlan, directory: Path, name: str, kills: tuple[KillSpec, ...]) -> None:
        root = directory / name
        self._logs = root / "logs"
        self._plan, self._name, self._kills = plan, name, kills
        self._journals = root / "journals"
        self._killed: events.Killed | None = None
        self._persistent_step: int | None = None
        self._restarted: float | None = None
        self._back = False
        self._words = [
            str(CONFIG_FILE),
            f"base_output_directory={root}",
            "local_checkpoint_directory={ramdisk}",
            f"demo_journal_directory={self._journals}",
            f"demo_steps={plan.steps}",
        ]
        self.config: Config = load_config(self._words)
        self._persistent = PersistentStore(self.config.checkpoint_directory)

    def lives(self) -> Sequence[Life]:
        """What the processes wrote down so far."""
        return read_lives(self._journals)

    def failure(self) -> Failure:
        """The failure that was injected."""
        if self._killed is None or self._restarted is None:
            raise DemoError(
                f"The failure at step {self._plan.kill_step} did not come to pass; logs: {self._logs}"
            )
        return Failure(
            attempt=self._killed.attempt,
            slice_index=self._plan.killed_slice,
            processes=self._killed.processes,
            restarted=self._restarted,
            persistent_step=self._persistent_step,
        )

    def go(self, console: Console) -> None:
        """Runs the job to its end."""
        spec = JobSpec(
            command=(sys.executable, "-m", "emergency_ckpt.demo.train", *self._words),
            slices=self._plan.slices,
            processes_per_slice=self._plan.processes_per_slice,
            restarts=len(self._kills),
            kills=self._kills,
            wipe_ramdisk=bool(self._kills),
            log_dir=self._logs,
            # Survivors of a lost slice wait in a collective that cannot end, so there is nothing to wait for.
            grace_seconds=0.5,
            time_limit_seconds=RUN_LIMIT_SECONDS,
            environment=ENVIRONMENT,
        )
        with run_display(console, self._name, self._plan.steps) as display:
            result = run_job(spec, lambda event: self._note(event, display))
        if result.exit_code == INTERRUPTED:
            raise KeyboardInterrupt
        if result.exit_code != 0:
            failures = "; ".join(attempt.failure for attempt in result.attempts if attempt.failure)
            raise DemoError(f"The {self._name} run failed: {failures}. Its logs: {self._logs}")

    def _note(self, event: events.JobEvent, display: RunDisplay) -> None:
        match event:
            case events.ProcessStarted() if event.attempt:
                self._restarted = time.time()
            case events.StepReported(process=0):
                if event.attempt and not self._back:
                    self._show_restore(event, display)
                display.step(event.step, self._newest_loss())
            case events.Killed():
                self._killed = event
                display.event(
                    event.seconds, f"slice {self._plan.killed_slice} is killed (SIGKILL)", style="bold red"
                )
            case events.RamdiskWiped():
                display.event(
                    event.seconds, f"the ramdisks of processes {list(event.processes)} are wiped", "red"
                )
            case events.Restarting():
                self._note_failure(event, display)
            case _:
                pass

    def _note_failure(self, event: events.Restarting, display: RunDisplay) -> None:
        """All processes have ended: what the persistent tier holds now is what would have been left."""
        if self._killed is None:
            raise DemoError(f"The {self._name} run failed before the failure that was asked for: {self._logs}")
        steps = [step.step_id.step for step in self._persistent.steps()]
        self._persistent_step = max(steps, default=None)
        display.event(event.seconds, "all processes are being started again", style="yellow")
        display.state("restarting, compiling, restoring")

    def _show_restore(self, event: events.StepReported, display: RunDisplay) -> None:
        self._back = True
        restores = [life.restored for life in self.lives() if life.started.attempt == event.attempt]
        steps = sorted({"scratch" if fact.step is None else f"step {fact.step}" for fact in restores if fact})
        display.event(event.seconds, f"training goes on from {' and '.join(steps)}", style="bold green")

    def _newest_loss(self) -> float | None:
        trained = [life.trained[-1] for life in self.lives() if life.trained]
        return max(trained, key=lambda fact: fact.time).loss if trained else None
