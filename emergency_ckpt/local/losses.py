"""What somebody else did to the directory: noticed, said, and made good as far as possible.

What is lost does not count as held, nor as a reason to overwrite older steps; whoever reads it reads on. The
caller holds the slots' `changed`.
"""

from __future__ import annotations

from collections.abc import Iterable

from emergency_ckpt.errors import LocalDirectoryError
from emergency_ckpt.local.held_slots import HeldSlots
from emergency_ckpt.local.manifest import write_manifest


def notice_losses(held: HeldSlots) -> None:
    """Makes the directory whole again as far as possible; what cannot be is said."""
    if held.usable:
        try:
            rebuild(held)
        except LocalDirectoryError as error:
            held.log(str(error))


def rebuild(held: HeldSlots) -> None:
    """Notices what was removed under these slots, says it, and makes it anew.

    Costs a few `stat` calls. Raises LocalDirectoryError where the directory cannot be made whole now; the
    next call tries again. What is lost does not count as held here, whatever is raised.
    """
    if held.claim is None:
        return
    claimed = held.claim.is_current()
    if not claimed:
        held.log(
            f"{held.directory} was emptied, replaced or taken away while this manager uses it; it is made "
            "anew. Find out who did that: the ramdisk must not be touched while a job runs."
        )
    lost = held.files.lost()
    try:
        if not claimed:
            held.claim.renew()
    except LocalDirectoryError:
        _lose(held, range(len(held.files)))  # What still lies there is not this process's any more.
        raise
    _lose(held, lost)
    for index in lost:
        if held.table.slots[index].step is None:
            _make_anew(held, index)
    _put_manifests_back(held)
    for name in held.layouts.write_missing():
        held.log(f"the layout {name} was removed from {held.directory} and is written again")


def _make_anew(held: HeldSlots, index: int) -> None:
    path = held.manifest_path(index)
    if path is not None and path.exists():
        held.log(f"{path} is not of this manager and is removed: another directory lies there now")
    held.unlink_manifest(index)
    held.files.replace(index)


def _lose(held: HeldSlots, indices: Iterable[int]) -> None:
    """The data of these slots is gone, but for those who read or write it now."""
    for index in indices:
        slot, manifest = held.table.slots[index], held.manifests[index]
        if slot.step is None or not slot.sealed or slot.step in held.gone:
            continue
        held.log(
            f"{slot.step} in slot {index} of {held.directory} is lost"
            + ("; a drain that reads it goes on" if slot.pins else "")
        )
        held.update(held.table.forget(slot.step))
        if manifest is not None and held.owns_directory():
            held.unlink_manifest(index)
        if slot.in_use:
            held.gone.add(slot.step)
        else:
            held.manifests[index] = None
            held.update(held.table.empty(index))


def _put_manifests_back(held: HeldSlots) -> None:
    """A manifest that alone was removed is written again: its data is here, and so is what it said."""
    for index, manifest in enumerate(held.manifests):
        path = held.manifest_path(index)
        if path is None or path.exists():
            continue
        if index in held.foreign:
            del held.foreign[index]
            held.update(held.table.empty(index))
        elif manifest is not None and manifest.step not in held.gone and held.table.slots[index].sealed:
            write_manifest(path, manifest)
            held.log(f"the manifest of {manifest.step} was removed from {held.directory} and is written again")
