"""What lies in a claimed directory at start: manifests of this run and of others, and how many slots fit.

Nothing of another run is touched unless its room is needed: a start with a wrong run id must not cost the right
run its newest steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import CorruptDataError, ForeignRunError
from emergency_ckpt.local.capacity import Room, measure_room, slots_that_fit
from emergency_ckpt.local.layout_files import LayoutFiles
from emergency_ckpt.local.manifest import Manifest, read_manifest

_SLOT_NAME = re.compile(r"slot_(\d+)\.(?:data|manifest|tmp)")


@dataclasses.dataclass
class Found:
    """Slots found in a directory, by slot number.

    Attributes:
      numbers: all slots of which there is any file.
      own: manifests of this run. foreign: manifests of other runs.
      promises: what the readable manifests of this run say was complete, usable or not.
    """

    numbers: set[int] = dataclasses.field(default_factory=set)
    own: dict[int, Manifest] = dataclasses.field(default_factory=dict)
    foreign: dict[int, Manifest] = dataclasses.field(default_factory=dict)
    promises: set[StepId] = dataclasses.field(default_factory=set)


def data_path(directory: Path, index: int) -> Path:
    return directory / f"slot_{index}.data"


def manifest_path(directory: Path, index: int) -> Path:
    return directory / f"slot_{index}.manifest"


def find_slots(
    directory: Path,
    run: str,
    layouts: LayoutFiles,
    foreign_run: Literal["evict", "error"],
    log: Callable[[str], None],
) -> Found:
    """Reads all manifests; removes damaged ones and what a crash left half written.

    Raises ForeignRunError where another run's manifest is found and `foreign_run` is 'error'.
    """
    found = Found()
    for path in sorted(directory.iterdir()):
        name = _SLOT_NAME.fullmatch(path.name)
        if not name:
            continue
        index = int(name[1])
        found.numbers.add(index)
        if path.suffix == ".tmp":
            path.unlink()
        elif path.suffix == ".manifest":
            try:
                manifest = read_manifest(path)
                if manifest is None:
                    continue
                if manifest.run == run:
                    if manifest.promised:
                        found.promises.add(manifest.promised)
                    layouts.get(manifest.layout)
                    found.own[index] = manifest
                    continue
            except CorruptDataError as error:
                log(f"{error}")
                path.unlink()
                continue
            if foreign_run == "error":
                raise ForeignRunError(
                    f"{path} belongs to run {manifest.run}, this run is {run}. Empty the directory, choose "
                    "another local_checkpoint_directory, or set local_checkpoint_foreign_run=evict."
                )
            found.foreign[index] = manifest
    return found


def make_room(
    directory: Path,
    found: Found,
    slot_bytes: int,
    wanted: int,
    least: int,
    log: Callable[[str], None],
    measure: Callable[[Path], Room] = measure_room,
) -> int:
    """How many slots there will be, those of own steps included.

    Removes what is in their way, other runs' steps last and only as far as needed.

    Raises LocalCapacityError.
    """
    present = {i: _occupied(data_path(directory, i)) for i in found.numbers}
    count = slots_that_fit(measure(directory), slot_bytes, sum(present.values()), wanted, least, directory)
    if count < wanted:
        log(
            f"the ramdisk has room for {count} slots of {slot_bytes} bytes instead of {wanted}: a save waits "
            "while the slot it needs is drained"
        )
    count = max(count, 1 + max(found.own, default=-1))
    for index in found.numbers:
        if index >= count and index not in found.own and index not in found.foreign:
            data_path(directory, index).unlink(missing_ok=True)
    growth = sum(max(0, slot_bytes - present.get(i, 0)) for i in range(count) if i not in found.own)
    # Beyond the slots that will be used first, then those that occupy most.
    candidates = sorted(found.foreign, key=lambda i: (i >= count, present[i]), reverse=True)
    for index in candidates:
        if growth <= measure(directory).available:
            break
        if index < count and present[index] <= slot_bytes:
            continue  # It is counted as a slot's room already: evicting it frees nothing.
        evict(directory, index, found.foreign.pop(index), log)
        data_path(directory, index).unlink(missing_ok=True)
        if index < count:
            growth += min(slot_bytes, present[index])
    return count


def evict(directory: Path, index: int, manifest: Manifest, log: Callable[[str], None]) -> None:
    """Removes another run's manifest, and says so."""
    log(f"evicting {manifest.step} of the foreign run {manifest.run} from slot {index} of {directory}")
    manifest_path(directory, index).unlink(missing_ok=True)


def newest_of_run(directory: Path, run: str) -> Manifest | None:
    """The newest readable manifest of this run in a directory, which may be somebody else's."""
    newest: Manifest | None = None
    for candidate in directory.glob("slot_*.manifest"):
        with contextlib.suppress(CorruptDataError):
            manifest = read_manifest(candidate)
            if manifest and manifest.run == run and (newest is None or manifest.step > newest.step):
                newest = manifest
    return newest


def _occupied(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.exists() else 0
