"""What lies in a claimed directory at start: manifests of this run and of others, and how many slots fit.

Nothing of another run, or of another version of this package, is touched unless its room is needed: a start
with a wrong run id or a wrong version must not cost the right one its newest steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import CorruptDataError, ForeignRunError, LocalDirectoryError
from emergency_ckpt.local.capacity import Room, measure_room, slots_that_fit
from emergency_ckpt.local.layout_files import LayoutFiles
from emergency_ckpt.local.manifest import Manifest, OtherFormatError, read_manifest

_SLOT_NAME = re.compile(r"slot_(0|[1-9]\d{0,3})\.(?:data|manifest|tmp)")


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A slot that this run cannot use: what is in it, in words, and the layout that belongs to it if known."""

    what: str
    layout: str | None


@dataclasses.dataclass
class Found:
    """Slots found in a directory, by slot number.

    Attributes:
      numbers: all slots of which there is any file.
      own: manifests of this run whose layout and size fit.
      foreign: what other runs and other versions of this package left.
      sizes: bytes of the slots in `own`, as their layouts say.
      promises: what the readable manifests of this run say was complete, usable or not.
    """

    numbers: set[int] = dataclasses.field(default_factory=set)
    own: dict[int, Manifest] = dataclasses.field(default_factory=dict)
    sizes: dict[int, int] = dataclasses.field(default_factory=dict)
    foreign: dict[int, Foreign] = dataclasses.field(default_factory=dict)
    promises: set[StepId] = dataclasses.field(default_factory=set)

    @property
    def foreign_layouts(self) -> set[str] | None:
        """The layouts that foreign slots need; None where that is not known."""
        layouts = {slot.layout for slot in self.foreign.values()}
        return None if None in layouts else {layout for layout in layouts if layout is not None}


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

    Raises ForeignRunError where a manifest of another run or format is found and `foreign_run` is 'error',
    LocalDirectoryError for what cannot be read or removed.
    """
    found = Found()
    try:
        _find_into(found, directory, run, layouts, foreign_run, log)
    except OSError as error:
        if isinstance(error, LocalDirectoryError):
            raise
        raise LocalDirectoryError(
            f"cannot tidy up {error.filename or directory}: {error.strerror}. Check the owner of the local "
            "checkpoint directory and that it is not mounted read-only."
        ) from error
    if found.foreign:
        held = "; ".join(f"slot {index}: {slot.what}" for index, slot in sorted(found.foreign.items()))
        log(
            f"{directory} holds steps that this run, {run}, does not use: {held}. They are kept until their "
            "room is needed. If this job should go on from them: for another run's, its persistent directory "
            "may have been emptied or replaced (the run's id lies there); for another format, start the "
            "version of this package that wrote them."
        )
    return found


def _find_into(
    found: Found,
    directory: Path,
    run: str,
    layouts: LayoutFiles,
    foreign_run: Literal["evict", "error"],
    log: Callable[[str], None],
) -> None:
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
                    found.sizes[index] = _checked_size(manifest, layouts, data_path(directory, index))
                    found.own[index] = manifest
                    continue
                foreign = Foreign(f"{manifest.step} of run {manifest.run}", manifest.layout)
            except OtherFormatError as error:
                foreign = Foreign(str(error), None)
                if error.run == run and error.step is not None:
                    found.promises.add(error.step)  # Nobody may start from scratch as if it were not there.
            except CorruptDataError as error:
                log(f"{error}")
                path.unlink()
                continue
            if foreign_run == "error":
                raise ForeignRunError(
                    f"{path} is not of this run, {run}: {foreign.what}. Empty the directory, choose another "
                    "local_checkpoint_directory, or set local_checkpoint_foreign_run=evict. If it is the same "
                    "job, its persistent directory may have been emptied or replaced (the run's id lies "
                    "there), or another version of this package was started before."
                )
            found.foreign[index] = foreign


def _checked_size(manifest: Manifest, layouts: LayoutFiles, data: Path) -> int:
    """Bytes of the slot as its layout says. Raises CorruptDataError where file and layout do not fit."""
    layout = layouts.get(manifest.layout)
    if not data.exists():
        raise CorruptDataError(f"{manifest.step} is lost: its manifest is in place, but {data} is gone")
    manifest.check_against(layout, data.stat().st_size)
    return layout.data_bytes(manifest.position)


def make_room(
    directory: Path,
    found: Found,
    slot_bytes: int,
    wanted: int,
    least: int,
    log: Callable[[str], None],
    measure: Callable[[Path], Room] = measure_room,
) -> list[int]:
    """The numbers of the slots that there will be, ascending, those of own steps among them.

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
    numbers = set(found.own)
    others = (number for number in itertools.count() if number not in found.own)
    numbers.update(itertools.islice(others, max(0, count - len(numbers))))
    for index in found.numbers:
        if index not in numbers and index not in found.own and index not in found.foreign:
            data_path(directory, index).unlink(missing_ok=True)
    growth = sum(max(0, slot_bytes - present.get(i, 0)) for i in numbers if i not in found.own)
    # Beyond the slots that will be used first, then those that occupy most.
    candidates = sorted(found.foreign, key=lambda i: (i not in numbers, present[i]), reverse=True)
    for index in candidates:
        if growth <= measure(directory).available:
            break
        if index in numbers and present[index] <= slot_bytes:
            continue  # It is counted as a slot's room already: evicting it frees nothing.
        evict(directory, index, found.foreign.pop(index), log)
        data_path(directory, index).unlink(missing_ok=True)
        if index in numbers:
            growth += min(slot_bytes, present[index])
    return sorted(numbers)


def evict(directory: Path, index: int, foreign: Foreign, log: Callable[[str], None]) -> None:
    """Removes a manifest that is not of this run, and says so."""
    log(f"evicting what is foreign from slot {index} of {directory}: {foreign.what}")
    manifest_path(directory, index).unlink(missing_ok=True)


def newest_of_run(directory: Path, run: str) -> Manifest | None:
    """The newest readable manifest of this run in a directory, which may be somebody else's."""
    return max((m for m, _ in sealed_of_run(directory, run)), key=lambda m: m.step, default=None)


def sealed_of_run(directory: Path, run: str) -> list[tuple[Manifest, int]]:
    """Every readable manifest of this run in a directory, and the bytes of its slot. Nothing is verified.

    Those that were written last come first: of a step in two cuts, that of the last job.
    """
    found: list[tuple[Manifest, int]] = []
    for path in sorted(directory.glob("slot_*.manifest"), key=_written, reverse=True):
        with contextlib.suppress(CorruptDataError, LocalDirectoryError):
            manifest = read_manifest(path)
            data = path.with_suffix(".data")
            if manifest and manifest.run == run:
                found.append((manifest, data.stat().st_size if data.exists() else 0))
    return found


def _written(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:  # It went at this moment.
        return 0, path.name


def _occupied(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.exists() else 0
