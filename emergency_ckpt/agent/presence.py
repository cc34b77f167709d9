"""Whether a trainer lives, for an agent that is not connected to it: it holds a lock as long as it does.

The lock dies with its holder, whichever container it is in, and children that it forks do not inherit it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
from pathlib import Path
from typing import Literal

from emergency_ckpt.agent.private_files import read_private
from emergency_ckpt.errors import CorruptDataError, LocalDirectoryError

_TRAINER = re.compile(r"[0-9a-f]{32}")
_PREFIX = "agent.trainer."
_LEFT = b"left\n"
_TRIES = 10
_guard = threading.Lock()
_held: set[int] = set()

Condition = Literal["alive", "gone", "left"]


class Presence:
    """This process lives and is `trainer`, until it is closed. Raises LocalDirectoryError."""

    def __init__(self, directory: Path, trainer: str) -> None:
        self._path = _path(directory, trainer)
        with _guard:  # A fork waits for it.
            self._fd = self._lock()
            _held.add(self._fd)

    def is_current(self) -> bool:
        """Whether others find this lock: not when the directory was emptied or replaced."""
        return _is_at(self._fd, self._path)

    def close(self, *, told: bool = True) -> None:
        """From now on nobody is there. Not `told`: no agent heard the goodbye; the next one finds it here."""
        with _guard:
            if self._fd not in _held:
                return  # It was closed already, or this is a fork of the one who is there.
            _held.discard(self._fd)
            if _is_at(self._fd, self._path):
                with contextlib.suppress(OSError):
                    if told:
                        self._path.unlink()
                    else:
                        os.write(self._fd, _LEFT)
            os.close(self._fd)

    def _lock(self) -> int:
        for _ in range(_TRIES):
            try:
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise LocalDirectoryError(
                    f"cannot open {self._path}: {error.strerror}. Check the owner of the local checkpoint "
                    "directory, its room, and that it is not mounted read-only."
                ) from error
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(fd, self._path):
                    return fd
            os.close(fd)  # It was removed between the two, or is being looked at.
        raise LocalDirectoryError(f"{self._path} was taken away {_TRIES} times while it was being locked")


def is_trainer_id(text: str) -> bool:
    """Whether this can be the id that a trainer gave itself."""
    return _TRAINER.fullmatch(text) is not None


def trainer_lives(directory: Path, trainer: str) -> bool:
    """Whether the trainer of this id holds its lock."""
    try:
        fd = os.open(_path(directory, trainer), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def condition_of(directory: Path, trainer: str) -> Condition:
    """How a trainer is who is not attached; `left`: it has ended in order, and nobody heard it."""
    if trainer_lives(directory, trainer):
        return "alive"
    try:
        said = read_private(_path(directory, trainer), "lock of a trainer", len(_LEFT))
    except (LocalDirectoryError, CorruptDataError):
        return "gone"
    return "left" if said == _LEFT else "gone"


def sweep(directory: Path) -> None:
    """Removes what dead trainers left. Whoever locks one meanwhile notices."""
    try:
        names = os.listdir(directory)
    except OSError:  # It was taken away.
        return
    for name in names:
        if not name.startswith(_PREFIX) or not is_trainer_id(name.removeprefix(_PREFIX)):
            continue
        with contextlib.suppress(OSError):
            fd = os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (directory / name).unlink()
            finally:
                os.close(fd)


def _path(directory: Path, trainer: str) -> Path:
    if not is_trainer_id(trainer):
        raise ValueError(f"not the id of a trainer: {trainer!r:.80}")
    return directory / f"{_PREFIX}{trainer}"


def _is_at(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    own = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def _forget_inherited() -> None:
    """In a forked child: a lock belongs to all who have its file open, so it would outlive the parent here."""
    for fd in _held:
        os.close(fd)
    _held.clear()
    _guard.release()


os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_forget_inherited)
