"""The catalog: which steps there are on any tier, and what was saved with them. Local to a process."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.retention import SavedStep, best_step
from emergency_ckpt.errors import CorruptDataError, NoRestorableStepError
from emergency_ckpt.persistent.step_facts import StepFacts, read_step_facts
from emergency_ckpt.persistent.store import PersistentStep, without_void
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.runtime.policies import Ranking


class Catalog:
    """What one process knows of the saved steps of the run."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._infos: Mapping[PersistentStep, SavedStep] = {}

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
        facts = self._local_facts(step) or self._persistent_facts(step)
        if facts is None:
            raise self._absent(step)
        return {"custom_metadata": facts.custom_metadata, "metrics": facts.metrics}

    def facts(self, step: int) -> StepFacts:
        """All that is known of `step` on any tier; raises NoRestorableStepError if it is nowhere."""
        local, persistent = self._local_facts(step), self._persistent_facts(step)
        if local and persistent:
            return dataclasses.replace(local, committed_nanoseconds=persistent.committed_nanoseconds)
        if found := local or persistent:
            return found
        raise self._absent(step)

    def infos(self, steps: Sequence[PersistentStep]) -> list[SavedStep]:
        """Committed steps as policies see them, ascending by number. Each is read once while it is asked for.

        Raises CorruptDataError when a file that says so is damaged, PersistentStoreError.
        """
        known = self._infos
        self._infos = {step: known.get(step) or self._read_info(step) for step in steps}
        return sorted(self._infos.values(), key=lambda info: info.step)

    def best(self, steps: Iterable[int], ranking: Ranking) -> int | None:
        """The best of these steps; None where none of them has the metric."""
        values: list[tuple[int, float]] = []
        for step in steps:
            try:
                metrics = self.saved_with(step)["metrics"]
            except (CorruptDataError, NoRestorableStepError) as error:
                self._job.log.warning("metrics", step, f"not compared with the other steps: {error}")
                continue
            try:
                if metrics:
                    values.append((step, float(ranking.value(metrics))))
            except KeyError:
                continue
            except (TypeError, ValueError) as error:
                self._job.log.warning("metrics", step, f"not compared, its metric is no number: {error}")
        return best_step(values, lowest=ranking.lowest)

    def delete_persistent(self, step: int) -> None:
        """Deletes `step` from the persistent tier if it is there. One process calls it."""
        found = self._find_persistent(step)
        if found is not None:
            self._job.persistent.delete_step(found)

    def _read_info(self, held: PersistentStep) -> SavedStep:
        facts = self._read_facts(held)
        committed = facts.committed_nanoseconds
        # Early versions of Orbax kept no times; like Orbax's own manager we then take the directory's.
        time = utc_time(held.path.stat().st_mtime_ns if committed is None else committed)
        return SavedStep(held.step_id.step, time, facts.metrics or None)

    def _read_facts(self, held: PersistentStep) -> StepFacts:
        return read_step_facts(self._job.persistent.files.below(held.path.name), held.step_id.step)

    def _local_facts(self, step: int) -> StepFacts | None:
        for held in reversed(self._job.local.sealed_steps(listed_only=False)):
            slot = self._job.local.sealed(held) if held.step == step else None
            if slot is not None:
                saved = slot.manifest.metadata
                return StepFacts(
                    saved.get("started_nanoseconds"),
                    None,
                    saved.get("metrics") or {},
                    saved.get("custom_metadata") or {},
                )
        return None

    def _persistent_facts(self, step: int) -> StepFacts | None:
        found = self._find_persistent(step)
        return None if found is None else self._read_facts(found)

    def _find_persistent(self, step: int) -> PersistentStep | None:
        return next((held for held in self.persistent() if held.step_id.step == step), None)

    def _absent(self, step: int) -> NoRestorableStepError:
        return NoRestorableStepError(f"step {step} is on no tier; the steps that are: {self.numbers()}")


def utc_time(nanoseconds: int) -> datetime.datetime:
    """A Unix time as policies want it."""
    return datetime.datetime.fromtimestamp(nanoseconds / 1e9, tz=datetime.UTC)
