"""Verifying the sealed slots of one process: every block against its checksum, before anybody is told of it.

A shard that is bad is listed as missing in its slot's manifest before anything relies on it; the others go on
being held. A slot in which nothing is good, or whose files do not belong together, is given up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from emergency_ckpt.core.inventory import Holding
from emergency_ckpt.core.lineage import StepId, is_void
from emergency_ckpt.core.parts import part_digests
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import CorruptDataError, LocalDirectoryError
from emergency_ckpt.local.held_slots import HeldSlots
from emergency_ckpt.local.manifest import Manifest, write_manifest
from emergency_ckpt.local.slot_views import SealedSlot

_NAMED = 5


def verify_slots(held: HeldSlots) -> tuple[Holding, ...]:
    """See `LocalStore.verify`. Takes `changed` where it needs it: hashing takes seconds."""
    found = {i: holding for i in range(len(held.manifests)) if (holding := verify_slot(held, i)) is not None}
    for index, holding in list(found.items()):
        if index not in found:
            continue
        # In another cut it is no twin: the hosts may be at sealing a step anew, and each cut is needed then.
        twins = [i for i, other in found.items() if _cut(other) == _cut(holding) and i >= index]
        whole = [dataclasses.replace(found[i], missing=()) for i in twins]
        differ = any(twin != whole[0] for twin in whole)
        fullest = min(twins, key=lambda i: len(found[i].missing))
        for twin in twins:
            if differ or twin != fullest:
                _give_up(held, twin, holding.step, "another slot holds the same step")
                del found[twin]
    return tuple(found.values())


def _cut(holding: Holding) -> tuple[StepId, str, int]:
    return holding.step, holding.layout, holding.position


def verify_slot(held: HeldSlots, index: int) -> Holding | None:
    """What is good in one slot, whose step is neither void nor abandoned; None where nothing is."""
    with held.changed:
        manifest = held.manifests[index]
        sealed = held.table.slots[index].sealed
        if manifest is None or not sealed or manifest.step not in held.sealed_steps(listed_only=False):
            return None
    try:
        layout = held.layouts.get(manifest.layout)
        manifest.check_against(layout, held.files[index].nbytes)
        slot = SealedSlot(index, manifest, layout, held.files[index].data)
        bad = slot.find_all_damage()
    except CorruptDataError as error:
        _give_up(held, index, manifest.step, str(error))
        return None
    return _note_damage(held, slot, bad) if bad else _holding(slot)


def _note_damage(held: HeldSlots, slot: SealedSlot, bad: Collection[int]) -> Holding | None:
    index, step, where = slot.index, slot.manifest.step, f"in slot {slot.index} of {held.directory}"
    entries = slot.layout.slot_entries(slot.manifest.position)
    with held.changed:
        current = held.manifests[index]
        if current is None or current.step != step or not held.table.slots[index].sealed:
            return None  # It was given up meanwhile.
        missing = {*current.missing, *(place for place, entry in enumerate(entries) if entry.shard in bad)}
        if len(missing) == len(entries):
            _give_up(held, index, step, f"none of its {len(entries)} shards matches its checksums")
            return None
        verb = "is" if len(bad) == 1 else "are"
        names = [str(slot.layout.shards[shard]) for shard in sorted(bad)]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        held.log(
            f"{len(bad)} of {len(entries)} shards of {step} {where} {verb} damaged: "
            f"{', '.join(names[:_NAMED])}{more}. What is damaged counts as missing; the others stay usable."
        )
        partial = held.manifests[index] = current.with_missing(missing)
        held.doubt(step)
        _put_in_place(held, index, partial)
        return _holding(dataclasses.replace(slot, manifest=partial))


def _put_in_place(held: HeldSlots, index: int, manifest: Manifest) -> None:
    """Where this fails the damage is known in memory, and found again by whoever looks at the bytes."""
    path = held.manifest_path(index)
    try:
        if path is not None and manifest.step not in held.gone and held.owns_directory():
            write_manifest(path, manifest)
    except LocalDirectoryError as error:
        held.log(f"what is damaged in slot {index} could not be noted in its manifest: {error}")


def learn_restorable(held: HeldSlots, restorable: Collection[StepId]) -> None:
    """See `LocalStore.learn_restorable`. The caller holds `changed`."""
    if held.directory is None:
        return
    doubted, held.doubted = held.doubted, set()
    for step in sorted(doubted | held.table.complete):
        if is_void(step, held.table.activations):
            continue
        if step not in restorable:
            held.update(held.table.forget(step))
            held.give_up(step)
        elif step in doubted:
            held.update(held.table.settle(step, Outcome.COMPLETE))


def _give_up(held: HeldSlots, index: int, step: StepId, damage: str) -> None:
    with held.changed:
        held.log(f"{step} in slot {index} of {held.directory} is damaged and given up: {damage}")
        held.doubt(step)
        slot = held.table.slots[index]
        if slot.step == step and slot.sealed and not slot.in_use:
            held.give_up_slot(index)


def _holding(slot: SealedSlot) -> Holding:
    manifest = slot.manifest
    return Holding(
        manifest.step,
        manifest.layout,
        manifest.position,
        manifest.digest,
        tuple(sorted(manifest.extras)),
        slot.missing,
        part_digests(slot.layout, manifest.position, manifest.checksums, manifest.values),
    )
