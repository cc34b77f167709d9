"""Repair in place: the missing shards of a sealed slot are written, verified, and then counted as there.

A manifest only grows here, by atomic replacement after the bytes: a crash at any instruction leaves the slot
with at least the good shards that it had. Nothing but missing shards can be written, one repair at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from emergency_ckpt.core.checksums import first_bad_block
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import LocalDirectoryError
from emergency_ckpt.local.held_slots import HeldSlots
from emergency_ckpt.local.manifest import Manifest, write_manifest
from emergency_ckpt.local.pins import SlotPin, pin_slot
from emergency_ckpt.local.slot_views import SealedSlot


class RepairSlot:
    """A slot under repair. `shard` gives the memory of one missing shard; all of the rest is read-only.

    Threads may write different shards at once. Of a shard that was counted as there, nothing may be written any
    more, through no view that was handed out before.
    """

    def __init__(self, slot: SealedSlot, pin: SlotPin | None) -> None:
        self.index = slot.index
        self._slot = slot
        # Until the repair or the process ends, nobody who takes the directory over can write the slot anew.
        self._pin = pin
        self._open = True

    @property
    def layout(self) -> Layout:
        return self._slot.layout

    @property
    def manifest(self) -> Manifest:
        """What the slot holds by now."""
        return self._slot.manifest

    @property
    def missing(self) -> tuple[int, ...]:
        """Ascending indices into `layout.shards`, of the shards that are still missing."""
        return self._slot.missing

    @property
    def data(self) -> np.ndarray:
        """All of the slot, flat uint8, for reading."""
        data = self._slot.data.view()
        data.flags.writeable = False
        return data

    def shard(self, shard_index: int) -> np.ndarray:
        """Flat uint8 memory of a missing shard, to be written. Raises ValueError if it is not missing."""
        entry = self.layout.slot_entries(self.manifest.position)[self._place(shard_index)]
        return self._slot.data[entry.offset : entry.offset + entry.nbytes]

    def checksums(self, shard_index: int) -> tuple[int, ...]:
        """What the blocks of a missing shard must have."""
        return self.manifest.checksums[self._place(shard_index)]

    def seed(self, shard_index: int) -> int:
        return self._slot.seed(shard_index)

    def _place(self, shard_index: int) -> int:
        """The place of a missing shard among the entries."""
        if not self._open:
            raise ValueError(f"the repair of slot {self.index} has ended")
        slot = self._slot
        try:
            return slot.manifest.missing[slot.missing.index(shard_index)]
        except ValueError:
            raise ValueError(
                f"shard {shard_index} is not missing in slot {self.index}: only missing ones are repaired"
            ) from None


def begin_repair(held: HeldSlots, step: StepId, index: int | None = None) -> RepairSlot | None:
    """Takes the slot of `step` for a repair; see `LocalStore.begin_repair`. The caller holds `changed`."""
    held.check_usable()
    sealed = held.find_all(step)
    index = next(iter(sealed), None) if index is None else index
    if index is None or index not in sealed or step in held.gone or held.table.slots[index].repairing:
        return None
    slot = held.view(index)
    if slot is None or not slot.manifest.missing:
        return None
    pin = None
    if held.directory is not None:
        path = held.manifest_path(index)
        if path is None or not held.is_in_place(index):
            return None
        write_manifest(path, slot.manifest)  # Where it could not be when the damage was found.
        pin = pin_slot(held.directory, held.numbers[index], slot.manifest.run, step)
        if pin is None:
            return None
    held.update(held.table.begin_repair(index))
    return RepairSlot(slot, pin)


def repaired(
    held: HeldSlots, slot: RepairSlot, shards: Iterable[int], checksums: Mapping[int, tuple[int, ...]]
) -> tuple[int, ...]:
    """Counts written shards as there; see `LocalStore.repaired`. Takes `changed` where it needs it."""
    good: list[int] = []
    bad: list[int] = []
    expected = {shard: slot.checksums(shard) or checksums.get(shard, ()) for shard in dict.fromkeys(shards)}
    for shard in expected:
        wrong = first_bad_block(slot.shard(shard), expected[shard], slot.seed(shard))
        (good if wrong is None else bad).append(shard)
    with held.changed:
        held.check_open()
        done = {slot._place(shard) for shard in good}
        current = held.manifests[slot.index]
        assert current is not None  # Nobody gives up a slot under repair.
        known = current.with_checksums({slot._place(shard): expected[shard] for shard in good})
        manifest = known.with_missing(set(current.missing) - done)
        path = held.manifest_path(slot.index)
        if done and path is not None and manifest.step not in held.gone:
            if not held.is_in_place(slot.index):
                raise LocalDirectoryError(
                    f"{held.directory} was emptied or replaced while {manifest.step} was repaired there. The "
                    "next save makes it anew; find out what empties it."
                )
            write_manifest(path, manifest)
        held.manifests[slot.index] = manifest
        slot._slot = SealedSlot(slot.index, manifest, slot.layout, slot._slot.data)
    return tuple(sorted(bad))


def end_repair(held: HeldSlots, slot: RepairSlot) -> None:
    """Nobody writes into the slot any more; see `LocalStore.end_repair`. The caller holds `changed`."""
    if not slot._open:
        return
    slot._open = False
    if slot._pin is not None:
        slot._pin.close()
    held.update(held.table.end_repair(slot.index))
    held.left(slot.index)
