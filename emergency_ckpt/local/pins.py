"""Pins: a process that does not own a directory keeps one of its slots from being overwritten, to drain it.

A pin is a shared lock on the slot's data file, so it dies with its holder. The owner takes the exclusive lock
before it removes a manifest to write the slot anew; whoever has the shared lock and then finds the manifest has
the bytes that the manifest names, for as long as he keeps the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
from pathlib import Path
from types import TracebackType

import numpy as np

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import CorruptDataError, LocalDirectoryError
from emergency_ckpt.local.manifest import Manifest, read_manifest
from emergency_ckpt.local.recovery import data_path, manifest_path
from emergency_ckpt.local.slot_views import SealedSlot


class SlotPin:
    """A pinned slot, until `close` or the end of the process.

    The owner may still give the step up, which removes the manifest, and repair shards that are missing; the
    bytes that `manifest` vouches for stay.
    """

    def __init__(self, number: int, manifest: Manifest, fd: int) -> None:
        self.number = number
        self.manifest = manifest
        self._fd: int | None = fd
        self._map: mmap.mmap | None = None

    def open(self, layout: Layout) -> SealedSlot:
        """The slot for reading; `layout` is the one that the manifest names, `index` is the slot's number.

        Raises CorruptDataError where file, manifest and layout do not belong together.
        """
        if self._fd is None:
            raise LocalDirectoryError(f"the pin of slot {self.number} is closed; pin it again")
        nbytes = os.fstat(self._fd).st_size
        self.manifest.check_against(layout, nbytes)
        if self._map is None:
            self._map = mmap.mmap(self._fd, nbytes, prot=mmap.PROT_READ)
        return SealedSlot(self.number, self.manifest, layout, np.frombuffer(self._map, np.uint8))

    def close(self) -> None:
        """Lets the owner overwrite the slot. Repeating it is fine. Views that are left read on, unprotected."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        if self._map is not None:
            with contextlib.suppress(BufferError):  # A reader still holds a view: the mapping goes with it.
                self._map.close()
        fcntl.flock(fd, fcntl.LOCK_UN)  # A child that was forked meanwhile would keep it.
        os.close(fd)

    def __enter__(self) -> SlotPin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pin_slot(directory: Path, number: int, run: str, step: StepId) -> SlotPin | None:
    """Pins slot `number` of a claimed directory if `step` of `run` is sealed in it; None otherwise.

    Any process may call it. It never waits: None also where the owner is about to overwrite the slot. Raises
    LocalDirectoryError for files that cannot be read.
    """
    path = data_path(directory, number)
    if not _holds(directory, number, run, step):
        return None  # Found out before anything is locked, so that nobody is disturbed in vain.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LocalDirectoryError(
            f"cannot open the slot file {path}: {error.strerror}. Drains run as the user that trains."
        ) from error
    try:
        manifest = _locked(fd, path) and _holds(directory, number, run, step)
        if manifest:
            pin, fd = SlotPin(number, manifest, fd), -1
            return pin
        return None
    finally:
        if fd >= 0:
            os.close(fd)


def _locked(fd: int, path: Path) -> bool:
    """Takes the shared lock; False where the owner has his, or another file lies at `path` by now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        there = os.stat(path)
    except (BlockingIOError, FileNotFoundError):
        return False
    own = os.fstat(fd)
    return stat.S_ISREG(own.st_mode) and (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def _holds(directory: Path, number: int, run: str, step: StepId) -> Manifest | None:
    try:
        manifest = read_manifest(manifest_path(directory, number))
    except CorruptDataError:
        return None
    return manifest if manifest and manifest.run == run and manifest.step == step else None
