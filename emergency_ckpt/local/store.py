"""The store of slots of one process: the slot state machine of `core.slots`, carried out on the ramdisk.

Effects follow the order that the machine is proven for: a slot's manifest is removed before its first byte is
overwritten, and appears by rename after the last one. Nothing here talks to other processes.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Literal

from emergency_ckpt.core.inventory import Holding
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import Activation, StepId, is_void
from emergency_ckpt.core.slots import Outcome, SlotTable
from emergency_ckpt.errors import CorruptDataError, LocalCapacityError, LocalDirectoryError
from emergency_ckpt.local.claim import LOCK_WAIT, TAKEOVER_WAIT, Claim, claim_directory, directories
from emergency_ckpt.local.file_system import slow_warning
from emergency_ckpt.local.layout_files import LayoutFiles
from emergency_ckpt.local.manifest import Manifest, write_manifest
from emergency_ckpt.local.recovery import (
    Found,
    evict,
    find_slots,
    make_room,
    manifest_path,
    newest_of_run,
)
from emergency_ckpt.local.slot_files import SlotFiles
from emergency_ckpt.local.slot_views import OpenSlot, SealedSlot


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """How the slots of one process are kept.

    Attributes:
      directory: the ramdisk directory; None keeps the slots in anonymous memory (no local tier).
      ordinal: which of the directories below it this process should take (see `held_positions`).
      max_to_keep: complete steps that stay available locally; 0 without a local tier.
      wanted_slots: slots for full speed; least_slots: without these no step can be kept safely.
      foreign_run: what to do with another run's data in the directory: 'evict' it when its room is needed, or
        raise an 'error' at start.
      lock_wait: how long to wait for another process that has locked the directory with this run's steps.
      takeover_wait: how long to wait for another manager of this process to finish what it has begun.
    """

    directory: Path | None
    max_to_keep: int
    wanted_slots: int
    least_slots: int
    foreign_run: Literal["evict", "error"] = "evict"
    ordinal: int = 0
    lock_wait: timedelta = LOCK_WAIT
    takeover_wait: timedelta = TAKEOVER_WAIT


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
        self._options = options
        self._run = run
        self._log = log
        self._closed = False
        self._slot_bytes = layout.data_bytes(process)
        self._claim = self._make_claim()
        self._changed = self._claim.changed if self._claim else threading.Condition()
        self._layouts = LayoutFiles(self.directory, layout)
        # Steps that are gone for all but those who pinned them.
        self._gone: set[StepId] = set()
        try:
            found, self._numbers = self._find()
            self._manifests: list[Manifest | None] = [found.own.get(n) for n in self._numbers]
            self._foreign = {i: found.foreign[n] for i, n in enumerate(self._numbers) if n in found.foreign}
            self._promises = frozenset(found.promises)
            held = [m.step if m else None for m in self._manifests]
            activations = {a for m in self._manifests if m for a in m.activations}
            self._table = SlotTable.recovered(held, options.max_to_keep, activations, self._foreign)
            self._layouts.write_own(found.foreign_layouts)
            # Last: nothing after it fails, so that no mapping is left behind.
            kept = {i: found.sizes[n] for i, n in enumerate(self._numbers) if n in found.sizes}
            self._files = SlotFiles(self.directory, self._slot_bytes, self._numbers, kept, self._foreign)
        except BaseException:
            if self._claim:
                self._claim.release()
            raise

    # What is there.

    @property
    def directory(self) -> Path | None:
        return self._claim.path if self._claim else None

    @property
    def slot_count(self) -> int:
        return len(self._files)

    @property
    def activations(self) -> tuple[Activation, ...]:
        return tuple(sorted(self._table.activations))

    def highest_generation(self) -> int:
        """The highest generation seen in this directory."""
        generations = [m.step.generation for m in self._manifests if m]
        generations += [a.generation for a in self._table.activations]
        return max(generations, default=0)

    def promised(self) -> StepId | None:
        """The newest step of which a manifest found at start says that it was complete, and which is not void.

        What became of that manifest's own data plays no part.
        """
        with self._changed:
            known = self._table.activations
        return max((step for step in self._promises if not is_void(step, known)), default=None)

    def verify(self) -> tuple[Holding, ...]:
        """Verifies every sealed slot against its checksums; damaged ones are emptied, and said.

        Returns one holding per good slot of a known layout whose step is neither void nor abandoned.
        """
        self._notice_losses()
        good: dict[int, Holding] = {}
        for index, manifest in enumerate(self._manifests):
            slot = self._table.slots[index]
            if manifest is None or not slot.sealed or manifest.step not in self.sealed_steps(listed_only=False):
                continue
            if damage := self._find_damage(index):
                self._give_up_damaged(index, damage)
                continue
            good[index] = Holding(
                manifest.step,
                manifest.layout,
                manifest.position,
                manifest.digest,
                tuple(sorted(manifest.extras)),
            )
        for index, holding in list(good.items()):
            if index not in good:
                continue
            twins = [i for i, other in good.items() if other.step == holding.step and i > index]
            differ = any(good[i] != holding for i in twins)
            for twin in [index, *twins] if differ else twins:
                self._give_up_damaged(twin, "another slot says that it holds the same step")
                del good[twin]
        with self._changed:
            self._files.prepare_rest()
        return tuple(good.values())

    def _give_up_damaged(self, index: int, damage: str) -> None:
        with self._changed:
            step = self._table.slots[index].step
            self._log(f"{step} in slot {index} of {self.directory} is damaged and given up: {damage}")
            if self._table.slots[index].pins == 0:
                self._give_up_slot(index)

    def _find_damage(self, index: int) -> str | None:
        manifest = self._manifests[index]
        assert manifest is not None
        try:
            layout = self._layouts.get(manifest.layout)
            manifest.check_against(layout, self._files[index].nbytes)
            return SealedSlot(index, manifest, layout, self._files[index].data).find_damage()
        except CorruptDataError as error:
            return str(error)

    def sealed_steps(self, listed_only: bool = True) -> tuple[StepId, ...]:
        """Sealed steps that are neither void nor abandoned, oldest first."""
        with self._changed:
            listed = {m.step for m in self._manifests if m and (m.listed or not listed_only)} - self._gone
            return tuple(step for step in self._table.sealed_steps() if step in listed)

    def complete_steps(self) -> tuple[StepId, ...]:
        """Local steps that are known to be complete and not void, oldest first."""
        with self._changed:
            complete = self._table.complete
        return tuple(step for step in self.sealed_steps() if step in complete)

    def sealed(self, step: StepId) -> SealedSlot | None:
        """The sealed slot of `step`, if it is here and its layout is known."""
        with self._changed:
            index = self._table.find(step)
            manifest = self._manifests[index] if index is not None else None
            if index is None or manifest is None:
                return None
            return SealedSlot(index, manifest, self._layouts.get(manifest.layout), self._files[index].data)

    def saved_layout(self, layout_hash: str) -> Layout:
        """The layout that a holding names. Raises CorruptDataError for one that is not here."""
        return self._layouts.get(layout_hash)

    # Writing a step.

    def begin(self, step: StepId, timeout: timedelta, pins: int = 0) -> tuple[OpenSlot | None, str]:
        """Takes a slot for `step`, waiting up to `timeout` for one to become free.

        Returns the slot, or None and the reason why no slot may be overwritten. Raises LocalDirectoryError when
        the directory cannot be used, LocalCapacityError when slots have lost their memory; when this store is
        closed or was taken over by a newer manager of the process (`usable` tells), LocalDirectoryError too.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        with self._changed:
            self._check_usable()
            self._rebuild()
            while True:
                self._check_usable()
                failures = self._files.failures()
                table, index, reason = self._table.begin(step, pins, failures)
                if index is not None:
                    return self._take(index, step, table, reason)
                remaining = deadline - time.monotonic()
                if remaining <= 0 and failures:
                    raise LocalCapacityError(f"{step} finds no slot: {reason}")
                if remaining <= 0:
                    return None, reason
                self._changed.wait(remaining)

    def _take(self, index: int, step: StepId, table: SlotTable, reason: str) -> tuple[OpenSlot, str]:
        """Empties slot `index` and opens it; whatever interrupts this, table and manifests still agree."""
        before = self._table
        try:
            self._empty_for(index)
            self._update(table)
            self._files.prepare_rest()
            return OpenSlot(index, step, self._files[index]), reason
        except BaseException as error:
            path = self._manifest_path(index)
            if path is not None and path.exists():
                self._update(before)
            else:
                self._manifests[index] = None
                self._foreign.pop(index, None)
                self._update(before.empty(index))
            if isinstance(error, OSError):
                raise LocalDirectoryError(
                    f"slot {index} of {self.directory} cannot be used: {error}"
                ) from error
            raise

    def _empty_for(self, index: int) -> None:
        """Removes the manifest, ours or another run's, and gives the file the size of a slot of this layout."""
        if self.directory and (foreign := self._foreign.get(index)):
            evict(self.directory, self._numbers[index], foreign, self._log)
            del self._foreign[index]
        self._remove_manifest(index)
        self._files.fit(index)

    def seal(self, slot: OpenSlot, manifest: Manifest) -> None:
        """Puts the manifest of a completely written slot in place.

        Raises LocalDirectoryError once closed, and where the slot is not in the directory any more. A newer
        manager that takes the directory over waits for the slots that were begun before.
        """
        path = self._manifest_path(slot.index)
        with self._changed:
            self._check_open()
            table = self._table.seal(slot.index)
            if path:
                there = self._claim is not None and self._claim.is_current()
                if not there or slot.index in self._files.lost():
                    raise LocalDirectoryError(
                        f"{self.directory} was emptied or replaced while {slot.step} was written there. The "
                        "next save makes it anew; find out what empties it."
                    )
                write_manifest(path, manifest)
            self._manifests[slot.index] = manifest
            self._update(table)

    def discard(self, slot: OpenSlot, *, still_written: bool = False) -> None:
        """Gives up a slot that was begun and not sealed.

        Where somebody may still write to its memory, the slot gets other memory. Raises LocalDirectoryError
        where there is none; the slot is then given up all the same.
        """
        with self._changed:
            self._update(self._table.fail(slot.index))
            if still_written and self.usable:
                self._files.replace(slot.index)

    # What becomes of a step. Of a store that is closed or was taken over, these change the memory only.

    def settle(self, step: StepId, outcome: Outcome) -> None:
        """Learns the agreed outcome; the slot of an abandoned step is emptied."""
        with self._changed:
            self._update(self._table.settle(step, outcome))
            if step in self._table.abandoned:
                self.give_up(step)

    def give_up(self, step: StepId) -> None:
        """Empties the slot of `step`, if it is sealed here and not pinned."""
        with self._changed:
            index = self._table.find(step)
            if index is not None and not self._table.slots[index].pins:
                self._give_up_slot(index)

    def _give_up_slot(self, index: int) -> None:
        self._remove_manifest(index)
        self._update(self._table.empty(index))

    def delete(self, step: int) -> None:
        """Gives up and forgets the sealed steps of this number, of every generation.

        A pinned slot stays readable for whoever pinned it and is emptied at the last `unpin`.
        """
        with self._changed:
            for index, slot in enumerate(self._table.slots):
                if slot.step is None or slot.step.step != step or not slot.sealed:
                    continue
                if slot.pins:
                    self._gone.add(slot.step)
                    self._unlink_manifest(index)
                else:
                    self.give_up(slot.step)
            writing = {slot.step for slot in self._table.slots if not slot.sealed}
            known = self._table.complete | self._table.abandoned
            for saved in (s for s in known if s.step == step and s not in writing):
                self._update(self._table.forget(saved))

    def activate(self, activations: Iterable[Activation]) -> None:
        """Learns of restores that all processes hold; what they left behind no longer occupies slots."""
        with self._changed:
            for activation in activations:
                self._update(self._table.activate(activation))

    def pin(self, step: StepId) -> SealedSlot | None:
        """Keeps the slot of `step` from being overwritten until `unpin`; None where it is not sealed here.

        Raises LocalDirectoryError when this store is closed or was taken over.
        """
        with self._changed:
            self._check_usable()
            index = self._table.find(step)
            if index is None or step in self._gone:
                return None
            self._update(self._table.pin(index))
            return self.sealed(step)

    def unpin(self, index: int) -> None:
        with self._changed:
            self._update(self._table.unpin(index))
            slot = self._table.slots[index]
            if slot.step is None or slot.pins or not slot.sealed:
                return
            if slot.step in self._gone or slot.step in self._table.abandoned:
                self._gone.discard(slot.step)
                self._give_up_slot(index)

    def close(self) -> None:
        """Unmaps the slots and releases the directory; sealed data stays. Repeating it is fine.

        The files of slots that are still being written are removed: whoever writes there keeps the memory to
        himself, and the next owner of the directory gets fresh one.
        """
        with self._changed:
            if self._closed:
                return
            self._remove_unfinished()
            self._closed = True
            self._update(self._table)
        self._files.close()
        if self._claim:
            self._claim.release()

    def _remove_unfinished(self) -> None:
        if not self._owns_directory():
            return
        for index, slot in enumerate(self._table.slots):
            path = self._files.path(index)
            if path is not None and slot.step is not None and not slot.sealed:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    self._log(
                        f"{path} cannot be removed: {error.strerror}; the next start may find it half written"
                    )

    def _update(self, table: SlotTable) -> None:
        self._table = table
        if self._claim:
            # Once closed, nobody can seal any more, and a drain verifies what it reads.
            self._claim.count_unsettled(0 if self._closed else table.unsettled())
        else:
            self._changed.notify_all()

    @property
    def usable(self) -> bool:
        """Whether this store is neither closed nor taken over by a newer manager of the process."""
        return not self._closed and not (self._claim and self._claim.superseded)

    def _check_open(self) -> None:
        if self._closed:
            raise LocalDirectoryError(
                f"the store of slots in {self.directory or 'memory'} is closed: its manager was closed; "
                "use a newer one"
            )

    def _check_usable(self) -> None:
        self._check_open()
        if self._claim and self._claim.superseded:
            raise LocalDirectoryError(
                f"{self.directory} was taken over by a newer manager of this process; close this one"
            )

    # What somebody else did to the directory.

    def _owns_directory(self) -> bool:
        """Whether what lies in the directory is this store's to change. Raises LocalDirectoryError."""
        return self._claim is not None and self.usable and self._claim.is_current()

    def _notice_losses(self) -> None:
        """Makes the directory whole again as far as possible; what cannot be is said."""
        with self._changed:
            if self.usable:
                try:
                    self._rebuild()
                except LocalDirectoryError as error:
                    self._log(str(error))

    def _rebuild(self) -> None:
        """Notices what was removed under this store, says it, and makes it anew.

        Costs a few `stat` calls. Raises LocalDirectoryError where the directory cannot be made whole now; the
        next call tries again. What is lost does not count as held here, whatever is raised.
        """
        if self._claim is None:
            return
        claimed = self._claim.is_current()
        if not claimed:
            self._log(
                f"{self.directory} was emptied, replaced or taken away while this manager uses it; it is made "
                "anew. Find out who did that: the ramdisk must not be touched while a job runs."
            )
        lost = self._files.lost()
        try:
            if not claimed:
                self._claim.renew()
        except LocalDirectoryError:
            self._lose(range(len(self._files)))  # What still lies there is not this store's any more.
            raise
        self._lose(lost)
        for index in lost:
            if self._table.slots[index].step is None:
                self._make_anew(index)
        self._put_manifests_back()
        for name in self._layouts.write_missing():
            self._log(f"the layout {name} was removed from {self.directory} and is written again")

    def _make_anew(self, index: int) -> None:
        path = self._manifest_path(index)
        if path is not None and path.exists():
            self._log(f"{path} is not of this manager and is removed: another directory lies there now")
        self._unlink_manifest(index)
        self._files.replace(index)

    def _lose(self, indices: Iterable[int]) -> None:
        """The data of these slots is gone, but for those who read or write it now."""
        for index in indices:
            slot, manifest = self._table.slots[index], self._manifests[index]
            if slot.step is None or not slot.sealed or slot.step in self._gone:
                continue
            self._log(
                f"{slot.step} in slot {index} of {self.directory} is lost"
                + ("; a drain that reads it goes on" if slot.pins else "")
            )
            self._update(self._table.forget(slot.step))
            if manifest is not None and self._owns_directory():
                self._unlink_manifest(index)
            if slot.pins:
                self._gone.add(slot.step)
            else:
                self._manifests[index] = None
                self._update(self._table.empty(index))

    def _put_manifests_back(self) -> None:
        """A manifest that alone was removed is written again: its data is here, and so is what it said."""
        for index, manifest in enumerate(self._manifests):
            path = self._manifest_path(index)
            if path is None or path.exists():
                continue
            if index in self._foreign:
                del self._foreign[index]
                self._update(self._table.empty(index))
            elif manifest is not None and manifest.step not in self._gone and self._table.slots[index].sealed:
                write_manifest(path, manifest)
                self._log(
                    f"the manifest of {manifest.step} was removed from {self.directory} and is written again"
                )

    # Files.

    def _make_claim(self) -> Claim | None:
        options = self._options
        if options.directory is None:
            return None
        claim = claim_directory(
            options.directory,
            options.ordinal,
            self._log,
            run=self._run,
            lock_wait=options.lock_wait,
            takeover_wait=options.takeover_wait,
        )
        if warning := slow_warning(options.directory):
            self._log(warning)
        return claim

    def _find(self) -> tuple[Found, list[int]]:
        """What is in the directory, and the numbers of the slots to be used."""
        options = self._options
        if self.directory is None:
            return Found(), list(range(options.wanted_slots))
        found = find_slots(self.directory, self._run, self._layouts, options.foreign_run, self._log)
        numbers = make_room(
            self.directory, found, self._slot_bytes, options.wanted_slots, options.least_slots, self._log
        )
        return found, numbers

    def _manifest_path(self, index: int) -> Path | None:
        return manifest_path(self.directory, self._numbers[index]) if self.directory else None

    def _remove_manifest(self, index: int) -> None:
        self._unlink_manifest(index)
        self._manifests[index] = None

    def _unlink_manifest(self, index: int) -> None:
        """Raises LocalDirectoryError; does nothing where the directory is no longer this store's."""
        path = self._manifest_path(index)
        if path is None or not self._owns_directory():
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise LocalDirectoryError(
                f"cannot remove the manifest {path}: {error.strerror}. Check the owner of the local checkpoint "
                "directory and that it is not mounted read-only."
            ) from error


def held_positions(root: Path, run: str) -> dict[int, int | None]:
    """Per directory below `root`, the process index whose newest step of this run is in it. Takes no lock."""
    newest = {ordinal: newest_of_run(path, run) for ordinal, path in directories(root).items()}
    return {ordinal: manifest.position if manifest else None for ordinal, manifest in newest.items()}
