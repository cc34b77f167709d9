"""Steps on object stores: written where they stay, visible by a marker object that is put last.

There is no rename, so a step's directory may hold objects of several attempts. What is large has its attempt's
name. The few objects with names that Orbax gives (the root of the array store, metadata) are put only over what
the committer saw before it began: of two committers one gets through, one that wakes up late changes nothing.
The marker says which attempt the step is and carries the checksums of its chief objects: a mixture, which only
a store without conditional puts lets happen, is damage to the reader and never believed. On such a store a
committer that finds that it came over another one's objects takes the marker away: no step is better than that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from absl import logging

from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.attempts import (
    Attempt,
    StepNames,
    StoreOwner,
    owner_of,
    parse_store_name,
)
from emergency_ckpt.persistent.files import Entry, VersionedFiles
from emergency_ckpt.persistent.placing import Placement, StepCommittedError
from emergency_ckpt.persistent.records import Generation
from emergency_ckpt.persistent.step_files import (
    CLAIM_FILE,
    ITEM_NAMES,
    ORBAX_COMMIT_FILE,
    OUR_FILES,
    Mark,
    parse_side_file_name,
)
from emergency_ckpt.persistent.turns import Turn, interfered, put_over

_DELETED_AT_A_TIME = 4000  # objects: four requests at the same time
# The records of an attempt, and without an ordinal whose turn it is at a step.
_RECORD = re.compile(r"(.+)-g(\d+)-([0-9a-f]+)(?:-(\d+))?")
_ABANDONED = b"abandoned"  # in a claim


class MarkedSteps:
    """`records` is a directory of the root that is no step."""

    def __init__(self, files: VersionedFiles, names: StepNames, records: str) -> None:
        self._files = files
        self._names = names
        self._records = records

    def directory(self, attempt: Attempt) -> str:
        return self._names.name(attempt.step)

    def records(self, attempt: Attempt) -> str:
        return f"{self._records}/{self._names.name(attempt.step)}-{attempt.tag}"

    def begin(self, attempt: Attempt) -> None:
        """Nothing has to be there before an object is put."""

    def is_committed(self, entries: Collection[Entry]) -> bool:
        return any(entry.name == ORBAX_COMMIT_FILE and not entry.is_directory for entry in entries)

    def is_open(self, attempt: Attempt) -> bool:
        return True  # Nothing tells; what is left of it is swept up.

    def place(self, attempt: Attempt, paths: Sequence[str], check: Callable[[], object]) -> Placement:
        files = self._files.below(self.directory(attempt))
        turn = self._turn(attempt)
        if (mark := turn.take(lambda mark: mark.speaks_of(files))) is not None:
            # Its committer is dead, or about to put it itself.
            files.create(ORBAX_COMMIT_FILE, mark.to_bytes())
        self._end_attempts(attempt.generation.number - 1, self.directory(attempt))
        item_marker = f"{attempt.item}/{ORBAX_COMMIT_FILE}"
        if files.version(ORBAX_COMMIT_FILE) is not None:
            try:
                check()
            except PersistentStoreError:
                turn.give_up()
                raise
            self._vacate(attempt, turn, frozenset(paths))
        versions = {path: files.version(path) for path in (*paths, item_marker)}
        # Looked for once no later committer can come between unnoticed.
        if files.version(ORBAX_COMMIT_FILE) is not None:
            turn.give_up()
            raise StepCommittedError(f"{attempt}: another attempt has just committed the step")
        self._check_claimed(attempt)  # After the turn was taken: see `abandon`.
        turn.check()  # Or some of these versions may be of what somebody else has written since.
        return _Marked(files, turn, attempt, versions, lambda: self._tidy(attempt, turn))

    def _turn(self, attempt: Attempt) -> Turn:
        generation = attempt.generation
        name = f"{self._names.name(attempt.step)}-g{generation.number}-{generation.nonce}"
        return Turn(self._files.below(f"{self._records}/{name}"), attempt)

    def _check_claimed(self, attempt: Attempt) -> None:
        path = f"{self.records(attempt)}/{CLAIM_FILE}"
        try:
            if self._files.read(path) != _ABANDONED:
                return
        except FileNotFoundError:
            pass
        raise PersistentStoreError(
            f"{attempt} was abandoned, or removed as a leftover, before its committer was done:"
            f" {self._files.locate(path)} is no claim any more. Write the step again with another attempt."
        )

    def _tidy(self, attempt: Attempt, turn: Turn) -> None:
        """After a commit: whatever fails here, the step stands, and `sweep` finds what is left."""
        try:
            # Whoever else was at it cannot commit any more.
            self._sweep_others(self.directory(attempt), attempt.item, owner_of(attempt))
            self._files.delete_tree(self.records(attempt))
            turn.end()
        except PersistentStoreError as error:
            logging.warning("%s is committed; what it needs no more could not be deleted: %s", attempt, error)

    def abandon(self, attempt: Attempt) -> None:
        # In this order: its committer takes the turn and then looks at its claim, so that it loses one of them.
        # The claim goes last, when there is nothing left that could be claimed.
        self._files.write(f"{self.records(attempt)}/{CLAIM_FILE}", _ABANDONED)
        if not self._turn(attempt).revoke():
            return  # Its marker may be there, or may yet arrive. `sweep` takes what is of no use.
        if not self._may_be_committed(attempt):
            owner = owner_of(attempt)
            self._delete_stores(f"{self.directory(attempt)}/{attempt.item}", lambda found: found == owner)
        self._files.delete_tree(self.records(attempt))

    def _may_be_committed(self, attempt: Attempt) -> bool:
        try:
            mark = Mark.read(self._files.below(self.directory(attempt)))
        except CorruptDataError:
            return True  # Nothing tells whose step it was.
        return mark is not None and _owner_of_step(mark) == owner_of(attempt)

    def _vacate(self, attempt: Attempt, turn: Turn, paths: Collection[str]) -> None:
        """Removes a void step. Nothing deletes on condition: whoever has the turn does, and looks each time.

        What the attempt itself writes is put on condition, over objects of the void step that have the names.
        """
        name, generation = self.directory(attempt), attempt.generation.number - 1
        turn.check()
        self._files.delete(f"{name}/{ORBAX_COMMIT_FILE}")
        if not turn.is_mine():
            self._put_back(attempt, turn)
            raise turn.lost()
        if not self.clear(name, generation, lambda: not turn.is_mine(), paths):
            raise turn.lost()

    def _put_back(self, attempt: Attempt, turn: Turn) -> None:
        """The marker that was deleted may have been that of the attempt which has taken the turn."""
        files = self._files.below(self.directory(attempt))
        mark = turn.publishing()
        if mark is None and turn.is_over():
            mark = Mark.read(files.below(attempt.item))  # Which says the same, and stays.
        if mark is not None and mark.nonce == attempt.generation.nonce and mark.speaks_of(files):
            files.create(ORBAX_COMMIT_FILE, mark.to_bytes())

    def hide(self, name: str, generation: int) -> str | None:
        # First of all, or somebody would end what it says was begun.
        self._delete_records(generation, name)
        self._files.delete(f"{name}/{ORBAX_COMMIT_FILE}")
        return name

    def clear(
        self,
        directory: str,
        generation: int,
        stopped: Callable[[], bool] = lambda: False,
        kept: Collection[str] = (),
    ) -> bool:
        """Deletes what is in a step's directory, but for what generations after this one have written.

        Its own marker goes first, and what says whose it is last, so that a removal that was cut short is taken
        up again. No writer's directory is listed by itself: there may be thousands. `kept`: paths that stay.
        """
        ranks: tuple[list[str], ...] = ([], [], [], [])
        for page in self._files.walk(directory):
            for path in page:
                if path not in kept and (rank := _rank(path, generation)) is not None:
                    ranks[rank].append(f"{directory}/{path}")
        for paths in ranks:
            for first in range(0, len(paths), _DELETED_AT_A_TIME):
                if stopped():
                    return False
                self._files.delete_many(paths[first : first + _DELETED_AT_A_TIME])
        return True

    def make_way(self, name: str, identity: str, attempt: Attempt) -> str | None:
        return None  # Nothing is in the way of a marker for which a place was found.

    def leftovers(self, generation: int) -> list[str]:
        steps = [
            e.name for e in self._files.entries() if e.is_directory and self._names.step(e.name) is not None
        ]
        return [*steps, self._records]

    def sweep(self, directory: str, generation: int) -> list[str]:
        if directory == self._records:
            return self._sweep_records(generation - 1)
        return self._sweep_step(directory, generation)

    def _end_attempts(self, generation: int, step: str) -> None:
        """Sees to it that no attempt of generations up to this one at a step is committed from now on.

        What is past the point of no return is committed here. Only for who sweeps this step, or has his turn.
        """
        files = self._files.below(step)
        for record, _, mark in self._ended(generation, step):
            if mark is not None:
                files.create(ORBAX_COMMIT_FILE, mark.to_bytes())
            self._files.delete_tree(record)

    def _sweep_records(self, generation: int) -> list[str]:
        """Of attempts of generations up to this one; what is about to be committed is for whoever ends it."""
        removed: list[str] = []
        for record, step, mark in self._ended(generation):
            if mark is None or self._files.version(f"{step}/{ORBAX_COMMIT_FILE}") is not None:
                self._files.delete_tree(record)
                removed.append(record)
        return removed

    def _ended(self, generation: int, step: str | None = None) -> Iterator[tuple[str, str, Mark | None]]:
        """Records of attempts that cannot be committed any more, their step, the marker that may yet arrive.

        Claims are deleted first: who takes the turn after this finds that he has none.
        """
        found = self._records_of(generation, step)
        for record in found:
            if record[4] is not None:
                yield f"{self._records}/{record[0]}", record[1], None
        for record in found:
            if record[4] is None:
                number = self._names.step(record[1])
                mark = None if number is None else self._taken(record, number)
                yield f"{self._records}/{record[0]}", record[1], mark

    def _taken(self, record: re.Match[str], step: int) -> Mark | None:
        # In the name of an attempt that nobody makes: a turn is told from others by its holder.
        turn = self._turn(Attempt(Generation(int(record[2]), record[3]), step, ""))
        files = self._files.below(record[1])
        return turn.take(lambda mark: mark.speaks_of(files))

    def _delete_records(self, generation: int, step: str) -> None:
        """Those of attempts of generations up to this one at a step that is there, and goes."""
        for record in self._records_of(generation, step):
            self._files.delete_tree(f"{self._records}/{record[0]}")

    def _records_of(self, generation: int, step: str | None) -> list[re.Match[str]]:
        matches = [_RECORD.fullmatch(entry.name) for entry in self._files.entries(self._records)]
        return [m for m in matches if m and int(m[2]) <= generation and step in (None, m[1])]

    def sweep_foreign(self) -> list[str]:
        removed: list[str] = []
        for entry in self._files.entries():
            if not entry.is_directory or self._names.step(entry.name) is None:
                continue
            entries = self._files.entries(entry.name)
            if not self.is_committed(entries) and not self._is_ours(entry.name, entries):
                self._files.delete_tree(entry.name)
                removed.append(entry.name)
        return removed

    def _sweep_step(self, name: str, generation: int) -> list[str]:
        """What earlier generations left in one step's directory."""
        if not self._may_hold_leftovers(name, generation):
            return []
        # Only now it stays as it is found.
        self._end_attempts(generation - 1, name)
        entries = self._files.entries(name)
        if self.is_committed(entries):
            mark = Mark.read(self._files.below(name))
            if mark is None:
                return []
            owner = _owner_of_step(mark)
            return [f for item in _items(entries) for f in self._sweep_others(name, item, owner, generation)]
        if not self._is_left(name, entries, generation):
            return []
        self.clear(name, generation - 1)
        return [name]

    def _may_hold_leftovers(self, name: str, generation: int) -> bool:
        entries = self._files.entries(name)
        if not self.is_committed(entries):
            return self._is_left(name, entries, generation)
        mark = Mark.read(self._files.below(name))
        if mark is None:  # Another program's.
            return False
        sides = [entry for entry in entries if parse_side_file_name(entry.name)]
        return len(sides) > 1 or bool(self._owners(name, entries) - {_owner_of_step(mark)})

    def _is_left(self, name: str, entries: Collection[Entry], generation: int) -> bool:
        """False for what is another program's, or being written; what is old in that goes with the commit."""
        if not self._is_ours(name, entries):
            return False
        return all(owner.generation < generation for owner in self._owners(name, entries))

    def _sweep_others(self, name: str, item: str, committed: StoreOwner, below: int | None = None) -> list[str]:
        """Removes stores of attempts that did not become this step: of earlier generations and attempts."""
        # Its generation's other attempts can commit no more, what later ones write is theirs.
        latest = max(committed.generation, (below or 0) - 1)
        removed = self._delete_stores(
            f"{name}/{item}", lambda found: found != committed and found.generation <= latest
        )
        for entry in self._files.entries(name):
            said = parse_side_file_name(entry.name)
            if said and said < (committed.generation, committed.nonce):
                self._files.delete(f"{name}/{entry.name}")
        return removed

    def _delete_stores(self, item: str, wanted: Callable[[StoreOwner], bool]) -> list[str]:
        """Deletes writers' stores, those of a thousand writers by as many requests as those of one."""
        names = [
            entry.name
            for entry in self._files.entries(item)
            if (owner := parse_store_name(entry.name)) is not None and wanted(owner)
        ]
        if names:
            given_up = set(names)
            pages = self._files.walk(item)
            self._files.delete_many(
                f"{item}/{path}" for page in pages for path in page if path.partition("/")[0] in given_up
            )
        return [f"{item}/{name}" for name in names]

    def _is_ours(self, name: str, entries: Collection[Entry]) -> bool:
        if any(e.name in OUR_FILES or parse_side_file_name(e.name) for e in entries):
            return True
        return bool(self._owners(name, entries))

    def _owners(self, name: str, entries: Collection[Entry]) -> set[StoreOwner]:
        found = (
            parse_store_name(store.name)
            for item in _items(entries)
            for store in self._files.entries(f"{name}/{item}")
        )
        return {owner for owner in found if owner is not None}


class _Marked:
    """Puts objects over what was there when it was made, and over nothing else, as long as it is its turn.

    One that wakes up late finds everything replaced, or the turn taken, and stops.

    `versions`: by path, the version that it replaces, None where it creates.
    """

    def __init__(
        self,
        files: VersionedFiles,
        turn: Turn,
        attempt: Attempt,
        versions: Mapping[str, str | None],
        tidy: Callable[[], None],
    ) -> None:
        self._files = files
        self._turn = turn
        self._attempt = attempt
        self._versions = dict(versions)
        self._written: dict[str, str] = {}
        self._tidy = tidy

    def write(self, path: str, data: bytes) -> None:
        try:
            self._put(path, data, self._versions[path])
        except PersistentStoreError:
            # Somebody who had the turn before: looked at first, so that nothing of a later one is replaced.
            version = self._files.version(path)
            self._turn.check()
            self._put(path, data, version)
        if not self._is_alone and not self._is_still_alone():
            raise self._withdrawn(path)

    def publish(self, digests: Mapping[str, str]) -> bool:
        attempt = self._attempt
        mark = Mark(attempt.step_id, attempt.generation.nonce, attempt.ordinal, digests)
        self.write(f"{attempt.item}/{ORBAX_COMMIT_FILE}", mark.to_bytes())
        self._turn.publish(mark)
        if not self._files.create(ORBAX_COMMIT_FILE, mark.to_bytes()) and Mark.read(self._files) != mark:
            if not self._is_alone:
                raise self._withdrawn(ORBAX_COMMIT_FILE)
            raise interfered(self._files, ORBAX_COMMIT_FILE, attempt)
        if not self._is_alone:
            self._check_unmixed()
        if not self._turn.is_mine():
            # Deleted as a committed step, or not found whole: a marker that came after that is of nothing.
            if Mark.read(self._files) == mark:
                raise self._withdrawn(ORBAX_COMMIT_FILE)
            raise interfered(self._files, ORBAX_COMMIT_FILE, attempt)
        self._tidy()
        return True

    def _put(self, path: str, data: bytes, version: str | None) -> None:
        self._written[path] = put_over(self._files, path, data, version, self._attempt)

    @property
    def _is_alone(self) -> bool:
        """Whether nobody can come between look and put."""
        return self._files.honours_conditions()

    def _is_still_alone(self) -> bool:
        return self._turn.is_mine() and self._files.version(ORBAX_COMMIT_FILE) is None

    def _check_unmixed(self) -> None:
        for path, version in self._written.items():
            if self._files.version(path) != version:
                raise self._withdrawn(path)

    def _withdrawn(self, path: str) -> PersistentStoreError:
        """Makes no step of what two committers have put over each other."""
        self._files.delete(ORBAX_COMMIT_FILE)
        return interfered(self._files, path, self._attempt)


def _rank(path: str, generation: int) -> int | None:
    """When an object of a step of this generation is deleted, 0 first; None where it stays."""
    top, _, rest = path.partition("/")
    if not rest:
        said = parse_side_file_name(top)
        if said is not None:
            return 3 if said[0] <= generation else None
        return 3 if top in OUR_FILES else 1
    if top not in ITEM_NAMES:
        return 1
    owner = parse_store_name(rest.partition("/")[0])
    if owner is not None:
        return 2 if owner.generation <= generation else None
    return 0 if rest == ORBAX_COMMIT_FILE else 1


def _owner_of_step(mark: Mark) -> StoreOwner:
    return StoreOwner(mark.step_id.generation, mark.nonce, mark.ordinal)


def _items(entries: Collection[Entry]) -> list[str]:
    return [entry.name for entry in entries if entry.is_directory and entry.name in ITEM_NAMES]
