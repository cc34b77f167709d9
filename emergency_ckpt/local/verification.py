"""Verifying the sealed slots of one process: every block against its checksum, before anybody is told of it."""

from __future__ import annotations

from emergency_ckpt.core.inventory import Holding
from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.local.held_slots import HeldSlots
from emergency_ckpt.local.slot_views import SealedSlot


def verify_slots(held: HeldSlots) -> tuple[Holding, ...]:
    """One holding per good slot of a known layout whose step is neither void nor abandoned.

    Damaged ones are emptied, and said. Takes `changed` where it needs it: hashing takes seconds.
    """
    good: dict[int, Holding] = {}
    for index, manifest in enumerate(held.manifests):
        with held.changed:
            slot, steps = held.table.slots[index], held.sealed_steps(listed_only=False)
        if manifest is None or not slot.sealed or manifest.step not in steps:
            continue
        if damage := _find_damage(held, index):
            _give_up_damaged(held, index, damage)
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
            _give_up_damaged(held, twin, "another slot says that it holds the same step")
            del good[twin]
    return tuple(good.values())


def _give_up_damaged(held: HeldSlots, index: int, damage: str) -> None:
    with held.changed:
        step = held.table.slots[index].step
        held.log(f"{step} in slot {index} of {held.directory} is damaged and given up: {damage}")
        if held.table.slots[index].pins == 0:
            held.give_up_slot(index)


def _find_damage(held: HeldSlots, index: int) -> str | None:
    manifest = held.manifests[index]
    assert manifest is not None
    try:
        layout = held.layouts.get(manifest.layout)
        manifest.check_against(layout, held.files[index].nbytes)
        return SealedSlot(index, manifest, layout, held.files[index].data).find_damage()
    except CorruptDataError as error:
        return str(error)
