"""Slot files: preallocated memory that is mapped once and recycled for step after step.

Copying into pages that were touched before is an order of magnitude faster than into fresh ones, so a slot
file is never truncated or replaced while its size fits. Without a ramdisk, a memfd takes the file's place.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np

from emergency_ckpt.errors import LocalCapacityError, LocalDirectoryError
from emergency_ckpt.local.capacity import memory_limit_room
from emergency_ckpt.local.file_system import IN_MEMORY, file_system_type

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
        self._error: LocalDirectoryError | None = None
        # Held for one step of `prepare` at a time, so that `close` waits for no more than that.
        self._guard = threading.Lock()
        self._map_bytes = size = max(nbytes, mmap.PAGESIZE)
        try:
            self._fd = _open(path, size)
        except OSError as error:
            raise LocalDirectoryError(
                f"cannot open the slot file {path}: {error.strerror}. "
                "Check that local_checkpoint_directory exists and is writable for this user."
            ) from error
        try:
            self._map = mmap.mmap(self._fd, size)
        except OSError as error:
            os.close(self._fd)
            raise LocalDirectoryError(f"cannot map the slot file {path}: {error.strerror}") from error
        self._data: np.ndarray | None = np.frombuffer(self._map, dtype=np.uint8, count=size)[:nbytes]

    @property
    def data(self) -> np.ndarray:
        """Raises LocalDirectoryError once the slot is closed."""
        if self._data is None:
            raise self._closed_error()
        return self._data

    @property
    def failure(self) -> str | None:
        """Why this slot has no memory, once `prepare` has failed."""
        return str(self._error) if self._error else None

    def is_lost(self) -> bool:
        """Whether the file is no longer at its path, or was cut: what is written here is not found there.

        Raises OSError where that cannot be told.
        """
        if self.path is None:
            return False
        try:
            there = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return True
        own = os.fstat(self._fd)
        return (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino) or own.st_size < self._map_bytes

    def lock(self) -> bool:
        """Locks the file against other processes that would pin it; False where one has (see `local.pins`)."""
        return self.path is None or try_lock(self._fd)

    def unlock(self) -> None:
        """Explicitly, because a forked child would keep the lock. Fine without `lock`, and after `close`."""
        if self.path is not None and self._data is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def prepare(self) -> None:
        """Allocates and maps every page, releasing the GIL; keeps the content. After a failure, tries again."""
        try:
            self._check_memory_limit()
            for at in range(0, self.nbytes, _CHUNK_BYTES):
                length = min(_CHUNK_BYTES, self.nbytes - at)
                with self._guard:
                    data = self.data
                    os.posix_fallocate(self._fd, at, length)
                    _populate(data, at, length)
            self._error = None
        except LocalDirectoryError as error:
            self._error = error
        except OSError as error:
            self._error = LocalCapacityError(
                f"the ramdisk ran full while slot {self.path} ({self.nbytes} bytes) was being allocated: "
                f"{error.strerror}. Something else writes there, or its size is too small."
            )
        finally:
            self._ready.set()

    def try_again(self) -> None:
        """After a failure: whoever waits for this slot waits for the `prepare` that the owner starts now."""
        self._error = None
        self._ready.clear()

    def missing_bytes(self) -> int:
        """Bytes of this file that occupy no memory yet."""
        with self._guard:
            return 0 if self._data is None else max(0, self.nbytes - os.fstat(self._fd).st_blocks * 512)

    def _check_memory_limit(self) -> None:
        """The kernel refuses pages beyond the size of a tmpfs, but kills for those beyond a memory limit."""
        on_disk = self.path is not None and file_system_type(self.path.parent) not in (*IN_MEMORY, None)
        room = None if on_disk else memory_limit_room()
        missing = self.missing_bytes()
        if room is not None and missing > room:
            raise LocalCapacityError(
                f"the memory limit of this container has room for {room} bytes, slot "
                f"{self.path or 'in memory'} needs {missing} more. Raise the limit: pages of a ramdisk count "
                "against it."
            )

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
        with self._guard:
            if self._data is None:
                return
            self._data = None
            if not self._ready.is_set():
                self._error = self._closed_error()
                self._ready.set()
            with contextlib.suppress(BufferError):  # A reader still holds a view: the mapping goes with it.
                self._map.close()
            os.close(self._fd)

    def _closed_error(self) -> LocalDirectoryError:
        return LocalDirectoryError(f"slot {self.path} is closed: its manager was closed; use a newer one")


def _open(path: Path | None, size: int) -> int:
    if path is None:
        fd = os.memfd_create("emergency_ckpt_slot", os.MFD_CLOEXEC)
    else:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        found = os.fstat(fd).st_size
        # A file that another process reads is never cut under it; a longer one serves as well.
        if found < size or (found > size and try_lock(fd)):
            os.ftruncate(fd, size)
            fcntl.flock(fd, fcntl.LOCK_UN)
    except OSError:
        os.close(fd)
        raise
    return fd


def try_lock(fd: int) -> bool:
    """Takes the exclusive lock of a file without waiting; False where somebody else has one."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _populate(data: np.ndarray, at: int, length: int) -> None:
    """Maps the pages of `data[at:at+length]` for writing without changing them.

    Called through ctypes, which releases the GIL; `mmap.madvise` would hold it for seconds. A kernel that does
    not know the call (before 5.14) faults the pages at the first write instead.
    """
    address = data.ctypes.data + at
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)
