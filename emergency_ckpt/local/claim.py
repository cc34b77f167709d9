"""Claiming a directory on the ramdisk: by lock and local ordinal, never by process index.

A process index may move to another host between two lives of a job; what lies in a directory is told by the
manifests in it. The lock dies with its holder.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from emergency_ckpt.errors import LocalDirectoryError
from emergency_ckpt.local.recovery import newest_of_run

SUBDIRECTORY = "emergency_ckpt"
LOCK = "lock"
LOCK_WAIT = timedelta(seconds=10)
TAKEOVER_WAIT = timedelta(seconds=60)
_MAX_ORDINALS = 256
_POLL_SECONDS = 0.1
_LOCK_TRIES = 10
_held_here: dict[Path, Claim] = {}
# One claim at a time is made in this process; `_guard` is for the registry and is never held while waiting.
# Where both are needed, a claim's `changed` is taken before `_guard`.
_claiming = threading.Lock()
_guard = threading.Lock()


class Claim:
    """A directory that this process owns, until it is released or a newer manager of the process takes it over.

    Attributes:
      changed: the lock of everything that the owner does to the directory, so that a takeover is atomic with
        respect to it; notified at every change.
      superseded: a newer manager has the directory, or waits for it: begin nothing new, write nothing but what
        was begun.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.changed = threading.Condition()
        self.superseded = False
        self._fd = fd
        self._unsettled = 0
        self._giving_way: list[Callable[[], None]] = []

    def gives_way(self, end: Callable[[], None]) -> None:
        """Something that nobody has asked for: `end` settles it when a newer manager wants the directory."""
        with self.changed:
            self._giving_way.append(end)

    def stays(self, end: Callable[[], None]) -> None:
        """It ended, or somebody asks for it now: a newer manager waits for it. Repeating it is fine."""
        with self.changed:
            if end in self._giving_way:
                self._giving_way.remove(end)

    def count_unsettled(self, unsettled: int) -> None:
        """How many slots are being written or drained now. The caller holds `changed`."""
        self._unsettled = unsettled
        self.changed.notify_all()

    def is_current(self) -> bool:
        """Whether others find this lock: not when the directory was emptied, replaced or taken away.

        Raises LocalDirectoryError where that cannot be told.
        """
        return _is_at(self._fd, self.path / LOCK)

    def renew(self) -> None:
        """Takes the lock anew, in a directory that is made anew where it is gone.

        Raises LocalDirectoryError when the ramdisk directory itself is gone, or another process was faster.
        """
        check_root(self.path.parent.parent)
        with _guard:
            fd = _try_lock(self.path)
            if fd is None:
                raise LocalDirectoryError(
                    f"{self.path} was emptied or replaced under this manager, and then{_holder(self.path)} "
                    "locked it. Only one process may use it: end one of them."
                )
            os.close(self._fd)
            self._fd = fd

    def release(self) -> None:
        """Gives the directory back, unless a newer manager of this process has taken it over."""
        with self.changed, _guard:
            if _held_here.get(self.path) is self:
                del _held_here[self.path]
                os.close(self._fd)

    def hand_over(self, limit: timedelta) -> Claim | None:
        """A claim on the same directory for a newer manager, as soon as nothing unsettled is left here.

        None where the directory was given back in the meantime. Raises LocalDirectoryError after `limit`; this
        claim then stands as before.
        """
        with self.changed:
            self.superseded = True
            self.changed.notify_all()
            giving_way = list(self._giving_way)
        for end in giving_way:
            end()
        with self.changed:
            if not self.changed.wait_for(lambda: self._unsettled == 0, limit.total_seconds()):
                self.superseded = False
                raise LocalDirectoryError(
                    f"another manager of this process is still writing or draining {self._unsettled} slots in "
                    f"{self.path} after {limit.total_seconds():.0f} s. Close it before opening a new one."
                )
            with _guard:
                if _held_here.get(self.path) is not self:
                    return None
                _held_here[self.path] = Claim(self.path, self._fd)
                return _held_here[self.path]


def claim_directory(
    root: Path,
    preferred: int,
    log: Callable[[str], None],
    *,
    run: str,
    lock_wait: timedelta = LOCK_WAIT,
    takeover_wait: timedelta = TAKEOVER_WAIT,
) -> Claim:
    """Claims one directory below `root` for this process: ordinal `preferred`, or the first free one.

    A directory that this very process holds already is handed over, once what the manager that held it before
    had begun is settled (at most `takeover_wait`); that one may not save any more. Where another process has
    locked the preferred directory and it holds steps of `run`, an earlier trainer may be about to exit: its
    lock is waited for, at most `lock_wait`.

    Raises LocalDirectoryError when `root` is missing or not writable, or an earlier manager is still writing.
    """
    check_root(root)
    base = root.resolve() / SUBDIRECTORY
    with _claiming:
        with _guard:
            earlier = next((claim for path, claim in _held_here.items() if path.parent == base), None)
        if earlier is not None and (taken := earlier.hand_over(takeover_wait)):
            return _renewed(taken)
        wanted = base / str(preferred)
        claim = _claim_preferred(wanted, run, lock_wait, log)
        if claim is not None:
            return claim
        holder = _holder(wanted)
        for ordinal in range(_MAX_ORDINALS):
            claim = _try_claim(base / str(ordinal))
            if claim is not None:
                log(f"{wanted} is in use by{holder}; this process takes {claim.path}. They share the ramdisk.")
                return claim
    raise LocalDirectoryError(f"{_MAX_ORDINALS} processes hold directories below {base} already")


def _renewed(claim: Claim) -> Claim:
    """A claim that was handed over, on a directory that may have been emptied meanwhile."""
    try:
        if not claim.is_current():
            claim.renew()
    except BaseException:
        claim.release()
        raise
    return claim


def _claim_preferred(path: Path, run: str, limit: timedelta, log: Callable[[str], None]) -> Claim | None:
    claim = _try_claim(path)
    if claim is not None or (held := newest_of_run(path, run)) is None:
        return claim
    seconds = limit.total_seconds()
    log(
        f"{path} holds {held.step} of this run, but{_holder(path)} has locked it, an earlier trainer perhaps "
        f"that has not ended: waiting up to {seconds:.0f} s for it"
    )
    deadline = time.monotonic() + seconds
    while (claim := _try_claim(path)) is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    if claim is None:
        log(
            f"{path} is still locked by{_holder(path)} after {seconds:.0f} s and is passed over: this process "
            f"does not use {held.step} in it. If an earlier trainer or a process that it started hangs there, "
            "end it and start this one again."
        )
    return claim


def check_root(root: Path) -> None:
    """Raises LocalDirectoryError unless the ramdisk directory is there."""
    if root.exists() and not root.is_dir():
        raise LocalDirectoryError(
            f"the local checkpoint directory {root} is no directory. Correct local_checkpoint_directory."
        )
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


def _try_claim(path: Path) -> Claim | None:
    with _guard:  # A fork waits for it: no child inherits a lock that is not in the registry.
        fd = _try_lock(path)
        if fd is None:
            return None
        _held_here[path] = Claim(path, fd)
        return _held_here[path]


def _try_lock(path: Path) -> int | None:
    """The descriptor of the lock of a directory, which is made if need be; None where somebody has it."""
    for _ in range(_LOCK_TRIES):
        try:
            for directory in (path.parent, path):  # Each with this mode, whatever is masked.
                directory.mkdir(exist_ok=True, mode=0o700)
            fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LocalDirectoryError(
                f"cannot write below the local checkpoint directory {path.parent.parent}: {error.strerror}. "
                "Check its owner and that it is not mounted read-only."
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, path / LOCK):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # It was removed between the two: a lock that nobody else would meet.
    raise LocalDirectoryError(
        f"the lock of {path} was removed {_LOCK_TRIES} times while it was being taken. Find out what empties "
        "the local checkpoint directory, and start again."
    )


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file is the one that lies at `path`."""
    try:
        there = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise LocalDirectoryError(
            f"cannot look at {path}: {error.strerror}. Check the local checkpoint directory and its owner."
        ) from error
    own = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def _holder(path: Path) -> str:
    """Who has locked a directory, as far as the kernel says, with a space before it, for a sentence."""
    try:
        status = os.stat(path / LOCK)
        name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        lines = Path("/proc/locks").read_text().splitlines()
        pid = next(f[4] for line in lines if (f := line.split())[1] == "FLOCK" and f[5] == name)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (OSError, StopIteration, IndexError):  # Another container's process, or one that just ended.
        return " another process"
    stopped = " and is stopped (SIGCONT lets it go on)" if state in "Tt" else ""
    return f" process {pid} ({' '.join(command.split()):.60}){stopped}"


def _forget_inherited_claims() -> None:
    """In a forked child: a lock belongs to all who have its file open, so it would outlive the parent here."""
    global _claiming
    _claiming = threading.Lock()  # Another thread of the parent may have held it.
    for claim in _held_here.values():
        claim.superseded = True
        os.close(claim._fd)
    _held_here.clear()
    _guard.release()


os.register_at_fork(
    before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_forget_inherited_claims
)
