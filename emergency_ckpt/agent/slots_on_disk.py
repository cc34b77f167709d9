"""What an agent finds on its ramdisk: sealed slots by id, layouts by hash. It takes no lock and pins nothing.

Everything is told from the files as they lie there now. What is remembered of a manifest is bound to its inode,
time and size; whoever reads a slot's bytes asks `is_current` afterwards, and the reader verifies in any case.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import threading
from pathlib import Path

from emergency_ckpt.agent.slot_id import SlotId
from emergency_ckpt.core.layout import Layout, SlotPlaces
from emergency_ckpt.errors import CorruptDataError, LocalDirectoryError
from emergency_ckpt.local.claim import directories
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.recovery import data_path
from emergency_ckpt.local.small_files import read_file

MAX_MANIFEST_BYTES = 256 * 1024 * 1024
MAX_LAYOUT_BYTES = 1024 * 1024 * 1024
_MANIFEST_NAME = re.compile(r"slot_(0|[1-9]\d{0,3})\.manifest")
_KEPT_TABLES = 8

# A listing of a directory may leave out a file that is being replaced at that moment.
_LOOKS = 3
_Stamp = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class SlotOnDisk:
    """A sealed slot, as its manifest says; its data is not verified here.

    `bytes` is the size of its data file, `stamp` tells this very manifest file from a later one,
    `missing` counts the shards that are not good, `extras_of` are the processes whose extras are kept with it.
    """

    id: SlotId
    nonce: str
    digest: str
    listed: bool
    bytes: int
    manifest: Path
    data: Path
    stamp: _Stamp
    missing: int
    extras_of: tuple[int, ...]

    def is_current(self) -> bool:
        """Whether the slot has not been taken for another step.

        Its manifest may have been replaced meanwhile by one that says that fewer, or more, shards are missing.
        """
        stamp = _stamp_of(self.manifest)
        if stamp is None or stamp == self.stamp:
            return stamp is not None
        now = _read_slot(self.manifest, self.data, stamp)
        return now is not None and (now.id, now.nonce) == (self.id, self.nonce)


class SlotsOnDisk:
    """The slots below one ramdisk directory. Safe to use from any thread; calls may read large files."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._guard = threading.Lock()
        self._known: dict[Path, tuple[_Stamp, SlotOnDisk | None]] = {}
        self._places: collections.OrderedDict[tuple[str, int], SlotPlaces] = collections.OrderedDict()

    def all(self) -> list[SlotOnDisk]:
        """Every slot with a readable manifest."""
        with self._guard:
            return self._scan()

    def find(self, wanted: SlotId) -> SlotOnDisk | None:
        """The slot of this id, None where it is not here (any more)."""
        for _ in range(_LOOKS):
            slot = next((slot for slot in self.all() if slot.id == wanted), None)
            if slot is not None:
                return slot
        return None

    def manifest_bytes(self, slot: SlotOnDisk) -> bytes | None:
        """The manifest of a slot as it lies there; None where it went meanwhile."""
        try:
            data = read_file(slot.manifest, "manifest", MAX_MANIFEST_BYTES)
        except (LocalDirectoryError, CorruptDataError):
            return None
        return data if slot.is_current() else None

    def layout_bytes(self, layout_hash: str) -> bytes | None:
        """The file of a layout, unchecked: whoever reads it compares its hash. None where it is not here."""
        for directory in self._directories():
            for name in _names(directory):
                if name != f"layout_{layout_hash}.json":
                    continue
                try:
                    data = read_file(directory / name, "layout", MAX_LAYOUT_BYTES)
                except (LocalDirectoryError, CorruptDataError):
                    continue
                if data is not None:
                    return data
        return None

    def places(self, slot: SlotOnDisk) -> SlotPlaces | None:
        """Where each shard lies in the data of a slot; None where its layout is missing or does not fit."""
        key = (slot.id.layout, slot.id.position)
        with self._guard:
            found = self._places.get(key)
            if found is None:
                found = self._read_places(*key)
                if found is None:
                    return None
                self._places[key] = found
                if len(self._places) > _KEPT_TABLES:
                    self._places.popitem(last=False)
            self._places.move_to_end(key)
        needed = int((found.offsets + found.sizes).max(initial=0))
        return found if needed <= slot.bytes else None

    def _read_places(self, layout_hash: str, position: int) -> SlotPlaces | None:
        data = self.layout_bytes(layout_hash)
        if data is None:
            return None
        try:
            layout = Layout.from_bytes(data)
        except CorruptDataError:
            return None
        if layout.hash != layout_hash or position >= layout.process_count:
            return None
        return layout.slot_places(position)

    def _scan(self) -> list[SlotOnDisk]:
        found: dict[Path, tuple[_Stamp, SlotOnDisk | None]] = {}
        for directory in self._directories():
            for name in _names(directory):
                number = _MANIFEST_NAME.fullmatch(name)
                path = directory / name
                stamp = _stamp_of(path) if number else None
                if number is None or stamp is None:
                    continue
                known = self._known.get(path)
                if known is None or known[0] != stamp:
                    known = (stamp, _read_slot(path, data_path(directory, int(number[1])), stamp))
                found[path] = known
        self._known = found
        return [slot for _, slot in found.values() if slot is not None]

    def _directories(self) -> list[Path]:
        try:
            return [path for _, path in sorted(directories(self._root).items())]
        except OSError:  # Taken away at this moment.
            return []


def _read_slot(path: Path, data: Path, stamp: _Stamp) -> SlotOnDisk | None:
    """What a manifest says; None for one that is damaged, of another version, or gone."""
    try:
        content = read_file(path, "manifest", MAX_MANIFEST_BYTES)
        if content is None:
            return None
        manifest = Manifest.from_bytes(content, str(path))
        slot_id = SlotId(manifest.run, manifest.step, manifest.layout, manifest.position)
        nbytes = os.stat(data).st_size
    except (CorruptDataError, LocalDirectoryError, ValueError, OSError):
        return None
    return SlotOnDisk(
        id=slot_id,
        nonce=manifest.nonce,
        digest=manifest.digest,
        listed=manifest.listed,
        bytes=nbytes,
        manifest=path,
        data=data,
        stamp=stamp,
        missing=len(manifest.missing),
        extras_of=tuple(sorted(manifest.extras)),
    )


def _stamp_of(path: Path) -> _Stamp | None:
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []
