"""Whose turn it is to commit a step of an object store: one object for all attempts of one generation at it.

It changes only on condition that it is what its writer saw. Until a committer publishes, another one may take
its turn, and the first finds that out before it changes anything that the other has written. From then on it is
nobody else's: the record says which marker is to be put, and whoever comes puts it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.fields import parsed, whole_number
from emergency_ckpt.persistent.files import VersionedFiles
from emergency_ckpt.persistent.step_files import Mark, seal, unseal

_FILE = "turn.json"
_TRIES = 8
_ADVICE = "It says who commits a step. Delete it if no job is writing, and write the step again."


@dataclasses.dataclass(frozen=True)
class _Record:
    """`publishing`: the marker that is being put, None before that."""

    ordinal: int
    publishing: Mark | None

    def to_bytes(self) -> bytes:
        mark = None if self.publishing is None else self.publishing.to_json()
        return seal({"ordinal": self.ordinal, "publishing": mark})


class Turn:
    """A committer's turn. `files`: the directory of the record. All of it raises PersistentStoreError."""

    def __init__(self, files: VersionedFiles, attempt: Attempt) -> None:
        self._files = files
        self._attempt = attempt
        self._version: str | None = None

    def take(self, is_whole: Callable[[Mark], bool]) -> Mark | None:
        """Takes the turn; returns the marker instead where another attempt is past the point of no return.

        `is_whole`: whether what a marker speaks of is there. On a store without conditional puts it may not be.
        """
        for _ in range(_TRIES):
            version = self._files.version(_FILE)
            found = self._read() if version is not None else None
            if found is not None and found.publishing is not None and is_whole(found.publishing):
                return found.publishing
            record = _Record(self._attempt.ordinal, None)
            self._version = self._files.replace(_FILE, record.to_bytes(), version)
            if self._version is not None:
                return None
        raise self.lost()

    def is_mine(self) -> bool:
        """Whether nobody has taken it since."""
        return self._version is not None and self._files.version(_FILE) == self._version

    def check(self) -> None:
        """Raises PersistentStoreError where somebody has taken it."""
        if not self.is_mine():
            raise self.lost()

    def publish(self, mark: Mark) -> None:
        """From here on nobody else may take it."""
        if self._version is None:
            raise self.lost()
        data = _Record(self._attempt.ordinal, mark).to_bytes()
        self._version = put_over(self._files, _FILE, data, self._version, self._attempt)

    def is_publishing(self) -> bool:
        """Whether this attempt's marker may be there, or may yet arrive."""
        found = self._read()
        return found is not None and found.publishing is not None and found.ordinal == self._attempt.ordinal

    def give_up(self) -> None:
        """Nothing was written in this turn, and nothing will be."""
        if self.is_mine():
            self.end()

    def end(self) -> None:
        """The marker is there, and says all that there is to say."""
        self._files.delete_tree("")

    def lost(self) -> PersistentStoreError:
        return interfered(self._files, _FILE, self._attempt)

    def _read(self) -> _Record | None:
        """None where there is none, or one that is damaged and may be replaced."""
        where = self._files.locate(_FILE)
        try:
            return parsed(unseal(self._files.read(_FILE), where, _ADVICE), _parse, where, _ADVICE)
        except (FileNotFoundError, CorruptDataError):
            return None


def put_over(files: VersionedFiles, path: str, data: bytes, version: str | None, attempt: Attempt) -> str:
    """Puts a file over this version, or where there is none; returns the version that it has then.

    Raises PersistentStoreError where somebody else has put another content there.
    """
    put = files.replace(path, data, version)
    if put is None and _holds(files, path, data):
        put = files.version(path)  # A request that had to be repeated, or equal bytes of another one.
    if put is None:
        raise interfered(files, path, attempt)
    return put


def interfered(files: VersionedFiles, path: str, attempt: Attempt) -> PersistentStoreError:
    """What a committer says that finds another one at work."""
    return PersistentStoreError(
        f"{files.locate(path)} was written by somebody else meanwhile: another committer is at work "
        f"on the step of {attempt}. If it is not alive, write the step again with another attempt."
    )


def _holds(files: VersionedFiles, path: str, data: bytes) -> bool:
    try:
        return files.read(path) == data
    except FileNotFoundError:
        return False


def _parse(raw: Any) -> _Record:
    mark = raw["publishing"]
    return _Record(whole_number(raw["ordinal"]), None if mark is None else Mark.from_json(mark))
