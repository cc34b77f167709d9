"""Whose turn it is to commit a step of an object store: one object for all attempts of one generation at it.

It changes only on condition that it is what its writer saw. Until a committer publishes, another one may take
its turn, and the first finds that out before it changes anything that the other has written; whoever gives an
attempt up takes the turn from it likewise. From then on it is nobody else's: the record says which marker is to
be put, and whoever comes puts it.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from typing import Any

from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.fields import parsed, typed, whole_number
from emergency_ckpt.persistent.files import VersionedFiles
from emergency_ckpt.persistent.step_files import Mark, seal, unseal

_FILE = "turn.json"
_TRIES = 8
_ADVICE = "It says who commits a step. Delete it if no job is writing, and write the step again."


@dataclasses.dataclass(frozen=True)
class _Record:
    """`holder` tells all who ever take a turn apart; `publishing`: the marker that is being put, if any."""

    ordinal: int | None
    holder: str
    publishing: Mark | None

    def to_bytes(self) -> bytes:
        mark = None if self.publishing is None else self.publishing.to_json()
        return seal({"ordinal": self.ordinal, "holder": self.holder, "publishing": mark})


_DAMAGED = _Record(None, "", None)  # Whose turn it was is not known.


class Turn:
    """A committer's turn. `files`: the directory of the record. All of it raises PersistentStoreError."""

    def __init__(self, files: VersionedFiles, attempt: Attempt) -> None:
        self._files = files
        self._attempt = attempt
        self._holder = uuid.uuid4().hex
        self._version: str | None = None

    def take(self, is_whole: Callable[[Mark], bool]) -> Mark | None:
        """Takes the turn; returns the marker instead where another attempt is past the point of no return.

        `is_whole`: whether what a marker speaks of is there. On a store without conditional puts it may not be.
        """

        def is_free(found: _Record | None) -> bool:
            return found is None or found.publishing is None or not is_whole(found.publishing)

        found = self._take_if(is_free)
        return found.publishing if found else None

    def revoke(self) -> bool:
        """Takes the turn from the committer of this attempt, if it is his; False where he is publishing.

        Then this attempt's marker may be there, or may yet arrive.
        """
        ordinal = self._attempt.ordinal

        def is_revocable(found: _Record | None) -> bool:
            return found is not None and found.publishing is None and found.ordinal in (ordinal, None)

        found = self._take_if(is_revocable)
        return found is None or found.publishing is None or found.ordinal != ordinal

    def _take_if(self, is_free: Callable[[_Record | None], bool]) -> _Record | None:
        """Takes the turn from who has it (None: nobody) where `is_free` says so; else returns his record."""
        for _ in range(_TRIES):
            version = self._files.version(_FILE)
            found = self._read() if version is not None else None
            if not is_free(found):
                return found
            record = _Record(self._attempt.ordinal, self._holder, None)
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
        data = _Record(self._attempt.ordinal, self._holder, mark).to_bytes()
        self._version = put_over(self._files, _FILE, data, self._version, self._attempt)

    def is_over(self) -> bool:
        """Whether nobody has it: who had it last has ended it."""
        return self._files.version(_FILE) is None

    def publishing(self) -> Mark | None:
        """The marker that is being put by whoever has the turn."""
        found = self._read()
        return found.publishing if found else None

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
        """None where there is none. One that is damaged may be replaced."""
        where = self._files.locate(_FILE)
        try:
            return parsed(unseal(self._files.read(_FILE), where, _ADVICE), _parse, where, _ADVICE)
        except FileNotFoundError:
            return None
        except CorruptDataError:
            return _DAMAGED


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
    # Versions before this one had no holder.
    holder = typed(raw.get("holder", ""), str)
    return _Record(whole_number(raw["ordinal"]), holder, None if mark is None else Mark.from_json(mark))
