"""From what the processes of both runs wrote down to what the demo shows: a pure function of recorded facts.

Every number is computed from the journals of the actual runs and from what was seen at the failure.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from emergency_ckpt.demo.agreement import Check, compare_runs
from emergency_ckpt.demo.journal import Life, Restored
from emergency_ckpt.errors import EmergencyCheckpointError


class DemoError(EmergencyCheckpointError):
    """A run of the demo did not come to its end, or not in the way that was asked for."""


@dataclasses.dataclass(frozen=True)
class JobShape:
    """What both runs train, and how often they save. Periods are in steps."""

    steps: int
    slices: int
    processes_per_slice: int
    local_period: int
    persistent_period: int

    @property
    def process_count(self) -> int:
        return self.slices * self.processes_per_slice


@dataclasses.dataclass(frozen=True)
class Failure:
    """The failure that was injected.

    Attributes:
      attempt: the life of the job that it ended.
      slice_index: the slice that was killed and lost its ramdisks.
      processes: its processes.
      restarted: when all processes had been started again, in seconds since the epoch.
      persistent_step: the newest step in the persistent tier once all processes had ended, None for none:
        where a job without a local tier would have had to start from.
    """

    attempt: int
    slice_index: int
    processes: tuple[int, ...]
    restarted: float
    persistent_step: int | None


@dataclasses.dataclass(frozen=True)
class TimeLost:
    """From the last step before the failure until the job had done that step again, in seconds.

    Attributes:
      down: until all processes were started again.
      starting: until they could restore: imports, joining the job, compiling.
      restoring: the restore itself, of the slowest process.
      retraining: the lost steps, once more.
    """

    down: float
    starting: float
    restoring: float
    retraining: float

    @property
    def total(self) -> float:
        return self.down + self.starting + self.restoring + self.retraining


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the demo found out.

    Attributes:
      step_reached: the newest step that any process had done when the failure came.
      step_restored: where the job went on from; None: from scratch.
      reason: why from there, in the manager's words.
      sources: where each process got its shards from.
      restored_bytes: over all processes.
      steps_lost: done before the failure and done again.
      steps_lost_persistent_only: the same, had there been persistent checkpoints only.
      step_seconds: median time of a step of the uninterrupted run.
      restarts: how often the job was started again.
      first_loss, final_loss: of the interrupted run, in nats per byte.
      checks: in what the two runs had to agree.
    """

    job: JobShape
    failure: Failure
    step_reached: int
    step_restored: int | None
    reason: str
    sources: tuple[str, ...]
    restored_bytes: int
    steps_lost: int
    steps_lost_persistent_only: int
    time_lost: TimeLost
    step_seconds: float
    restarts: int
    first_loss: float
    final_loss: float
    checks: tuple[Check, ...]

    @property
    def agrees(self) -> bool:
        """Whether the interrupted run came to the same end as the uninterrupted one, bit for bit."""
        return all(check.agrees for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data, the derived values included."""
        return {
            "agrees": self.agrees,
            **dataclasses.asdict(self),
            "time_lost": {**dataclasses.asdict(self.time_lost), "total": self.time_lost.total},
            "checks": [check.to_json() for check in self.checks],
        }


def summarize(
    job: JobShape, reference: Sequence[Life], interrupted: Sequence[Life], failure: Failure
) -> Summary:
    """What became of the interrupted run, compared with the uninterrupted one.

    Raises DemoError when the journals do not tell of two runs that came to their last step, and of a start
    from one and the same step after the failure.
    """
    before = _attempt(interrupted, failure.attempt)
    after = _attempt(interrupted, failure.attempt + 1)
    attempts = max((life.started.attempt for life in interrupted), default=0)
    _check_ended("uninterrupted", _attempt(reference, 0), job)
    _check_ended("interrupted", _attempt(interrupted, attempts), job)
    restores = _restores(after, job)
    reached = max((fact.step for life in before for fact in life.trained), default=None)
    if reached is None:
        raise DemoError("The job had not done a step when the failure came; let it come at a later step.")
    restored = restores[0].step
    return Summary(
        job=job,
        failure=failure,
        step_reached=reached,
        step_restored=restored,
        reason=restores[0].reason,
        sources=tuple(restore.source for restore in restores),
        restored_bytes=sum(restore.bytes for restore in restores),
        steps_lost=reached - (restored or 0),
        steps_lost_persistent_only=reached - (failure.persistent_step or 0),
        time_lost=_time_lost(before, after, restores, reached, failure.restarted),
        step_seconds=_median_step_seconds(reference),
        restarts=attempts,
        first_loss=before[0].trained[0].loss,
        final_loss=_attempt(interrupted, attempts)[0].trained[-1].loss,
        checks=compare_runs(reference, interrupted, job.steps),
    )


def _attempt(lives: Sequence[Life], attempt: int) -> list[Life]:
    """The processes of one life of the job, in the order of their indices."""
    chosen = [life for life in lives if life.started.attempt == attempt]
    return sorted(chosen, key=lambda life: life.started.process)


def _check_ended(name: str, lives: Sequence[Life], job: JobShape) -> None:
    ended = [life.started.process for life in lives if life.finished and life.finished.step == job.steps]
    missing = sorted(set(range(job.process_count)) - set(ended))
    if missing or len(ended) != job.process_count:
        raise DemoError(
            f"Not every process of the {name} run came to step {job.steps}: expected {job.process_count} ends, "
            f"found those of processes {ended}. Look at the logs of the others."
        )


def _restores(lives: Sequence[Life], job: JobShape) -> list[Restored]:
    restores = [life.restored for life in lives if life.restored is not None]
    steps = {restore.step for restore in restores}
    if len(restores) != job.process_count or len(steps) != 1:
        raise DemoError(
            f"After the failure all {job.process_count} processes had to start from one step; "
            f"{len(restores)} did, from {sorted(map(str, steps))}. Look at their logs."
        )
    return restores


def _time_lost(
    before: Sequence[Life], after: Sequence[Life], restores: Sequence[Restored], reached: int, restarted: float
) -> TimeLost:
    at_work = max(fact.time for life in before for fact in life.trained if fact.step == reached)
    restored = max(restore.time for restore in restores)
    restoring = max(restore.seconds for restore in restores)
    back = [fact.time for life in after for fact in life.trained if fact.step == reached]
    return TimeLost(
        down=restarted - at_work,
        starting=restored - restoring - restarted,
        restoring=restoring,
        # Where the very step that was reached is restored, nothing is trained again.
        retraining=max(back) - restored if back else 0.0,
    )


def _median_step_seconds(lives: Sequence[Life]) -> float:
    times = [fact.time for fact in lives[0].trained]
    return statistics.median([b - a for a, b in itertools.pairwise(times)] or [0.0])
