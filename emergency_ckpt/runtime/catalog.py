"""The catalog: which steps there are on any tier, and what was saved with them. Local to a process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import NoRestorableStepError
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.store import PersistentStep, without_void
from emergency_ckpt.runtime.job import Job


class Catalog:
    """What one process knows of the saved steps of the run."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def persistent(self) -> list[PersistentStep]:
        """Committed steps that no restore left behind, oldest first; reads the persistent directory."""
        return without_void(self._job.persistent.steps(), self._job.local.activations)

    def numbers(self, surveyed: Iterable[StepId] = ()) -> list[int]:
        """Step numbers on any tier, ascending: persistent, known complete on the ramdisk, and `surveyed`."""
        held = {step.step_id.step for step in self.persistent()}
        held |= {step.step for step in self._job.local.complete_steps()}
        return sorted(held | {step.step for step in surveyed})

    def saved_with(self, step: int) -> Mapping[str, Any]:
        """Metrics and custom metadata saved with `step`; raises NoRestorableStepError if it is nowhere."""
        for held in reversed(self._job.local.sealed_steps(listed_only=False)):
            slot = self._job.local.sealed(held) if held.step == step else None
            if slot is not None:
                return slot.manifest.metadata
        found = self._find_persistent(step)
        if found is None:
            raise NoRestorableStepError(f"step {step} is on no tier; the steps that are: {self.numbers()}")
        side = StepReader(found.path, found.item).side
        return {"custom_metadata": side.custom_metadata, "metrics": side.metrics} if side else {}

    def delete_persistent(self, step: int) -> None:
        """Deletes `step` from the persistent tier if it is there. One process calls it."""
        found = self._find_persistent(step)
        if found is not None:
            self._job.persistent.delete_step(found)

    def _find_persistent(self, step: int) -> PersistentStep | None:
        return next((held for held in self.persistent() if held.step_id.step == step), None)
