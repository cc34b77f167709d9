"""The default ramdisk of a job: a directory in memory that is gone with the job, whatever ends it.

A launcher holds a lock on its directory. A directory whose lock is free was left behind by a launcher that was
killed; the next one removes it, because it takes up memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "emergency-ckpt-ramdisk-"
_REMOVAL_ATTEMPTS = 100


@contextlib.contextmanager
def temporary_ramdisk(parent: Path | None = None) -> Iterator[Path]:
    """A fresh directory, removed at the end; in `parent`, or else in /dev/shm where the system has it."""
    parent = parent or _memory_directory()
    _remove_abandoned(parent)
    with contextlib.ExitStack() as cleanup:
        while (path := _claimed(parent, cleanup)) is None:
            pass
        try:
            yield path
        finally:
            remove_tree(path)


def remove_tree(path: Path) -> None:
    """Removes a directory in which an agent may still be at work: files that come or go meanwhile are no error.

    Raises the OSError of a file that cannot be removed, and FileNotFoundError when there is no such directory.
    """
    path.stat()
    for attempt in range(1, _REMOVAL_ATTEMPTS + 1):
        try:
            shutil.rmtree(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or attempt == _REMOVAL_ATTEMPTS:
                raise
            if not path.exists():
                return


def _claimed(parent: Path, cleanup: contextlib.ExitStack) -> Path | None:
    """A fresh directory whose lock is ours until the cleanup; None when another launcher was faster.

    Before the lock is ours, another launcher that starts just now may take it for an abandoned one.
    """
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    with contextlib.suppress(FileNotFoundError):
        fcntl.flock(cleanup.enter_context(_opened(path)), fcntl.LOCK_EX)
    return path if path.exists() else None


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        # Another launcher may remove it, or its own, at the same time; those of other users stay.
        with contextlib.suppress(FileNotFoundError, PermissionError, BlockingIOError), _opened(path) as lock:
            if os.fstat(lock).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(path)


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _memory_directory() -> Path:
    directory = Path("/dev/shm")
    usable = directory.is_dir() and os.access(directory, os.W_OK)
    return directory if usable else Path(tempfile.gettempdir())
