"""How a step that is written becomes visible at once, and disappears at once: what kinds of stores differ in.

A file system renames a directory (`RenamedSteps`); an object store cannot, and has a marker object instead
(`marked_steps.MarkedSteps`).
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from emergency_ckpt.errors import PersistentStoreError
from emergency_ckpt.persistent.attempts import TEMPORARY, Attempt, StepNames
from emergency_ckpt.persistent.files import Entry, RenamingFiles
from emergency_ckpt.persistent.step_files import CLAIM_FILE, ORBAX_COMMIT_FILE, commit_text

_ATTEMPT = re.compile(r".+\.orbax-checkpoint-tmp-(?:g(\d+)-[0-9a-f]+-\d+|removed-[0-9a-f]+)")
# What was in the way of an attempt, and the generation of that.
_REMOVED = re.compile(r".+-by-g(\d+)")
_TOMBSTONE = "removed"


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

        Raises FileNotFoundError when what the attempt wrote is gone: abandoned, or removed as a leftover.
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

    def place(self, attempt: Attempt, paths: Sequence[str], check: Callable[[], object]) -> Placement:
        """For the committer, when it has its claim and before it writes anything else.

        `paths`: all that it is going to write, in order.

        `check` raises where the committed step that is in the way may not be removed.
        """
        ...

    def abandon(self, attempt: Attempt) -> None:
        """Removes what an attempt that is not committed has written so far.

        Its committer may be at work, or be done: then it is told, or the step stays.
        """
        ...

    def hide(self, name: str, generation: int) -> str | None:
        """Takes a committed step that this generation wrote out of sight; returns what is to be cleared.

        None where there is none.
        """
        ...

    def clear(self, directory: str, generation: int, stopped: Callable[[], bool]) -> bool:
        """Deletes the bytes of a hidden step; False where `stopped` ended that before it was done.

        What later generations are writing for the same step stays.
        """
        ...

    def make_way(self, name: str, identity: str, attempt: Attempt) -> str | None:
        """Removes what is in the way of an attempt and was found to be of this identity, and nothing else.

        Returns what is to be cleared when the attempt is committed.
        """
        ...

    def leftovers(self, generation: int) -> list[str]:
        """Directories in which there may be something that `sweep` removes."""
        ...

    def sweep(self, directory: str, generation: int) -> list[str]:
        """Removes what attempts of earlier generations and half-done removals left; returns the names."""
        ...

    def sweep_foreign(self) -> list[str]:
        """Removes steps that other programs left uncommitted; returns the names."""
        ...


class RenamedSteps:
    """Steps on file systems: an attempt has a temporary name, as Orbax gives them, and the rename commits."""

    def __init__(self, files: RenamingFiles, names: StepNames, removed: str) -> None:
        """`removed` is a directory of the root that is no step."""
        self._files = files
        self._names = names
        self._removed = removed

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

    def place(self, attempt: Attempt, paths: Sequence[str], check: Callable[[], object]) -> Placement:
        return _Renamed(self._files, attempt, self.directory(attempt), self._names.name(attempt.step))

    def abandon(self, attempt: Attempt) -> None:
        if (hidden := self.hide(self.directory(attempt), attempt.generation.number)) is not None:
            self._files.delete_tree(hidden)

    def hide(self, name: str, generation: int) -> str | None:
        aside = f"{name.partition(TEMPORARY)[0]}{TEMPORARY}-removed-{uuid.uuid4().hex}"
        try:
            self._files.rename(name, aside)
        except FileNotFoundError:
            return None
        return aside

    def clear(self, directory: str, generation: int, stopped: Callable[[], bool]) -> bool:
        if directory.startswith(f"{self._removed}/"):
            # Something stays, so that nothing else is renamed to this.
            self._files.write(f"{directory}/{_TOMBSTONE}", b"")
            for entry in self._files.entries(directory):
                if entry.is_directory:
                    self._files.delete_tree(f"{directory}/{entry.name}")
                elif entry.name != _TOMBSTONE:
                    self._files.delete(f"{directory}/{entry.name}")
        else:
            self._files.delete_tree(directory)
        return True

    def make_way(self, name: str, identity: str, attempt: Attempt) -> str | None:
        """Of several attempts that find the same in their way one takes it away, however late the others are.

        A rename names no content: one that comes late would take away what another attempt has committed. All
        rename to the same name, which stays taken until the next life of the run.
        """
        aside = f"{self._removed}/{name}-{identity}-by-g{attempt.generation.number}"
        self._files.make_directory(self._removed)
        try:
            self._files.rename(name, aside)
        except (FileExistsError, FileNotFoundError):
            return None
        return aside

    def leftovers(self, generation: int) -> list[str]:
        found = [entry.name for entry in self._files.entries() if entry.is_directory]
        found += [f"{self._removed}/{entry.name}" for entry in self._files.entries(self._removed)]
        return [directory for directory in found if self._is_leftover(directory, generation)]

    def sweep(self, directory: str, generation: int) -> list[str]:
        if not self._is_leftover(directory, generation):
            return []
        # The committer of an attempt may wake up: it finds all of it, or nothing.
        hidden = directory if "/" in directory else self.hide(directory, generation)
        if hidden is not None:
            self._files.delete_tree(hidden)
        return [directory]

    def _is_leftover(self, directory: str, generation: int) -> bool:
        parent, _, name = directory.rpartition("/")
        match = _ATTEMPT.fullmatch(name) if not parent else _REMOVED.fullmatch(name)
        return match is not None and int(match[1] or 0) < generation

    def sweep_foreign(self) -> list[str]:
        removed: list[str] = []
        for entry in self._files.entries():
            if entry.is_directory and TEMPORARY in entry.name and not _ATTEMPT.fullmatch(entry.name):
                self._files.delete_tree(entry.name)
                removed.append(entry.name)
        return removed


class _Renamed:
    def __init__(self, files: RenamingFiles, attempt: Attempt, source: str, target: str) -> None:
        self._files = files
        self._attempt = attempt
        self._source = source
        self._target = target
        self._claim = self._claimed_by()

    def write(self, path: str, data: bytes) -> None:
        self._files.write(f"{self._source}/{path}", data)

    def publish(self, digests: Mapping[str, str]) -> bool:
        self._check_claimed()
        marker = commit_text(self._attempt.step_id)
        for path in f"{self._attempt.item}/{ORBAX_COMMIT_FILE}", ORBAX_COMMIT_FILE:
            self.write(path, marker)
        self._check_claimed()  # What was written last may have made anew what somebody has taken away.
        try:
            self._files.rename(self._source, self._target)
        except FileExistsError:
            return False
        return True

    def _check_claimed(self) -> None:
        if self._claim is None or self._claimed_by() != self._claim:
            raise FileNotFoundError(self._source)

    def _claimed_by(self) -> bytes | None:
        """What tells this committer from any other; None where somebody has taken the attempt away."""
        try:
            return self._files.read(f"{self._source}/{CLAIM_FILE}")
        except FileNotFoundError:
            return None
