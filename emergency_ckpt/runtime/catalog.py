"""The catalog: which steps there are on any tier, and what was saved with them. Local to a process."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emergency_ckpt.core.extras import ProcessExtras, joined_items
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.retention import SavedStep, best_step
from emergency_ckpt.errors import CorruptDataError, NoRestorableStepError
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.persistent.attempts import PersistentStep
from emergency_ckpt.persistent.step_facts import StepFacts, read_handlers, read_step_facts
from emergency_ckpt.persistent.step_files import ORBAX_STEP_FILE
from emergency_ckpt.persistent.store import without_void
from emergency_ckpt.runtime.contents import StepContents
from emergency_ckpt.runtime.items import STATE
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.runtime.policies import Ranking

_METRICS = "metrics"


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
        slot = self._local_slot(step)
        held = None if slot is not None and slot.manifest.step.generation else self._find_persistent(step)
        if slot is not None and self._tells(slot, held):
            return {kind: slot.manifest.metadata.get(kind) or {} for kind in ("custom_metadata", _METRICS)}
        if held is None:
            raise self._absent(step)
        facts = self._read_facts(held)
        return {"custom_metadata": facts.custom_metadata, "metrics": facts.metrics}

    def facts(self, step: int) -> StepFacts:
        """All that is known of `step` on any tier; raises NoRestorableStepError if it is nowhere."""
        slot, held = self._local_slot(step), self._find_persistent(step)
        local = _slot_facts(slot) if slot is not None and self._tells(slot, held) else None
        persistent = None if held is None else self._read_facts(held)
        if local and persistent:
            return dataclasses.replace(local, committed_nanoseconds=persistent.committed_nanoseconds)
        if found := local or persistent:
            return found
        raise self._absent(step)

    def contents(self, step: int) -> StepContents:
        """What `step` holds; raises NoRestorableStepError if it is nowhere.

        Raises CorruptDataError and PersistentStoreError for a step that does not say.
        """
        local, held = self._local_slot(step), self._find_persistent(step)
        if local is not None and self._tells(local, held):
            return StepContents.of_slot(local)
        if held is None:
            raise self._absent(step)
        items = [name for name in self._read_facts(held).handlers if name not in (STATE, _METRICS)]
        return StepContents.of_reader(self._job.persistent.open_step(held), items)

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
        """Deletes `step` from the persistent tier if it is there; its bytes follow. One process calls it."""
        found = self._find_persistent(step)
        if found is not None:
            hidden = self._job.persistent.hide_step(found)
            if hidden is not None:
                self._job.deletions.clear(hidden)

    def _read_info(self, held: PersistentStep) -> SavedStep:
        facts = self._read_facts(held)
        committed = facts.committed_nanoseconds
        # Early versions of Orbax kept no times; like Orbax's own manager we then take the directory's.
        time = utc_time(self._job.persistent.files.modified(held.name) if committed is None else committed)
        return SavedStep(held.step_id.step, time, facts.metrics or None)

    def _read_facts(self, held: PersistentStep) -> StepFacts:
        facts = read_step_facts(self._job.persistent.files.below(held.name), held.step_id.step)
        return dataclasses.replace(facts, handlers=_with_state(facts.handlers, held.item))

    def _local_slot(self, step: int) -> SealedSlot | None:
        """The newest slot that holds `step`; none once the directory is closed or somebody else's."""
        if not self._job.local.usable:
            return None
        for held in reversed(self._job.local.sealed_steps(listed_only=False)):
            slot = self._job.local.sealed(held) if held.step == step else None
            if slot is not None:
                return slot
        return None

    def _tells(self, slot: SealedSlot, held: PersistentStep | None) -> bool:
        """Whether the slot speaks for its step. Where another program wrote it, its own files do."""
        return held is None or slot.manifest.step.generation != 0

    def _find_persistent(self, step: int) -> PersistentStep | None:
        return next((held for held in self.persistent() if held.step_id.step == step), None)

    def _absent(self, step: int) -> NoRestorableStepError:
        return NoRestorableStepError(f"step {step} is on no tier; the steps that are: {self.numbers()}")


def _slot_facts(slot: SealedSlot) -> StepFacts:
    saved, metrics = slot.manifest.metadata, slot.manifest.metadata.get("metrics") or {}
    said = read_handlers(json.loads(dict(slot.layout.metadata_files).get(ORBAX_STEP_FILE, b"{}")))
    item = next((name for name in said if name != _METRICS), "")
    if not metrics:
        said.pop(_METRICS, None)
    extras = [ProcessExtras.from_text(text) for _, text in sorted(slot.manifest.extras.items())]
    return StepFacts(
        saved.get("started_nanoseconds"),
        None,
        metrics,
        saved.get("custom_metadata") or {},
        {**_with_state(said, item), **{name: each.handler for name, each in joined_items(extras).items()}},
    )


def _with_state(handlers: Mapping[str, str], item: str) -> dict[str, str]:
    """The handlers, with that of the state, whose directory is `item`, under the name that callers know."""
    named = {name: handler for name, handler in handlers.items() if name != item}
    return {**named, STATE: handlers[item]} if item in handlers else named


def utc_time(nanoseconds: int) -> datetime.datetime:
    """A Unix time as policies want it."""
    return datetime.datetime.fromtimestamp(nanoseconds / 1e9, tz=datetime.UTC)
