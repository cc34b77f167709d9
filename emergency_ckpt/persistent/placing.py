"""How a step that is written becomes visible at once, and disappears at once: what kinds of stores differ in.

A file system renames a directory (`RenamedSteps`); an object store cannot, and has a marker object instead
(`marked_steps.MarkedSteps`).
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from emergency_ckpt.errors import PersistentStoreError
from emergency_ckpt.persistent.attempts import TEMPORARY, Attempt, StepNames
from emergency_ckpt.persistent.files import Entry, RenamingFiles
from emergency_ckpt.persistent.step_files import ORBAX_COMMIT_FILE

_ATTEMPT = re.compile(r".+\.orbax-checkpoint-tmp-(?:g(\d+)-[0-9a-f]+-\d+|removed-[0-9a-f]+)")


class StepCommittedError(PersistentStoreError):
    """Another attempt of the same generation has committed the step meanwhile."""


class Placement(Protocol):
    """How the committer of one attempt writes what has the same name in every attempt, and ends.

    All of it raises PersistentStoreError, also where another committer is at work on the same step.
    """

    def write(self, path: str, data: bytes) -> None:
        """Writes a file of the step, `path` being one of those that were announced."""
        ...

    def publish(self, digests: Mapping[str, str]) -> bool:
        """Makes the step visible; False where another step is in the way. `digests`: of its chief files.

        Raises FileNotFoundError when what the attempt wrote is gone.
        """
        ...


class Placing(Protocol):
    """Where attempts are written, and how they become steps. Paths are relative to the root.

    All of it raises PersistentStoreError.
    """

    def directory(self, attempt: Attempt) -> str:
        """Where the files of an attempt lie before it is committed."""
        ...

    def records(self, attempt: Attempt) -> str:
        """Where its writers and its committer leave word for each other."""
        ...

    def begin(self, attempt: Attempt) -> None:
        """Every writer calls this first."""
        ...

    def is_committed(self, entries: Collection[Entry]) -> bool:
        """Whether a directory with the name of a step and these entries is one."""
        ...

    def is_open(self, attempt: Attempt) -> bool:
        """Whether somebody may wait for a part of the attempt; False where all have ended, or none begun."""
        ...

    def in_the_way(self, attempt: Attempt) -> str | None:
        """The directory of a committed step that has to go before the attempt's files may be written."""
        ...

    def place(self, attempt: Attempt, paths: Sequence[str]) -> Placement:
        """For the committer, before it writes anything; `paths`: all that it is going to write, in order."""
        ...

    def abandon(self, attempt: Attempt) -> None:
        """Removes what an attempt that is not committed has written so far."""
        ...

    def remove(self, name: str, generation: int) -> None:
        """Removes a committed step that this generation wrote: out of sight at once, its bytes follow.

        What later generations are writing for the same step stays.
        """
        ...

    def sweep(self, generation: int) -> list[str]:
        """Removes what attempts of earlier generations and half-done removals left; returns the names."""
        ...

    def sweep_foreign(self) -> list[str]:
        """Removes steps that other programs left uncommitted; returns the names."""
        ...


class RenamedSteps:
    """Steps on file systems: an attempt has a temporary name, as Orbax gives them, and the rename commits."""

    def __init__(self, files: RenamingFiles, names: StepNames) -> None:
        self._files = files
        self._names = names

    def directory(self, attempt: Attempt) -> str:
        return f"{self._names.name(attempt.step)}{TEMPORARY}-{attempt.tag}"

    def records(self, attempt: Attempt) -> str:
        return self.directory(attempt)

    def begin(self, attempt: Attempt) -> None:
        self._files.make_directory(f"{self.directory(attempt)}/{attempt.item}")

    def is_committed(self, entries: Collection[Entry]) -> bool:
        return True

    def is_open(self, attempt: Attempt) -> bool:
        return bool(self._files.entries(self.directory(attempt)))

    def in_the_way(self, attempt: Attempt) -> str | None:
        return None

    def place(self, attempt: Attempt, paths: Sequence[str]) -> Placement:
        return _Renamed(self._files, attempt, self.directory(attempt), self._names.name(attempt.step))

    def abandon(self, attempt: Attempt) -> None:
        self._remove(self.directory(attempt))

    def remove(self, name: str, generation: int) -> None:
        self._remove(name)

    def sweep(self, generation: int) -> list[str]:
        removed: list[str] = []
        for entry in self._files.entries():
            match = _ATTEMPT.fullmatch(entry.name)
            if match and entry.is_directory and int(match[1] or 0) < generation:
                self._files.delete_tree(entry.name)
                removed.append(entry.name)
        return removed

    def sweep_foreign(self) -> list[str]:
        removed: list[str] = []
        for entry in self._files.entries():
            if entry.is_directory and TEMPORARY in entry.name and not _ATTEMPT.fullmatch(entry.name):
                self._files.delete_tree(entry.name)
                removed.append(entry.name)
        return removed

    def _remove(self, name: str) -> None:
        """Takes a directory out of sight in one operation, then deletes it."""
        aside = f"{name.partition(TEMPORARY)[0]}{TEMPORARY}-removed-{uuid.uuid4().hex}"
        try:
            self._files.rename(name, aside)
        except FileNotFoundError:
            return
        self._files.delete_tree(aside)


class _Renamed:
    def __init__(self, files: RenamingFiles, attempt: Attempt, source: str, target: str) -> None:
        self._files = files
        self._attempt = attempt
        self._source = source
        self._target = target

    def write(self, path: str, data: bytes) -> None:
        self._files.write(f"{self._source}/{path}", data)

    def publish(self, digests: Mapping[str, str]) -> bool:
        if not self._files.entries(self._source):
            raise FileNotFoundError(self._source)
        marker = f"{self._attempt.step_id} was committed.\n".encode()
        for path in f"{self._attempt.item}/{ORBAX_COMMIT_FILE}", ORBAX_COMMIT_FILE:
            self.write(path, marker)
        try:
            self._files.rename(self._source, self._target)
        except FileExistsError:
            return False
        return True
