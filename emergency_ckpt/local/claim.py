"""Claiming a directory on the ramdisk: by lock and local ordinal, never by process index.

A process index may move to another host between two lives of a job; what lies in a directory is told by the
manifests in it. The lock dies with its holder.
"""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

from emergency_ckpt.errors import LocalDirectoryError

SUBDIRECTORY = "emergency_ckpt"
_MAX_ORDINALS = 256
_held_here: dict[Path, Claim] = {}
_guard = threading.Lock()


class Claim:
    """A directory that this process owns until `release`."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self.superseded = False

    def release(self) -> None:
        """Gives the directory back, unless a newer manager of this process has taken it over."""
        with _guard:
            if _held_here.get(self.path) is self:
                del _held_here[self.path]
                os.close(self._fd)


def claim_directory(root: Path) -> Claim:
    """Claims the first free directory below `root` (one per process on this host).

    A directory that this very process holds already is handed over: the manager that held it before may not
    save any more. Raises LocalDirectoryError when `root` is missing or not writable.
    """
    if not root.is_dir():
        raise LocalDirectoryError(
            f"the local checkpoint directory {root} does not exist. Mount the ramdisk there (or create the "
            "directory) before the job starts, or correct local_checkpoint_directory."
        )
    base = root.resolve() / SUBDIRECTORY
    with _guard:
        for path, claim in list(_held_here.items()):
            if path.parent == base:
                claim.superseded = True
                taken = Claim(path, claim._fd)
                _held_here[path] = taken
                return taken
        for ordinal in range(_MAX_ORDINALS):
            path = base / str(ordinal)
            fd = _try_lock(path)
            if fd is not None:
                _held_here[path] = Claim(path, fd)
                return _held_here[path]
    raise LocalDirectoryError(f"{_MAX_ORDINALS} processes hold directories below {base} already")


def _try_lock(path: Path) -> int | None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LocalDirectoryError(
            f"cannot write below the local checkpoint directory {path.parent.parent}: {error.strerror}. "
            "Check its owner and that it is not mounted read-only."
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd
