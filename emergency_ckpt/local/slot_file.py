"""Slot files: preallocated memory that is mapped once and recycled for step after step.

Copying into pages that were touched before is an order of magnitude faster than into fresh ones, so a slot
file is never truncated or replaced while its size fits. Without a ramdisk, a memfd takes the file's place.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np

from emergency_ckpt.errors import LocalCapacityError, LocalDirectoryError

_CHUNK_BYTES = 32 * 1024 * 1024
_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)


class SlotFile:
    """One slot's memory: `data` is a flat uint8 view of the mapped file.

    The pages are allocated by `prepare`, which the owner runs in the background; `wait_ready` must have
    returned before the first write, because writing to an unallocated page of a full tmpfs kills the process.
    """

    def __init__(self, path: Path | None, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._error: Exception | None = None
        size = max(nbytes, mmap.PAGESIZE)
        try:
            self._fd = _open(path, size)
        except OSError as error:
            raise LocalDirectoryError(
                f"cannot open the slot file {path}: {error.strerror}. "
                "Check that local_checkpoint_directory exists and is writable for this user."
            ) from error
        self._map = mmap.mmap(self._fd, size)
        self._data: np.ndarray | None = np.frombuffer(self._map, dtype=np.uint8, count=size)[:nbytes]

    @property
    def data(self) -> np.ndarray:
        """Raises LocalDirectoryError once the slot is closed."""
        if self._data is None:
            raise LocalDirectoryError(f"slot {self.path} is closed: its manager was closed; use a newer one")
        return self._data

    def prepare(self) -> None:
        """Allocates and maps every page, releasing the GIL; keeps the content. One thread calls this once."""
        try:
            for at in range(0, self.nbytes, _CHUNK_BYTES):
                if self._stop.is_set():
                    raise LocalDirectoryError(f"slot file {self.path} was closed while it was being prepared")
                length = min(_CHUNK_BYTES, self.nbytes - at)
                os.posix_fallocate(self._fd, at, length)
                _populate(self.data, at, length)
        except OSError as error:
            if isinstance(error, LocalDirectoryError):
                self._error = error
            else:
                self._error = LocalCapacityError(
                    f"the ramdisk ran full while slot {self.path} ({self.nbytes} bytes) was being allocated: "
                    f"{error.strerror}. Something else writes there, or its size is too small."
                )
        finally:
            self._ready.set()

    def wait_ready(self, timeout: timedelta) -> None:
        """Waits until `prepare` is done; raises what it met, or LocalDirectoryError after the limit."""
        if not self._ready.wait(timeout.total_seconds()):
            raise LocalDirectoryError(
                f"slot {self.path} was not allocated within {timeout.total_seconds():.0f} s; the machine is "
                "short of memory or very slow"
            )
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Unmaps the slot. Views that are still alive keep the mapping until they go. Repeating it is fine."""
        if self._data is None:
            return
        self._stop.set()
        self._ready.wait()
        self._data = None
        with contextlib.suppress(BufferError):  # A reader still holds a view: the mapping goes with it.
            self._map.close()
        os.close(self._fd)


def _open(path: Path | None, size: int) -> int:
    if path is None:
        fd = os.memfd_create("emergency_ckpt_slot", os.MFD_CLOEXEC)
    else:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if os.fstat(fd).st_size != size:
        os.ftruncate(fd, size)
    return fd


def _populate(data: np.ndarray, at: int, length: int) -> None:
    """Maps the pages of `data[at:at+length]` for writing without changing them.

    Called through ctypes, which releases the GIL; `mmap.madvise` would hold it for seconds. A kernel that does
    not know the call (before 5.14) faults the pages at the first write instead.
    """
    address = data.ctypes.data + at
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)
