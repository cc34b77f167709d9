"""Journals of a made-up job whose every number is known, with a failure at any step."""

from __future__ import annotations

import dataclasses
from typing import Any

from emergency_ckpt.demo.journal import Finished, Life, Restored, Started, Trained
from emergency_ckpt.demo.summary import Failure, JobShape

STEP_SECONDS = 0.5
START_SECONDS = 8.0
RESTORE_SECONDS = 0.25
DOWN_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Story:
    """A job that reached a step, lost its last slice, and went on from step `restored` (None: from scratch)."""

    job: JobShape
    reached: int
    restored: int | None
    persistent: int | None

    @property
    def failure(self) -> Failure:
        per_slice, lost = self.job.processes_per_slice, self.job.slices - 1
        processes = tuple(range(lost * per_slice, self.job.process_count))
        return Failure(0, lost, processes, self._restarted, self.persistent)

    @property
    def _restarted(self) -> float:
        return START_SECONDS + self.reached * STEP_SECONDS + DOWN_SECONDS

    def reference(self) -> tuple[Life, ...]:
        return tuple(self._life(p, 0, 0.0, None, 1, self.job.steps) for p in range(self.job.process_count))

    def interrupted(self) -> tuple[Life, ...]:
        first = (self.restored or 0) + 1
        processes = range(self.job.process_count)
        return (
            *(self._life(p, 0, 0.0, None, 1, self.reached) for p in processes),
            *(self._life(p, 1, self._restarted, self.restored, first, self.job.steps) for p in processes),
        )

    def _life(
        self, process: int, attempt: int, begun: float, restored: int | None, first: int, last: int
    ) -> Life:
        ready = begun + START_SECONDS
        restore = Restored(ready, restored, f"why {restored}", f"source {process}", RESTORE_SECONDS, 100)
        trained = tuple(
            Trained(ready + (step - first + 1) * STEP_SECONDS, step, loss_at(step))
            for step in range(first, last + 1)
        )
        end = None
        if last == self.job.steps:
            end = Finished(ready + 100, last, shards_of(process, self.job, last), {"next_index": last})
        return Life(Started(begun, process, attempt), restore, trained, end)


def loss_at(step: int) -> float:
    return 6.0 / (1.0 + step / 7)


def shards_of(process: int, job: JobShape, step: int) -> dict[str, str]:
    """Sharded within a slice, equal in all slices."""
    place = process % job.processes_per_slice
    return {f"w[{place}:{place + 1}]": f"w{place} at {step}", "step[]": f"step {step}"}


def changed_end(lives: tuple[Life, ...], process: int, **changes: Any) -> tuple[Life, ...]:
    """The same journals, but that the end of one process says something else."""
    return tuple(
        dataclasses.replace(life, finished=dataclasses.replace(life.finished, **changes))
        if life.finished and life.started.process == process
        else life
        for life in lives
    )
