"""The slot state machine: which slot of one process may take the next step.

Invariant 2: the newest restorable step is never lost. A slot is overwritten only if what it holds is void,
abandoned, or older than a step that is *known* to be complete; a process that does not know protects both.
The table is a value: every transition returns a new one, and the same transitions run in production and in
the exhaustive exploration of the tests.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from emergency_ckpt.core.lineage import Activation, StepId, is_void

_NONE: Mapping[int, str] = MappingProxyType({})


class Outcome(enum.Enum):
    """What all processes agreed about a step; written once."""

    COMPLETE = "complete"
    ABANDONED = "abandoned"


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """One slot: empty (`step` None), being written (`sealed` False) or sealed; `pins` counts running drains.

    A sealed slot may lack shards: it is protected like a whole one, for it may have the only copy of the
    others. `repairing`: its missing shards are being written. `foreign` marks an empty slot whose file still
    has another run's step.
    """

    step: StepId | None = None
    sealed: bool = False
    pins: int = 0
    foreign: bool = False
    repairing: bool = False

    @property
    def in_use(self) -> bool:
        """Whether somebody works on this sealed slot, so that it cannot be emptied now."""
        return self.pins > 0 or self.repairing


@dataclasses.dataclass(frozen=True, slots=True)
class SlotTable:
    """The slots of one process and what this process knows about the steps in them.

    Attributes:
      slots: one entry per slot file.
      max_to_keep: how many complete steps stay available; 0 where slots are not a tier to restore from
        (then only pins protect a sealed slot).
      complete: steps known to be complete (those in slots, and the newest one wherever it is).
      abandoned: steps in slots known to be abandoned.
      activations: the restores that all processes agreed on (see `core.lineage`).
    """

    slots: tuple[Slot, ...]
    max_to_keep: int = 1
    complete: frozenset[StepId] = frozenset()
    abandoned: frozenset[StepId] = frozenset()
    activations: frozenset[Activation] = frozenset()

    @classmethod
    def recovered(
        cls,
        held: Sequence[StepId | None],
        max_to_keep: int,
        activations: Iterable[Activation] = (),
        foreign: Collection[int] = (),
    ) -> SlotTable:
        """The table after a start: sealed slots as found on the ramdisk, no outcome known.

        `foreign` names the slots that hold another run's step; `held` is None there.
        """
        slots = tuple(Slot(step, sealed=step is not None, foreign=i in foreign) for i, step in enumerate(held))
        return cls(slots, max_to_keep, activations=frozenset(activations))

    # Questions.

    def sealed_steps(self) -> tuple[StepId, ...]:
        """Steps in sealed slots that are neither void nor abandoned, oldest first."""
        return tuple(sorted({s.step for s in self.slots if s.step and s.sealed and not self._given_up(s.step)}))

    def find_all(self, step: StepId) -> tuple[int, ...]:
        """The slots in which `step` is sealed; several where a restore sealed it anew in another cut."""
        return tuple(i for i, s in enumerate(self.slots) if s.step == step and s.sealed)

    def find(self, step: StepId) -> int | None:
        """The first slot in which `step` is sealed, if any."""
        return next(iter(self.find_all(step)), None)

    def newest_complete(self) -> StepId | None:
        return max((s for s in self.complete if not is_void(s, self.activations)), default=None)

    def protection(self, index: int) -> str | None:
        """Why this slot must not be overwritten, in words; None where it may be.

        Of several slots that hold one complete step each may be, but for the last: the caller says which stays
        (see `crowded`).
        """
        slot = self.slots[index]
        gives_way = slot.sealed and not slot.in_use and slot.step in self.complete
        return None if gives_way and self._is_elsewhere(index) else self._reason_to_keep(index)

    def crowded(self) -> tuple[StepId, ...]:
        """The steps that must stay, and that several slots hold."""
        kept = [slot.step for i, slot in enumerate(self.slots) if slot.sealed and self._reason_to_keep(i)]
        return tuple(sorted({step for step in kept if step is not None and kept.count(step) > 1}))

    def _reason_to_keep(self, index: int) -> str | None:
        slot = self.slots[index]
        if slot.step is None:
            return None
        if not slot.sealed:
            return f"slot {index} is being written ({slot.step})"
        if slot.pins:
            return f"slot {index} is being drained ({slot.step})"
        if slot.repairing:
            return f"slot {index} is being repaired ({slot.step})"
        if self.max_to_keep == 0 or self._given_up(slot.step):
            return None
        newer = [s for s in self.complete if s > slot.step and not is_void(s, self.activations)]
        if not newer:
            return f"slot {index} holds {slot.step} and no newer step is known to be complete"
        if slot.step in self.complete and len(newer) < self.max_to_keep:
            return f"slot {index} holds {slot.step}, one of the newest {self.max_to_keep} complete steps"
        return None

    def choose(self, step: StepId, unusable: Mapping[int, str] = _NONE) -> tuple[int | None, str]:
        """The slot that `begin(step, unusable)` takes, or None, with the reason."""
        if is_void(step, self.activations):
            return None, f"{step} belongs to a generation that a restore has ended"
        writing = next((i for i, s in enumerate(self.slots) if s.step == step and not s.sealed), None)
        if writing is not None:
            return None, f"{step} is being written in slot {writing} already"
        held = self.find(step)
        if held is not None and not self._given_up(step) and self.max_to_keep:
            return None, f"{step} is already sealed in slot {held}"
        return self._choose_free(step, unusable)

    def _choose_free(self, step: StepId, unusable: Mapping[int, str]) -> tuple[int | None, str]:
        reasons = [unusable.get(i) or self.protection(i) for i in range(len(self.slots))]
        free = [i for i, reason in enumerate(reasons) if reason is None]
        if not free:
            return None, "no slot is free: " + "; ".join(reason for reason in reasons if reason)
        same = [i for i in free if self.slots[i].step == step]
        best = same[0] if same else min(free, key=self._reluctance)
        return best, f"slot {best} takes {step}"

    def _reluctance(self, index: int) -> tuple[int, int, int]:
        """Sort key: empty slots first, given-up steps, superseded ones (oldest first), other cuts of a newest
        step, another run's last.
        """
        step = self.slots[index].step
        if step is None:
            return (4 if self.slots[index].foreign else 0, 0, 0)
        newest = step == self.newest_complete() and not self._given_up(step)
        return (1 if self._given_up(step) else 3 if newest else 2, step.generation, step.step)

    def _is_elsewhere(self, index: int) -> bool:
        """Whether another slot holds the same step."""
        step = self.slots[index].step
        return step is not None and any(i != index for i in self.find_all(step))

    def _given_up(self, step: StepId) -> bool:
        return step in self.abandoned or is_void(step, self.activations)

    def unsettled(self) -> int:
        """Slots that are being written, drained or repaired."""
        return sum(s.step is not None and (not s.sealed or s.in_use) for s in self.slots)

    # Transitions.

    def begin(
        self, step: StepId, pins: int = 0, unusable: Mapping[int, str] = _NONE
    ) -> tuple[SlotTable, int | None, str]:
        """Takes a slot for `step` (the caller removes the slot's manifest before it writes a byte).

        `unusable` names the slots that cannot be taken for what this table does not know, each with the reason:
        they have no memory now, or another process drains them. Returns the new table, the slot's index or
        None where none may be overwritten, and the reason.
        """
        index, reason = self.choose(step, unusable)
        if index is None:
            return self, None, reason
        table = dataclasses.replace(self, abandoned=self.abandoned - {step})
        return table._with_slot(index, Slot(step, sealed=False, pins=pins)), index, reason

    def begin_anew(
        self, step: StepId, unusable: Mapping[int, str] = _NONE
    ) -> tuple[SlotTable, int | None, str]:
        """Like `begin`, for a step that may be sealed here in another cut: takes another slot than that one.

        Other processes may need what is in the old slot until all have sealed the step anew. Where somebody
        works on it, none is taken.
        """
        held = self.find_all(step)
        if not held or self._given_up(step):
            return self.begin(step, unusable=unusable)
        if used := [index for index in held if self.slots[index].in_use]:
            return self, None, f"slot {used[0]} holds {step}, and somebody works on it"
        if any(slot.step == step and not slot.sealed for slot in self.slots):
            return self, None, f"{step} is being written already"
        kept = {index: f"slot {index} holds {step} in another cut" for index in held}
        index, reason = self._choose_free(step, {**unusable, **kept})
        if index is None:
            return self, None, reason
        return self._with_slot(index, Slot(step, sealed=False)), index, reason

    def replaced_by(self, index: int, kept: Collection[int] = ()) -> tuple[int, ...]:
        """The slots that hold the same step as this one, and that nobody works on: its seal empties them.

        `kept`: those of them that stay, because they hold it in another cut.
        """
        step = self.slots[index].step
        return tuple(
            i
            for i, slot in enumerate(self.slots)
            if i != index and i not in kept and slot.step == step and slot.sealed and not slot.in_use
        )

    def seal(self, index: int, kept: Collection[int] = ()) -> SlotTable:
        """The slot's manifest is in place; it may say that shards are missing. `kept`: see `replaced_by`."""
        slot, replaced = self._writing(index), self.replaced_by(index, kept)
        slots = [Slot() if i in replaced else each for i, each in enumerate(self.slots)]
        slots[index] = dataclasses.replace(slot, sealed=True)
        return dataclasses.replace(self, slots=tuple(slots))._pruned()

    def fail(self, index: int) -> SlotTable:
        """Writing the slot failed; it is empty."""
        self._writing(index)
        return self._with_slot(index, Slot())

    def empty(self, index: int) -> SlotTable:
        """The slot's manifest is gone (removed on purpose, or found damaged)."""
        return self._with_slot(index, Slot())

    def settle(self, step: StepId, outcome: Outcome) -> SlotTable:
        """Learns the agreed outcome of `step`, or COMPLETE from a restore whose plan covers it.

        COMPLETE stands: a restore may choose an abandoned step that was sealed everywhere after all, and the
        older outcome may arrive late.
        """
        if outcome is Outcome.COMPLETE:
            complete, abandoned = self.complete | {step}, self.abandoned - {step}
            return dataclasses.replace(self, complete=complete, abandoned=abandoned)._pruned()
        if step in self.complete:
            return self
        return dataclasses.replace(self, abandoned=self.abandoned | {step})._pruned()

    def forget(self, step: StepId) -> SlotTable:
        """`step` was deleted: what was known about it no longer speaks for overwriting older ones."""
        return dataclasses.replace(
            self, complete=self.complete - {step}, abandoned=self.abandoned - {step}
        )._pruned()

    def activate(self, activation: Activation) -> SlotTable:
        """Learns that all processes hold the state of a restore: what it left behind is void."""
        return dataclasses.replace(self, activations=self.activations | {activation})._pruned()

    def pin(self, index: int) -> SlotTable:
        """A drain reads this slot: it may not be overwritten until `unpin`."""
        slot = self.slots[index]
        if slot.step is None:
            raise ValueError(f"slot {index} is empty and cannot be pinned")
        return self._with_slot(index, dataclasses.replace(slot, pins=slot.pins + 1))

    def unpin(self, index: int) -> SlotTable:
        slot = self.slots[index]
        if not slot.pins:
            raise ValueError(f"slot {index} is not pinned")
        return self._with_slot(index, dataclasses.replace(slot, pins=slot.pins - 1))

    def begin_repair(self, index: int) -> SlotTable:
        """The missing shards of this sealed slot are written from now on, by one repair at a time."""
        slot = self.slots[index]
        if slot.step is None or not slot.sealed or slot.repairing:
            raise ValueError(f"slot {index} cannot be repaired: {slot}")
        return self._with_slot(index, dataclasses.replace(slot, repairing=True))

    def end_repair(self, index: int) -> SlotTable:
        """Nobody writes into this sealed slot any more, whole or not."""
        slot = self.slots[index]
        if not slot.repairing:
            raise ValueError(f"slot {index} is not being repaired")
        return self._with_slot(index, dataclasses.replace(slot, repairing=False))

    def _writing(self, index: int) -> Slot:
        slot = self.slots[index]
        if slot.step is None or slot.sealed:
            raise ValueError(f"slot {index} is not being written")
        return slot

    def _with_slot(self, index: int, slot: Slot) -> SlotTable:
        slots = (*self.slots[:index], slot, *self.slots[index + 1 :])
        return dataclasses.replace(self, slots=slots)._pruned()

    def _pruned(self) -> SlotTable:
        """Forgets outcomes that no longer matter, so that the table does not grow with the run."""
        held = {slot.step for slot in self.slots}
        newest = self.newest_complete()
        return dataclasses.replace(
            self,
            complete=frozenset(s for s in self.complete if s in held or s == newest),
            abandoned=frozenset(s for s in self.abandoned if s in held),
        )
