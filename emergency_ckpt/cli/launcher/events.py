"""What happens in a job, as it happens (events), and what became of it (results).

Times are seconds since the job began. Exit codes are those of a shell: 128 + n for signal n.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from emergency_ckpt.cli.launcher.spec import KillSpec

Cause = Literal["own", "injected", "ended"]
"""Why a process ended: by itself, killed as asked for, or ended by the launcher because the job was over."""

EXIT_TIME_LIMIT = 124


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobEvent:
    """Base of all events."""

    seconds: float
    attempt: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessStarted(JobEvent):
    process: int
    slice: int
    pid: int
    log: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReported(JobEvent):
    """The newest step that a process reported; of reports that arrive together only the last is shown."""

    process: int
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Killed(JobEvent):
    """SIGKILL was sent to these processes, as asked for."""

    kill: KillSpec
    processes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessEnded(JobEvent):
    """`step` is the last one that the process reported, None if it reported none."""

    process: int
    slice: int
    exit_code: int
    cause: Cause
    step: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stopping(JobEvent):
    """The processes that still run are being ended; `reason` says why."""

    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RamdiskWiped(JobEvent):
    processes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restarting(JobEvent):
    """All processes are started again, for this reason; `attempt` is the new attempt."""

    reason: str
    delay_seconds: float
    restarts_left: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotRestarting(JobEvent):
    """Restarts are left, and this exit code is not among those after which the job is started again."""

    exit_code: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished(JobEvent):
    exit_code: int


@dataclasses.dataclass(frozen=True)
class AttemptResult:
    """One life of all processes. `failure` says in words why it ended early; empty when all went well.

    `ended` has one entry per process that ended, in the order in which they did.
    """

    attempt: int
    began_seconds: float
    ended_seconds: float
    ended: tuple[ProcessEnded, ...]
    failure: str
    exit_code: int


@dataclasses.dataclass(frozen=True)
class JobResult:
    """What became of a job.

    Attributes:
      exit_code: 0 when every process of the last attempt exited with 0; else the code of the process that
        failed first, 124 after the time limit, 128 + n when signal n stopped the launcher.
      attempts: every life of the job, oldest first.
      kills_left: kills that were asked for and never came to pass.
      log_dir: where the output of every process of every attempt lies.
    """

    exit_code: int
    seconds: float
    attempts: tuple[AttemptResult, ...]
    kills_left: tuple[KillSpec, ...]
    log_dir: Path


def shell_exit_code(returncode: int) -> int:
    """`subprocess`'s return code (-n for signal n) as a shell shows it (128 + n)."""
    return returncode if returncode >= 0 else 128 - returncode
