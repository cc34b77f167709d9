"""Claiming a directory on the ramdisk: by lock and local ordinal, never by process index.

A process index may move to another host between two lives of a job; what lies in a directory is told by the
manifests in it. The lock dies with its holder.
"""

from __future__ import annotations

import fcntl
import os
import socket
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


def claim_directory(root: Path, preferred: int = 0) -> Claim:
    """Claims one directory below `root` for this process: ordinal `preferred`, or the first free one.

    A directory that this very process holds already is handed over: the manager that held it before may not
    save any more. Raises LocalDirectoryError when `root` is missing or not writable.
    """
    check_root(root)
    base = root.resolve() / SUBDIRECTORY
    with _guard:
        for path, claim in list(_held_here.items()):
            if path.parent == base:
                claim.superseded = True
                taken = Claim(path, claim._fd)
                _held_here[path] = taken
                return taken
        for ordinal in (preferred, *range(_MAX_ORDINALS)):
            path = base / str(ordinal)
            fd = _try_lock(path)
            if fd is not None:
                _held_here[path] = Claim(path, fd)
                return _held_here[path]
    raise LocalDirectoryError(f"{_MAX_ORDINALS} processes hold directories below {base} already")


def check_root(root: Path) -> None:
    """Raises LocalDirectoryError unless the ramdisk directory is there."""
    if not root.is_dir():
        raise LocalDirectoryError(
            f"the local checkpoint directory {root} does not exist. Mount the ramdisk there (or create the "
            "directory) before the job starts, or correct local_checkpoint_directory."
        )


def directory_identity(root: Path) -> str:
    """The same for all processes that share this very directory, and for no others."""
    check_root(root)
    status = root.stat()
    return f"{socket.gethostname()} {_boot_id()} {status.st_dev} {status.st_ino}"


def directories(root: Path) -> dict[int, Path]:
    """The directories below `root` by ordinal, claimed or not."""
    found = (root.resolve() / SUBDIRECTORY).glob("*")
    return {int(path.name): path for path in found if path.name.isdigit() and path.is_dir()}


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


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
