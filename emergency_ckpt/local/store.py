"""The store of slots of one process: the slot state machine of `core.slots`, carried out on the ramdisk.

Effects follow the order that the machine is proven for: a slot's manifest is removed before its first byte is
overwritten, and appears by rename after the last one. Nothing here talks to other processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import timedelta
from pathlib import Path

from emergency_ckpt.core.inventory import Holding
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import Activation, StepId, is_void
from emergency_ckpt.core.slots import Outcome, SlotTable
from emergency_ckpt.errors import LocalCapacityError, LocalDirectoryError
from emergency_ckpt.local.claim import directories
from emergency_ckpt.local.held_slots import HeldSlots, StoreOptions
from emergency_ckpt.local.losses import notice_losses, rebuild
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.recovery import newest_of_run
from emergency_ckpt.local.repair import RepairSlot, begin_repair, end_repair, repaired
from emergency_ckpt.local.slot_views import OpenSlot, SealedSlot
from emergency_ckpt.local.verification import learn_restorable, verify_slot, verify_slots

__all__ = ["LocalStore", "StoreOptions", "held_positions"]

# How often a save that waits for a slot looks whether another process has ended its drain: nothing tells it.
_PIN_POLL_SECONDS = 0.05
_Choice = tuple[SlotTable, int | None, str]


class LocalStore:
    """Slots, manifests and what is known about the steps in them. Thread-safe.

    Raises at construction: LocalDirectoryError, LocalCapacityError, ForeignRunError.
    `log` receives one sentence per thing a person should know.
    """

    def __init__(
        self,
        options: StoreOptions,
        run: str,
        layout: Layout,
        process: int,
        log: Callable[[str], None],
    ) -> None:
        self.layout = layout
        self.process = process
        self._held = HeldSlots(options, run, layout, process, log)
        self._changed = self._held.changed

    # What is there.

    @property
    def directory(self) -> Path | None:
        return self._held.directory

    @property
    def slot_count(self) -> int:
        return len(self._held.files)

    @property
    def activations(self) -> tuple[Activation, ...]:
        return tuple(sorted(self._held.table.activations))

    @property
    def usable(self) -> bool:
        """Whether this store is neither closed nor taken over by a newer manager of the process."""
        return self._held.usable

    def highest_generation(self) -> int:
        """The highest generation seen in this directory."""
        generations = [m.step.generation for m in self._held.manifests if m]
        generations += [a.generation for a in self._held.table.activations]
        return max(generations, default=0)

    def promised(self) -> StepId | None:
        """The newest step of which a manifest found at start says that it was complete, and which is not void.

        What became of that manifest's own data plays no part.
        """
        with self._changed:
            known = self._held.table.activations
        return max((step for step in self._held.promises if not is_void(step, known)), default=None)

    def verify(self) -> tuple[Holding, ...]:
        """Verifies every sealed slot against its checksums; what is damaged is said and counts as missing.

        A slot that lacks shards keeps the others, and its manifest says so before this returns; one that has no
        good shard is emptied, as are two that claim the same step and differ. What was missing already is not
        verified again. Returns one holding per slot of a known layout whose step is neither void nor abandoned.
        A step in which damage was found does not count as complete until `learn_restorable`.
        """
        with self._changed:
            notice_losses(self._held)
        holdings = verify_slots(self._held)
        with self._changed:
            self._held.files.prepare_rest()
        return holdings

    def verify_step(self, step: StepId) -> Holding | None:
        """Verifies one sealed step as `verify` does, when a reader found damage; None where nothing is good.

        Of several slots it tells of that which `sealed` gives.
        """
        with self._changed:
            indices = self._held.find_all(step)
        found = [verify_slot(self._held, index) for index in indices]
        return next((holding for holding in found if holding is not None), None)

    def learn_restorable(self, restorable: Collection[StepId]) -> None:
        """Learns from all processes' verified holdings together which steps can be restored.

        Of steps known to be complete, one that cannot be is given up and forgotten: older ones must not be
        overwritten for it. One in which damage was found here and that can be restored counts as complete
        again. Every process calls it, with the same steps; without a local tier it does nothing.
        """
        with self._changed:
            learn_restorable(self._held, restorable)

    def sealed_steps(self, listed_only: bool = True) -> tuple[StepId, ...]:
        """Sealed steps that are neither void nor abandoned, oldest first; shards of them may be missing."""
        with self._changed:
            return self._held.sealed_steps(listed_only)

    def complete_steps(self) -> tuple[StepId, ...]:
        """Local steps that are known to be complete and not void, all shards here, oldest first."""
        with self._changed:
            complete = self._held.table.complete
            return tuple(s for s in self._held.sealed_steps() if s in complete and not self._lacks_some(s))

    def sealed(self, step: StepId) -> SealedSlot | None:
        """The sealed slot of `step`, if it is here and its layout is known; of several the job's own cut."""
        return next(iter(self.sealed_slots(step)), None)

    def sealed_slots(self, step: StepId) -> tuple[SealedSlot, ...]:
        """All sealed slots of `step`: as this job cuts it first, then those that lack least.

        There are several where a restore sealed the step anew in another cut, until a newer one is complete or
        needs the room.
        """
        with self._changed:
            views = [self._held.view(index) for index in self._held.find_all(step)]
            return tuple(view for view in views if view is not None)

    def _lacks_some(self, step: StepId) -> bool:
        index = self._held.find(step)
        manifest = None if index is None else self._held.manifests[index]
        return manifest is not None and bool(manifest.missing)

    def saved_layout(self, layout_hash: str) -> Layout:
        """The layout that a holding names. Raises CorruptDataError for one that is not here."""
        return self._held.layouts.get(layout_hash)

    # Writing a step.

    def begin(self, step: StepId, timeout: timedelta, pins: int = 0) -> tuple[OpenSlot | None, str]:
        """Takes a slot for `step`, waiting up to `timeout` for one to become free.

        Returns the slot, or None and the reason why no slot may be overwritten. Raises LocalDirectoryError when
        the directory cannot be used, LocalCapacityError when slots have lost their memory; when this store is
        closed or was taken over by a newer manager of the process (`usable` tells), LocalDirectoryError too.
        """
        return self._begin(step, timeout, lambda unusable: self._held.table.begin(step, pins, unusable))

    def begin_anew(self, step: StepId, timeout: timedelta) -> tuple[OpenSlot | None, str]:
        """Like `begin`, for a step that may be sealed here in another cut or in part.

        Takes another slot than that one, which stays: no instant is without either. See `seal_beside`.
        """
        return self._begin(step, timeout, lambda unusable: self._held.table.begin_anew(step, unusable))

    def begin_unasked(self, step: StepId) -> tuple[OpenSlot | None, str]:
        """Like `begin`, for a step that nobody has asked for yet: never waits, and evicts no other run."""

        def choose(unusable: Mapping[int, str]) -> _Choice:
            foreign = {index: f"slot {index} holds another run's step" for index in self._held.foreign}
            return self._held.table.begin(step, 0, {**unusable, **foreign})

        return self._begin(step, timedelta(0), choose)

    def gives_way(self, end: Callable[[], None]) -> None:
        """`end` gives back what was taken unasked, when a newer manager of this process wants the directory."""
        if self._held.claim:
            self._held.claim.gives_way(end)

    def stays(self, end: Callable[[], None]) -> None:
        """What `gives_way` was told of has ended, or is asked for now. Repeating it is fine."""
        if self._held.claim:
            self._held.claim.stays(end)

    def _begin(
        self, step: StepId, timeout: timedelta, choose: Callable[[Mapping[int, str]], _Choice]
    ) -> tuple[OpenSlot | None, str]:
        held = self._held
        deadline = time.monotonic() + timeout.total_seconds()
        with self._changed:
            held.check_usable()
            rebuild(held)
            while True:
                held.check_usable()
                failures = held.files.failures()
                drained: dict[int, str] = held.standing()
                while True:
                    table, index, reason = choose(failures | drained)
                    if index is None:
                        break
                    with held.files.locked(index) as locked:
                        if locked:
                            return self._take(index, step, table, reason)
                    drained[index] = f"slot {index} is being drained by another process"
                remaining = deadline - time.monotonic()
                if remaining <= 0 and failures:
                    raise LocalCapacityError(f"{step} finds no slot: {reason}")
                if remaining <= 0:
                    return None, reason
                self._changed.wait(min(remaining, _PIN_POLL_SECONDS) if drained else remaining)

    def _take(self, index: int, step: StepId, table: SlotTable, reason: str) -> tuple[OpenSlot, str]:
        """Empties slot `index` and opens it; whatever interrupts this, table and manifests still agree."""
        held = self._held
        before = held.table
        try:
            held.empty_for(index)
            held.update(table)
            held.files.prepare_rest()
            return OpenSlot(index, step, held.files[index]), reason
        except BaseException as error:
            path = held.manifest_path(index)
            if path is not None and path.exists():
                held.update(before)
            else:
                held.manifests[index] = None
                held.foreign.pop(index, None)
                held.update(before.empty(index))
            if isinstance(error, OSError):
                raise LocalDirectoryError(
                    f"slot {index} of {self.directory} cannot be used: {error}"
                ) from error
            raise

    def seal(self, slot: OpenSlot, manifest: Manifest) -> None:
        """Puts the manifest of a written slot in place; it may say that shards are missing (`begin_repair`).

        Raises LocalDirectoryError once closed, and where the slot is not in the directory any more. A newer
        manager that takes the directory over waits for the slots that were begun before.
        """
        with self._changed:
            self._held.check_open()
            self._held.seal(slot.index, slot.step, manifest)

    def seal_beside(self, slot: OpenSlot, manifest: Manifest) -> None:
        """Like `seal`, where slots hold the same step in another cut: those stay, for other hosts need them.

        They make room for a save that finds no other slot, and go when a newer step is complete.
        """
        held, cut = self._held, (manifest.layout, manifest.position)
        with self._changed:
            held.check_open()
            manifests = {index: held.manifests[index] for index in held.table.find_all(slot.step)}
            kept = [i for i, m in manifests.items() if m is not None and (m.layout, m.position) != cut]
            held.seal(slot.index, slot.step, manifest, kept)

    def keep_own(self, step: StepId) -> None:
        """Gives up the other slots of `step` where one holds it as this job cuts it: they are no sources."""
        held = self._held
        with self._changed:
            indices = held.find_all(step)
            first = held.manifests[indices[0]] if indices else None
            if first is not None and (first.layout, first.position) == (self.layout.hash, self.process):
                for index in indices[1:]:
                    if not held.table.slots[index].in_use:
                        held.give_up_slot(index)

    def discard(self, slot: OpenSlot, *, still_written: bool = False) -> None:
        """Gives up a slot that was begun and not sealed.

        Where somebody may still write to its memory, the slot gets other memory. Raises LocalDirectoryError
        where there is none; the slot is then given up all the same.
        """
        with self._changed:
            self._held.update(self._held.table.fail(slot.index))
            if still_written and self.usable:
                self._held.files.replace(slot.index)

    # Completing a step that lacks shards.

    def begin_repair(self, step: StepId, index: int | None = None) -> RepairSlot | None:
        """Takes the slot of `step` for writing its missing shards in place; call `end_repair` in the end.

        `index`: which of its slots, where there may be several; by default that which `sealed` gives.

        None where the step is not sealed here, lacks nothing, or is being repaired already. Until the end the
        slot is not overwritten, neither here nor by a later owner of the directory. Raises LocalDirectoryError
        when the directory cannot be used, or this store is closed or was taken over.
        """
        with self._changed:
            return begin_repair(self._held, step, index)

    def repaired(
        self,
        slot: RepairSlot,
        shards: Iterable[int],
        checksums: Mapping[int, tuple[int, ...]] | None = None,
    ) -> tuple[int, ...]:
        """Verifies missing shards that were written, and counts those that match as there, on disk first.

        Args:
          shards: indices into the layout's shards, all of them missing until now.
          checksums: block checksums of copies of other processes' shards that came here for the first time, as
            their owners saved them; of all others the slot's own manifest knows them.

        Returns those that do not match their checksums: they are still missing, and may be written again. Every
        call writes a manifest, so many small shards are better told at once. Threads may call it for different
        shards. Raises ValueError for shards that are not missing, LocalDirectoryError once closed and where the
        slot is not in the directory any more.
        """
        return repaired(self._held, slot, shards, checksums or {})

    def end_repair(self, slot: RepairSlot) -> None:
        """Nobody writes into the slot any more; what is still missing stays so. Repeating it is fine."""
        with self._changed:
            end_repair(self._held, slot)

    # What becomes of a step. Of a store that is closed or was taken over, these change the memory only.

    def settle(self, step: StepId, outcome: Outcome) -> None:
        """Learns the agreed outcome; the slot of an abandoned step is emptied."""
        with self._changed:
            self._held.update(self._held.table.settle(step, outcome))
            if step in self._held.table.abandoned:
                self._held.give_up(step)

    def give_up(self, step: StepId) -> None:
        """Empties the slot of `step`, if it is sealed here and neither pinned nor being repaired."""
        with self._changed:
            self._held.give_up(step)

    def delete(self, step: int) -> None:
        """Gives up and forgets the sealed steps of this number, of every generation.

        A slot that is pinned or being repaired stays as it is for whoever does that, and is emptied after him.
        """
        held = self._held
        with self._changed:
            for index, slot in enumerate(held.table.slots):
                if slot.step is None or slot.step.step != step or not slot.sealed:
                    continue
                if slot.in_use:
                    held.gone.add(slot.step)
                    held.unlink_manifest(index)
                else:
                    held.give_up(slot.step)
            writing = {slot.step for slot in held.table.slots if not slot.sealed}
            known = held.table.complete | held.table.abandoned
            for saved in (s for s in known if s.step == step and s not in writing):
                held.update(held.table.forget(saved))

    def activate(self, activations: Iterable[Activation]) -> None:
        """Learns of restores that all processes hold; what they left behind no longer occupies slots."""
        with self._changed:
            for activation in activations:
                self._held.update(self._held.table.activate(activation))

    def pin(self, step: StepId) -> SealedSlot | None:
        """Keeps the slot of `step` from being overwritten until `unpin`; None where it is not sealed here.

        Raises LocalDirectoryError when this store is closed or was taken over.
        """
        held = self._held
        with self._changed:
            held.check_usable()
            index = held.find(step)
            if index is None or step in held.gone:
                return None
            slot = held.view(index)
            held.update(held.table.pin(index))
            return slot

    def unpin(self, index: int) -> None:
        with self._changed:
            self._held.update(self._held.table.unpin(index))
            self._held.left(index)

    def close(self) -> None:
        """Unmaps the slots and releases the directory; sealed data stays. Repeating it is fine.

        The files of slots that are still being written are removed: whoever writes there keeps the memory to
        himself, and the next owner of the directory gets fresh one.
        """
        held = self._held
        with self._changed:
            if held.closed:
                return
            held.remove_unfinished()
            held.closed = True
            held.update(held.table)
        held.files.close()
        if held.claim:
            held.claim.release()


def held_positions(root: Path, run: str) -> dict[int, int | None]:
    """Per directory below `root`, the process index whose newest step of this run is in it. Takes no lock."""
    newest = {ordinal: newest_of_run(path, run) for ordinal, path in directories(root).items()}
    return {ordinal: manifest.position if manifest else None for ordinal, manifest in newest.items()}
