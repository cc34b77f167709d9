"""The persistent root: run id, generations, activations, committed steps and attempts at writing one.

Where attempts lie, and how one becomes a step at once, depends on the kind of store: see `placing`.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from absl import logging

from emergency_ckpt.core.lineage import Activation, Deletion, StepId, is_void
from emergency_ckpt.errors import (
    CorruptDataError,
    PersistentStoreError,
    StaleGenerationError,
    StepOccupiedError,
)
from emergency_ckpt.persistent.attempts import Attempt, HiddenStep, PersistentStep, StepNames
from emergency_ckpt.persistent.conditions import with_recorded_conditions
from emergency_ckpt.persistent.files import Entry, Files, RenamingFiles, VersionedFiles
from emergency_ckpt.persistent.latest import read_latest, write_latest
from emergency_ckpt.persistent.marked_steps import MarkedSteps
from emergency_ckpt.persistent.object_store.opening import open_files
from emergency_ckpt.persistent.object_store.operations import Limits
from emergency_ckpt.persistent.origins import Origins
from emergency_ckpt.persistent.placing import Placement, Placing, RenamedSteps, StepCommittedError
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.records import (
    ACTIVATIONS,
    GENERATIONS,
    RUN_ID_FILE,
    Generation,
    read_activation,
    read_deletion,
    read_generation,
    record_number,
)
from emergency_ckpt.persistent.side_by_side import side_by_side
from emergency_ckpt.persistent.step_files import (
    CLAIM_FILE,
    ITEM_NAMES,
    ORBAX_TREE_FILE,
    Mark,
    parse_side_file_name,
    seal,
)

_RECORDS = "emergency_ckpt"
_RUN_ID, _GENERATIONS, _ACTIVATIONS = RUN_ID_FILE, GENERATIONS, ACTIVATIONS
_DELETION = f"{_RECORDS}/deletion.json"
_RECORD = re.compile(r"(\d{8,})\.json")
_ATTEMPTS = f"{_RECORDS}/attempts"
_REMOVED = f"{_RECORDS}/removed"
# Orbax's name, and the one that its early versions used.
_ROOT_METADATA, _OLD_ROOT_METADATA = "metadata/_ROOT_METADATA", "metadata/metadata"
_ROOT_METADATA_FIELDS = ("internal_metadata", "custom_metadata")
_MINT_TRIES = 1000
_REPLACE_TRIES = 10
_REMOVED_AT_A_TIME = 4
UNKNOWN_NONCE = "unknown"


class PersistentStore:
    """The persistent directory of one run. Every method is local to the calling process.

    Raises PersistentStoreError when the store cannot be read or written, CorruptDataError for a damaged record.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        names: StepNames | None = None,
        files: Files | None = None,
        limits: Limits | None = None,
    ):
        self.names = names or StepNames()
        self.files: Files = with_recorded_conditions(files or open_files(root, limits))
        self._placing: Placing = (
            RenamedSteps(self.files, self.names, _REMOVED)
            if isinstance(self.files, RenamingFiles)
            else MarkedSteps(cast(VersionedFiles, self.files), self.names, _ATTEMPTS)
        )
        self._origins = Origins(self.files, _RUN_ID, _GENERATIONS)

    # Run, generations, activations.

    def run_id(self) -> str:
        """The id of the run in this root, made if there is none; all callers get the same one.

        An empty file is what a crash left on a file system without hard links: no job has got an id from it.
        """
        fresh = f"{uuid.uuid4()}\n".encode()
        if not self.files.create(_RUN_ID, fresh) and not self.files.read(_RUN_ID).strip():
            logging.warning("%s is empty and is written again.", self.files.locate(_RUN_ID))
            self.files.write(_RUN_ID, fresh)
        return self._run_id_in(self.files.read(_RUN_ID))

    def known_run_id(self) -> str:
        """The id of the run where a job has begun one in this root; empty where none has. Writes nothing."""
        try:
            data = self.files.read(_RUN_ID)
        except FileNotFoundError:
            return ""
        return self._run_id_in(data) if data.strip() else ""

    def _run_id_in(self, data: bytes) -> str:
        text = data.decode(errors="replace").strip()
        try:
            return str(uuid.UUID(text))
        except ValueError as error:
            raise CorruptDataError(
                f"{self.files.locate(_RUN_ID)} should hold a UUID but holds {text[:50]!r}."
                " If no job uses this directory, delete that file."
            ) from error

    def mint_generation(self, highest_seen: int, parent: StepId | None) -> Generation:
        """A new generation, higher than `highest_seen` and every other. One process of a job calls this."""
        newest = self.newest_generation()
        number = max(highest_seen, newest.number if newest else 0) + 1
        for candidate in range(number, number + _MINT_TRIES):
            generation = Generation(candidate, uuid.uuid4().hex[:12], parent)
            content = {
                "number": candidate,
                "nonce": generation.nonce,
                "parent": [parent.generation, parent.step] if parent else None,
            }
            if self.files.create(f"{_GENERATIONS}/{candidate:08d}.json", seal(content)):
                return generation
        raise PersistentStoreError(
            f"no free generation number from {number} to {number + _MINT_TRIES - 1} in"
            f" {self.files.locate(_GENERATIONS)}: are jobs starting in an endless loop?"
        )

    def newest_generation(self) -> Generation | None:
        """The generation that was minted last.

        A newest record that cannot be read is one whose writer died: its number is used up, its nonce unknown.
        """
        names = self._record_names(_GENERATIONS)
        if not names:
            return None
        path = f"{_GENERATIONS}/{names[-1]}"
        try:
            return read_generation(self.files, path)
        except CorruptDataError as error:
            logging.warning("%s is unreadable; its number is passed over: %s", self.files.locate(path), error)
            return Generation(record_number(names[-1]), UNKNOWN_NONCE)

    def generation(self, number: int) -> Generation | None:
        """The generation of this number; None where there is no record of it, or none that can be read."""
        try:
            return read_generation(self.files, f"{_GENERATIONS}/{number:08d}.json")
        except (FileNotFoundError, CorruptDataError):
            return None

    def parents(self) -> dict[int, StepId]:
        """By generation, the step that it was to be restored from; reads all records that can be read."""
        found: dict[int, StepId] = {}
        for name in self._record_names(_GENERATIONS):
            path = f"{_GENERATIONS}/{name}"
            try:
                generation = read_generation(self.files, path)
            except CorruptDataError as error:
                logging.warning("%s is unreadable; it is passed over: %s", self.files.locate(path), error)
                continue
            if generation.parent is not None:
                found[generation.number] = generation.parent
        return found

    def record_activation(self, activation: Activation) -> None:
        """Records that all processes hold the state from which this generation begins. Repeating it is fine.

        A record that is there although the store reported an error counts: whoever starts next would find it.
        """
        path = f"{_ACTIVATIONS}/{activation.generation:08d}.json"
        content = {"generation": activation.generation, "step": activation.step}
        self._withdraw_unreadable_activation()
        try:
            created = self.files.create(path, seal(content))
        except PersistentStoreError:
            if activation not in self.activations():
                raise
            return
        if created:
            return
        found = read_activation(self.files, path)
        if found is None:
            self.files.write(path, seal(content))
        elif found != activation:
            raise PersistentStoreError(
                f"{self.files.locate(path)} says that generation {found.generation} began from step"
                f" {found.step}, not {activation.step}: two jobs use the same generation. Start the job again."
            )

    def activations(self) -> tuple[Activation, ...]:
        """All activations, oldest first.

        A newest record that cannot be read is one whose writer died before it was done: it does not count.
        """
        found: list[Activation] = []
        names = self._record_names(_ACTIVATIONS)
        for name in names:
            path = f"{_ACTIVATIONS}/{name}"
            try:
                activation = read_activation(self.files, path)
            except CorruptDataError as error:
                if name != names[-1]:
                    raise
                logging.warning("%s is unreadable and does not count: %s", self.files.locate(path), error)
                continue
            if activation is not None:
                found.append(activation)
        return tuple(found)

    def record_deletion(self, deletion: Deletion | None) -> None:
        """Records that steps were deleted on purpose; None: that no longer counts. One process calls this."""
        if deletion is None:
            if self.deletion() is not None:
                self.files.write(_DELETION, seal({"withdrawn": True}))
            return
        whole = deletion.after(self.deletion())
        newest = [whole.newest.generation, whole.newest.step] if whole.newest else None
        content = {"upto": [whole.upto.generation, whole.upto.step], "newest": newest}
        self.files.write(_DELETION, seal(content))

    def deletion(self) -> Deletion | None:
        """What was deleted on purpose. A record that cannot be read does not count: then too much is missed."""
        try:
            return read_deletion(self.files, _DELETION)
        except FileNotFoundError:
            return None
        except CorruptDataError as error:
            logging.warning("%s is unreadable and does not count: %s", self.files.locate(_DELETION), error)
            return None

    def _withdraw_unreadable_activation(self) -> None:
        """Marks an unreadable newest record as withdrawn, before a newer one makes it look like damage."""
        names = self._record_names(_ACTIVATIONS)
        if not names:
            return
        path = f"{_ACTIVATIONS}/{names[-1]}"
        try:
            read_activation(self.files, path)
        except CorruptDataError:
            self.files.write(path, seal({"generation": record_number(names[-1]), "withdrawn": True}))

    # Committed steps.

    def steps(self) -> list[PersistentStep]:
        """Every committed step, oldest first, void ones included (see `without_void`)."""
        found = []
        for entry in self.files.entries():
            step = self.names.step(entry.name) if entry.is_directory else None
            if step is not None and (held := self._step_in(entry.name, step)):
                found.append(held)
        return sorted(found, key=lambda s: s.step_id)

    def open_step(self, step: PersistentStep) -> StepReader:
        """A reader of a committed step, which must be the one that the directory's name says."""
        return StepReader(self.files.below(step.name), step.item, directory_step=step.step_id.step)

    def delete_step(self, step: PersistentStep) -> None:
        """Deletes a committed step. It disappears at once; its bytes follow."""
        if (hidden := self.hide_step(step)) is not None:
            self.clear(hidden)

    def delete_steps(self, steps: Iterable[PersistentStep]) -> None:
        """Deletes committed steps, some at a time, when all of them have disappeared."""
        hidden = [each for step in steps if (each := self.hide_step(step)) is not None]
        side_by_side(self.clear, hidden, _REMOVED_AT_A_TIME, "deleting steps")

    def hide_step(self, step: PersistentStep) -> HiddenStep | None:
        """Takes a committed step out of sight; its bytes are for `clear`. None where it is gone already."""
        directory = self._placing.hide(step.name, step.step_id.generation)
        return None if directory is None else HiddenStep(directory, step.step_id.generation)

    def clear(self, hidden: HiddenStep, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Deletes the bytes of a step that was hidden; False where `stopped` ended that before it was done.

        Nobody may commit a step in its directory meanwhile. What is left is a leftover to the next generation.
        """
        return self._placing.clear(hidden.directory, hidden.generation, stopped)

    def latest(self) -> PersistentStep | None:
        """The step that the pointer names, which is there; None where it names none. There may be newer ones.

        Two or three requests, however many steps there are.
        """
        said = read_latest(self.files)
        if said is None or self.names.name(said.step_id.step) != said.name:
            return None
        held = self._step_in(said.name, said.step_id.step) if self.files.entries(said.name) else None
        return held if held is not None and held.step_id == said.step_id else None

    def point_at(self, step: PersistentStep) -> None:
        """Lets the pointer name this step, unless it names a newer one that is there."""
        said = self.latest()
        if said is None or said.step_id < step.step_id:
            write_latest(self.files, step.step_id, step.name)

    # Attempts.

    def begin(self, attempt: Attempt) -> None:
        """Prepares the attempt's directory. Every process that writes a part may call this."""
        self._placing.begin(attempt)

    def attempt_files(self, attempt: Attempt) -> Files:
        """The files of an uncommitted step."""
        return self.files.below(self._placing.directory(attempt))

    def attempt_records(self, attempt: Attempt) -> Files:
        """The files by which the writers of an attempt and its committer know of each other."""
        return self.files.below(self._placing.records(attempt))

    def is_open(self, attempt: Attempt) -> bool:
        """Whether somebody may be waiting for a part of the attempt."""
        return self._placing.is_open(attempt)

    def place(self, attempt: Attempt, paths: Sequence[str]) -> Placement:
        """What the committer of an attempt writes these files with. One process calls this.

        Raises as `commit` does.
        """
        self.check_generation(attempt)
        return self._placing.place(attempt, paths, lambda: self._check_void(attempt))

    def commit(self, attempt: Attempt, placement: Placement, digests: Mapping[str, str]) -> PersistentStep:
        """Makes a written attempt a step. One process calls this, after everything is in place.

        A void step in the way is replaced. If the same attempt's step is there already, nothing happens.
        Raises StaleGenerationError when a newer generation exists, StepOccupiedError when a step that is not
        void is in the way.
        """
        self.check_generation(attempt)
        aside: list[HiddenStep] = []
        try:
            committed = self._commit(attempt, placement, digests, aside)
            self._point_at_committed(committed)
            return committed
        finally:
            for hidden in aside:
                try:
                    self.clear(hidden)
                except PersistentStoreError as error:
                    logging.warning("what was in the way of %s is left to the next start: %s", attempt, error)

    def _point_at_committed(self, step: PersistentStep) -> None:
        try:
            write_latest(self.files, step.step_id, step.name)
        except PersistentStoreError as error:
            logging.warning("%s is committed; the pointer to it could not be written: %s", step.step_id, error)

    def _commit(
        self, attempt: Attempt, placement: Placement, digests: Mapping[str, str], aside: list[HiddenStep]
    ) -> PersistentStep:
        """`aside`: gets what has to be cleared afterwards."""
        name = self.names.name(attempt.step)
        for _ in range(_REPLACE_TRIES):
            try:
                if placement.publish(digests):
                    return self._committed(attempt)
            except FileNotFoundError as error:
                if held := self.committed(attempt):
                    return held
                raise PersistentStoreError(
                    f"{attempt} has lost its directory {self.files.locate(self._placing.directory(attempt))}:"
                    " somebody removed it. Write the step again with another attempt."
                ) from error
            held = self._step_in(name, attempt.step)
            if held and self._is_of(held, attempt):
                self._placing.abandon(attempt)
                return held
            self._make_way(name, attempt, aside)
        raise PersistentStoreError(
            f"{self.files.locate(name)} was replaced {_REPLACE_TRIES} times while {attempt} was committed:"
            " several jobs are writing to this directory. Stop all but one."
        )

    def _make_way(self, name: str, attempt: Attempt, aside: list[HiddenStep]) -> None:
        """Removes a void step, or what is none, whose place an attempt takes; nothing else is touched.

        Of a directory that another attempt takes away while it is read a part is seen. What two looks agree on
        counts: the second one begins after the first, and so at a directory that is still there.
        """
        looks: list[PersistentStep | None] = []
        for _ in range(2):
            if not self.files.entries(name):
                return
            looks.append(self._step_in(name, attempt.step))
        held = looks[1]
        if held != looks[0] or (held and self._is_of(held, attempt)):
            return
        self._check_is_void(held, attempt)
        identity = f"g{held.step_id.generation}-{held.nonce}" if held else "unknown"
        if (directory := self._placing.make_way(name, identity, attempt)) is not None:
            aside.append(HiddenStep(directory, attempt.generation.number - 1))

    def _check_void(self, attempt: Attempt) -> None:
        if self.committed(attempt):
            raise StepCommittedError(f"{attempt}: another attempt has just committed the step")
        self._check_is_void(self._step_in(self.names.name(attempt.step), attempt.step), attempt)

    def _check_is_void(self, held: PersistentStep | None, attempt: Attempt) -> None:
        if held and not is_void(held.step_id, self.activations()):
            raise StepOccupiedError(
                f"{held.location} holds {held.step_id}, which no restore made void, so"
                f" {attempt} cannot take its place. Delete that step, or save under another number."
            )

    def committed(self, attempt: Attempt) -> PersistentStep | None:
        """The step of this attempt where it is there, be it by another attempt of the same generation."""
        name = self.names.name(attempt.step)
        if not self.files.entries(name):
            return None
        held = self._step_in(name, attempt.step)
        return held if held is not None and self._is_of(held, attempt) else None

    def is_claimed(self, attempt: Attempt) -> bool:
        """Whether a committer is, or was, at work on an attempt: then all its parts were there."""
        return any(entry.name == CLAIM_FILE for entry in self.attempt_records(attempt).entries())

    def check_generation(self, attempt: Attempt) -> None:
        """Raises StaleGenerationError unless the newest generation of the run makes this attempt.

        A step of an earlier one is refused, too, once a restore has left it behind. Raises PersistentStoreError
        where nothing tells which is the newest: that may pass.
        """
        newest = self.newest_generation()
        if newest is None:
            raise PersistentStoreError(
                f"{attempt} is refused: {self.files.locate()} has no record of any life of the run: it was "
                "emptied, or is not mounted here"
            )
        writer = attempt.by or attempt.generation
        mine = (writer.number, writer.nonce)
        if (newest.number, newest.nonce) != mine:
            raise StaleGenerationError(
                f"{attempt} is refused: it is of generation {writer.number}"
                f" ({writer.nonce}), the newest in {self.files.locate()} is {newest.number} ({newest.nonce})."
                " Another job has taken over this directory; end this one."
            )
        if attempt.by is not None and is_void(attempt.step_id, self.activations()):
            raise StaleGenerationError(
                f"{attempt} is refused: a restore left {attempt.step_id} behind, the run goes on from an older"
                " step"
            )

    def abandon(self, attempt: Attempt) -> None:
        """Removes what an attempt has written so far."""
        self._placing.abandon(attempt)

    def remove_leftovers(self, current: Generation) -> list[str]:
        """Removes attempts of generations older than `current` and half-deleted steps; returns their names.

        Attempts of `current` stay, since they may be in progress, and so does what other programs write (see
        `remove_foreign_leftovers`).
        """
        removed: list[str] = []
        side_by_side(
            lambda directory: removed.extend(self.remove_leftover(directory, current)),
            self.leftovers(current),
            _REMOVED_AT_A_TIME,
            "removing leftovers",
        )
        return removed

    def leftovers(self, current: Generation) -> list[str]:
        """Directories in which there may be something that `remove_leftovers` removes."""
        return self._placing.leftovers(current.number)

    def remove_leftover(self, directory: str, current: Generation) -> list[str]:
        """Does what `remove_leftovers` does in one of these. Nobody may commit in it meanwhile."""
        return self._placing.sweep(directory, current.number)

    def remove_foreign_leftovers(self) -> list[str]:
        """Removes steps that other programs left uncommitted; returns their names.

        Attempts of this package stay, of whatever generation. A program that is still writing loses its step.
        """
        return self._placing.sweep_foreign()

    # What describes all steps.

    def root_metadata(self) -> dict[str, Any] | None:
        """The user's metadata of the whole directory, as Orbax keeps it; None where there is none."""
        for path in _ROOT_METADATA, _OLD_ROOT_METADATA:
            try:
                content = json.loads(self.files.read(path))
            except FileNotFoundError:
                continue
            except (ValueError, RecursionError) as error:
                raise CorruptDataError(
                    f"{self.files.locate(path)} is damaged: it is not JSON ({error})."
                    " Delete it to go on without."
                ) from error
            if not isinstance(content, dict) or not isinstance(content.get("custom_metadata") or {}, dict):
                raise CorruptDataError(
                    f"{self.files.locate(path)} should hold a JSON object with 'custom_metadata'."
                    " Delete it to go on without."
                )
            # Early versions wrote the user's fields at the top.
            others = {key: value for key, value in content.items() if key not in _ROOT_METADATA_FIELDS}
            return {**others, **(content.get("custom_metadata") or {})}
        return None

    def create_root_metadata(self, custom_metadata: Mapping[str, Any]) -> bool:
        """Writes the metadata of the directory unless there is some; says whether it did."""
        if self.root_metadata() is not None:
            return False
        content = {"internal_metadata": {}, "custom_metadata": dict(custom_metadata)}
        return self.files.create(_ROOT_METADATA, json.dumps(content).encode())

    def _committed(self, attempt: Attempt) -> PersistentStep:
        name = self.names.name(attempt.step)
        nonce = attempt.generation.nonce
        return PersistentStep(attempt.step_id, name, self.files.locate(name), attempt.item, nonce)

    def _is_of(self, held: PersistentStep, attempt: Attempt) -> bool:
        return (held.step_id, held.nonce) == (attempt.step_id, attempt.generation.nonce)

    def _step_in(self, name: str, step: int) -> PersistentStep | None:
        """The step that a committed directory holds; None, with a log line, if it holds no state we know."""
        entries = self.files.entries(name)
        if not self._placing.is_committed(entries):
            return None
        items = [item for item in ITEM_NAMES if any(e.name == item and e.is_directory for e in entries)]
        if not items and any(e.name == ORBAX_TREE_FILE for e in entries):
            items = [""]
        if not items:
            logging.warning(
                "%s holds no item named %s: not used.", self.files.locate(name), " or ".join(ITEM_NAMES)
            )
            return None
        where = self.files.locate(name)
        saved_by = self._saved_by(name, entries)
        if saved_by is None:
            # One that is taken away while it is listed has lost some of its files, and is no more at that name.
            if not (again := self.files.entries(name)):
                return None
            saved_by = self._saved_by(name, again)
        if saved_by is None or self._origins.is_foreign(name, *saved_by):
            return PersistentStep(StepId(0, step), name, where, items[0], None)
        generation, nonce = saved_by
        return PersistentStep(StepId(generation, step), name, where, items[0], nonce)

    def _saved_by(self, name: str, entries: Iterable[Entry]) -> tuple[int, str] | None:
        """Number and nonce of the generation that wrote a step, as its side file's name says.

        Of several, left by attempts that came to nothing, the marker names the one.
        """
        ours = sorted(filter(None, (parse_side_file_name(entry.name) for entry in entries)))
        if len(ours) > 1:
            try:
                mark = Mark.read(self.files.below(name))
            except CorruptDataError:  # Whoever reads the step finds out, and says so.
                mark = None
            if mark is not None:
                return mark.step_id.generation, mark.nonce
        return ours[-1] if ours else None

    def _record_names(self, directory: str) -> list[str]:
        names = [e.name for e in self.files.entries(directory) if _RECORD.fullmatch(e.name)]
        return sorted(names, key=record_number)


def without_void(steps: Iterable[PersistentStep], activations: Collection[Activation]) -> list[PersistentStep]:
    """The steps that no restore left behind, in the same order."""
    return [step for step in steps if not is_void(step.step_id, activations)]
