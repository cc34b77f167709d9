"""The record of a running agent: who may reach it and how, in a file that only its owner can read.

The lock beside it dies with its holder: a record counts only while the lock is held.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from emergency_ckpt.agent.endpoint import FORMAT_VERSION, Endpoint
from emergency_ckpt.agent.private_files import read_private, write_private
from emergency_ckpt.errors import AgentStartError, CorruptDataError, LocalDirectoryError
from emergency_ckpt.local.claim import SUBDIRECTORY

RECORD = "agent.json"
LOCK = "agent.lock"
LOG = "agent.log"
_MAX_RECORD_BYTES = 64 * 1024
# Others look at the lock by taking it for a moment.
_LOCK_WAIT = timedelta(seconds=2)
_POLL_SECONDS = 0.02


class AnotherAgentError(AgentStartError):
    """An agent runs for this directory already."""


def agent_directory(root: Path) -> Path:
    """Where the files of the agent of a ramdisk directory lie."""
    return root.resolve() / SUBDIRECTORY


@dataclasses.dataclass(frozen=True, slots=True)
class AgentRecord:
    """What an agent writes about itself.

    `dial` is its address for processes on this host, `owner` the key by which it knows them, which others never
    get.
    """

    endpoint: Endpoint
    dial: str
    pid: int
    package: str
    owner: str = dataclasses.field(repr=False)
    format: int = FORMAT_VERSION

    def write(self, directory: Path) -> None:
        """Puts the record in place by rename, readable by its owner only. Raises LocalDirectoryError."""
        write_private(directory / RECORD, json.dumps(self._to_json()).encode())

    def remove(self, directory: Path) -> None:
        """Removes the record, if it is this one."""
        with contextlib.suppress(OSError, CorruptDataError):
            if read_record(directory) == self:
                (directory / RECORD).unlink()

    def _to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "package": self.package,
            "pid": self.pid,
            "dial": self.dial,
            "owner": self.owner,
            "endpoint": self.endpoint.to_json(),
        }


def read_record(directory: Path) -> AgentRecord | None:
    """The record in place; None where there is none.

    Raises CorruptDataError for one that cannot be understood, LocalDirectoryError for one that is somebody
    else's.
    """
    path = directory / RECORD
    data = read_private(path, "record of an agent", _MAX_RECORD_BYTES)
    if data is None:
        return None
    try:
        raw: Any = json.loads(data)
        numbers = [raw["format"], raw["pid"]]
        texts = [raw["dial"], raw["package"], raw.get("owner", "")]
        if any(type(n) is not int for n in numbers) or not all(isinstance(t, str) for t in texts):
            raise ValueError("a field has a wrong type")
        endpoint = Endpoint.from_json(raw["endpoint"])
        return AgentRecord(endpoint, texts[0], numbers[1], texts[1], texts[2], numbers[0])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptDataError(f"the record of an agent {path} cannot be understood: {error}") from error


class AgentLock:
    """The lock of the agent of one directory. Raises AnotherAgentError where another has it."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        deadline = time.monotonic() + _LOCK_WAIT.total_seconds()
        self._fd = self._open()
        while not self._try():
            if time.monotonic() > deadline:
                os.close(self._fd)
                raise AnotherAgentError(
                    f"an agent runs for {directory} already: {self._path} is locked. One agent serves all "
                    "processes of this ramdisk; end it before another is started."
                )
            time.sleep(_POLL_SECONDS)

    def is_current(self) -> bool:
        """Whether others find this lock: not when the directory was emptied or replaced."""
        try:
            there = os.stat(self._path)
        except OSError:
            return False
        own = os.fstat(self._fd)
        return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)

    def release(self) -> None:
        """Lets another agent begin."""
        os.close(self._fd)

    def _open(self) -> int:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            owner = self._path.parent.stat().st_uid
            if owner not in (0, os.geteuid()):
                raise LocalDirectoryError(
                    f"{self._path.parent} belongs to user {owner}, not to this one ({os.geteuid()}), and "
                    "may put anything into it: remove it, or run the agent and the job as the user whose it is"
                )
            if owner == os.geteuid():
                self._path.parent.chmod(0o700)  # It may have been made while nothing was masked.
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except LocalDirectoryError:
            raise
        except OSError as error:
            raise LocalDirectoryError(
                f"the agent cannot open {self._path}: {error.strerror}. Check the owner of the local "
                "checkpoint directory and that it is not mounted read-only."
            ) from error

    def _try(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if self.is_current():
            return True
        os.close(self._fd)
        self._fd = self._open()
        return False


def living_record(directory: Path) -> AgentRecord | None:
    """The record of the agent that serves a directory; None where none does. Raises as `read_record` does."""
    return read_record(directory) if agent_lives(directory) else None


def agent_lives(directory: Path) -> bool:
    """Whether an agent holds the lock, which is taken for a moment to find out. Raises LocalDirectoryError."""
    path = directory / LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise LocalDirectoryError(
            f"{path} cannot be opened: {error.strerror}. Run the agent and the job as one user."
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
