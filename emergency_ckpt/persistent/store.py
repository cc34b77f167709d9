"""The persistent root: run id, generations, activations, committed steps and attempts at writing one.

The only place that knows the names in the root. A step is committed when its directory has its final name; an
attempt lives under a name that carries its generation and nonce, so that what an old one left never mixes in.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import uuid
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from emergency_ckpt.core.lineage import Activation, Deletion, StepId, is_void
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError, StaleGenerationError
from emergency_ckpt.persistent.files import Files, LocalFiles
from emergency_ckpt.persistent.origins import Origins
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.records import (
    Generation,
    read_activation,
    read_deletion,
    read_generation,
    record_number,
)
from emergency_ckpt.persistent.step_files import (
    CLAIM_FILE,
    ITEM_NAMES,
    ORBAX_TREE_FILE,
    parse_side_file_name,
    seal,
)

_RECORDS = "emergency_ckpt"
_RUN_ID = f"{_RECORDS}/run_id"
_GENERATIONS = f"{_RECORDS}/generations"
_ACTIVATIONS = f"{_RECORDS}/activations"
_DELETION = f"{_RECORDS}/deletion.json"
_RECORD = re.compile(r"(\d{8,})\.json")
_TEMPORARY = ".orbax-checkpoint-tmp"
_ATTEMPT = re.compile(r".+\.orbax-checkpoint-tmp-(?:g(\d+)-[0-9a-f]+-\d+|removed-[0-9a-f]+)")
# Orbax's name, and the one that its early versions used.
_ROOT_METADATA, _OLD_ROOT_METADATA = "metadata/_ROOT_METADATA", "metadata/metadata"
_ROOT_METADATA_FIELDS = ("internal_metadata", "custom_metadata")
_MINT_TRIES = 1000
_REPLACE_TRIES = 10
UNKNOWN_NONCE = "unknown"


@dataclasses.dataclass(frozen=True, slots=True)
class StepNames:
    """How step directories are called: as Orbax's standard name format with the same prefix and length."""

    prefix: str | None = None
    digits: int | None = None

    def name(self, step: int) -> str:
        return f"{self.prefix}_" * (self.prefix is not None) + f"{step:0{self.digits or 0}d}"

    def step(self, name: str) -> int | None:
        """The step that a directory of this name holds, None if it holds none."""
        number = name[len(self.prefix) + 1 :] if self.prefix is not None else name
        if not (number.isascii() and number.isdigit()):
            return None
        return int(number) if self.name(int(number)) == name else None


@dataclasses.dataclass(frozen=True, slots=True)
class PersistentStep:
    """A committed step. `nonce` is that of the generation that wrote it, None if another program or run did."""

    step_id: StepId
    path: Path
    item: str
    nonce: str | None

    @property
    def written_by_us(self) -> bool:
        return self.nonce is not None


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One try at writing one step; a further try of the same generation takes another `ordinal`.

    `by` is the later generation that writes the step, where that is not the one that saved it: a life that
    ended before it had saved anything leaves the step that it was to go on from.
    """

    generation: Generation
    step: int
    item: str
    ordinal: int = 0
    by: Generation | None = None

    @property
    def step_id(self) -> StepId:
        return StepId(self.generation.number, self.step)

    def __str__(self) -> str:
        return f"attempt {self.ordinal} at {self.step_id}"


class PersistentStore:
    """The persistent directory of one run. Every method is local to the calling process.

    Raises PersistentStoreError when the store cannot be read or written, CorruptDataError for a damaged record.
    """

    def __init__(
        self, root: str | os.PathLike[str], names: StepNames | None = None, files: Files | None = None
    ):
        self.root = Path(root)
        self.names = names or StepNames()
        self.files: Files = files or LocalFiles(root)
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
        text = self.files.read(_RUN_ID).decode(errors="replace").strip()
        try:
            return str(uuid.UUID(text))
        except ValueError as error:
            raise CorruptDataError(
                f"{self.files.locate(_RUN_ID)} should hold a UUID but holds {text[:50]!r}."
                " If no job uses this directory, delete that file."
            ) from error

    def known_run_id(self) -> str:
        """The id of the run where a job has begun one in this root; empty where none has."""
        try:
            return self.run_id() if self.files.read(_RUN_ID).strip() else ""
        except FileNotFoundError:
            return ""

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
        return StepReader(self.files.below(step.path.name), step.item, directory_step=step.step_id.step)

    def delete_step(self, step: PersistentStep) -> None:
        """Deletes a committed step. It disappears at once; its bytes follow."""
        self._remove(step.path.name)

    # Attempts.

    def begin(self, attempt: Attempt) -> None:
        """Makes the attempt's directory. Every process that writes a part may call this."""
        self.files.make_directory(f"{self._attempt_name(attempt)}/{attempt.item}")

    def attempt_files(self, attempt: Attempt) -> Files:
        """The files of an uncommitted step."""
        return self.files.below(self._attempt_name(attempt))

    def commit(self, attempt: Attempt) -> PersistentStep:
        """Gives a written attempt the name of its step. One process calls this, after everything is in place.

        A void step in the way is replaced. If the same attempt's step is there already, nothing happens.
        Raises StaleGenerationError when a newer generation exists, PersistentStoreError when a step that is
        not void is in the way.
        """
        self.check_generation(attempt)
        source, target = self._attempt_name(attempt), self.names.name(attempt.step)
        for _ in range(_REPLACE_TRIES):
            try:
                self.files.commit(source, target)
                return self._committed(attempt)
            except FileNotFoundError as error:
                held = self._step_in(target, attempt.step)
                if held and self._is_of(held, attempt):
                    return held
                raise PersistentStoreError(
                    f"{attempt} has lost its directory {self.files.locate(source)}: somebody removed it."
                    " Write the step again with another attempt."
                ) from error
            except FileExistsError:
                held = self._step_in(target, attempt.step)
                if held and self._is_of(held, attempt):
                    self._remove(source)
                    return held
                if held and not is_void(held.step_id, self.activations()):
                    raise PersistentStoreError(
                        f"{self.files.locate(target)} holds {held.step_id}, which no restore made void, so"
                        f" {attempt} cannot take its place. Delete that step, or save under another number."
                    ) from None
                self._remove(target)
        raise PersistentStoreError(
            f"{self.files.locate(target)} was replaced {_REPLACE_TRIES} times while {attempt} was committed:"
            " several jobs are writing to this directory. Stop all but one."
        )

    def is_committed(self, attempt: Attempt) -> bool:
        """Whether the step of this attempt is there, be it by another attempt of the same generation."""
        name = self.names.name(attempt.step)
        if not self.files.entries(name):
            return False
        held = self._step_in(name, attempt.step)
        return held is not None and self._is_of(held, attempt)

    def is_claimed(self, attempt: Attempt) -> bool:
        """Whether a committer is, or was, at work on an attempt: then all its parts were there."""
        return any(entry.name == CLAIM_FILE for entry in self.attempt_files(attempt).entries())

    def check_generation(self, attempt: Attempt) -> None:
        """Raises StaleGenerationError unless the newest generation of the run makes this attempt.

        A step of an earlier one is refused, too, once a restore has left it behind.
        """
        newest = self.newest_generation()
        writer = attempt.by or attempt.generation
        mine = (writer.number, writer.nonce)
        if newest is None or (newest.number, newest.nonce) != mine:
            found = f"{newest.number} ({newest.nonce})" if newest else "no generation"
            raise StaleGenerationError(
                f"{attempt} is refused: it is of generation {writer.number}"
                f" ({writer.nonce}), the newest in {self.files.locate()} is {found}."
                " Another job has taken over this directory; end this one."
            )
        if attempt.by is not None and is_void(attempt.step_id, self.activations()):
            raise StaleGenerationError(
                f"{attempt} is refused: a restore left {attempt.step_id} behind, the run goes on from an older"
                " step"
            )

    def abandon(self, attempt: Attempt) -> None:
        """Removes what an attempt has written so far."""
        self._remove(self._attempt_name(attempt))

    def remove_leftovers(self, current: Generation) -> list[str]:
        """Removes attempts of generations older than `current` and half-deleted steps; returns their names.

        Attempts of `current` stay, since they may be in progress, and so does what other programs write (see
        `remove_foreign_leftovers`).
        """
        removed = []
        for entry in self.files.entries():
            match = _ATTEMPT.fullmatch(entry.name)
            if match and entry.is_directory and int(match[1] or 0) < current.number:
                self.files.delete_tree(entry.name)
                removed.append(entry.name)
        return removed

    def remove_foreign_leftovers(self) -> list[str]:
        """Removes steps that other programs left temporary, by Orbax's naming; returns their names.

        Attempts of this package stay, of whatever generation. A program that is still writing loses its step.
        """
        removed = []
        for entry in self.files.entries():
            if entry.is_directory and _TEMPORARY in entry.name and not _ATTEMPT.fullmatch(entry.name):
                self.files.delete_tree(entry.name)
                removed.append(entry.name)
        return removed

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
        return PersistentStep(
            attempt.step_id,
            self.root / self.names.name(attempt.step),
            attempt.item,
            attempt.generation.nonce,
        )

    def _is_of(self, held: PersistentStep, attempt: Attempt) -> bool:
        return (held.step_id, held.nonce) == (attempt.step_id, attempt.generation.nonce)

    def _step_in(self, name: str, step: int) -> PersistentStep | None:
        """The step that a committed directory holds; None, with a log line, if it holds no state we know."""
        entries = self.files.entries(name)
        items = [item for item in ITEM_NAMES if any(e.name == item and e.is_directory for e in entries)]
        if not items and any(e.name == ORBAX_TREE_FILE for e in entries):
            items = [""]
        if not items:
            logging.warning(
                "%s holds no item named %s: not used.", self.files.locate(name), " or ".join(ITEM_NAMES)
            )
            return None
        ours = sorted(filter(None, (parse_side_file_name(e.name) for e in entries)))
        if not ours or self._origins.is_foreign(name, *ours[-1]):
            return PersistentStep(StepId(0, step), self.root / name, items[0], None)
        generation, nonce = ours[-1]
        return PersistentStep(StepId(generation, step), self.root / name, items[0], nonce)

    def _attempt_name(self, attempt: Attempt) -> str:
        generation = attempt.generation
        name = self.names.name(attempt.step)
        return f"{name}{_TEMPORARY}-g{generation.number}-{generation.nonce}-{attempt.ordinal}"

    def _remove(self, name: str) -> None:
        """Takes a directory out of sight in one operation, then deletes it."""
        aside = f"{name.partition(_TEMPORARY)[0]}{_TEMPORARY}-removed-{uuid.uuid4().hex}"
        try:
            self.files.commit(name, aside)
        except FileNotFoundError:
            return
        self.files.delete_tree(aside)

    def _record_names(self, directory: str) -> list[str]:
        names = [e.name for e in self.files.entries(directory) if _RECORD.fullmatch(e.name)]
        return sorted(names, key=record_number)


def without_void(steps: Iterable[PersistentStep], activations: Collection[Activation]) -> list[PersistentStep]:
    """The steps that no restore left behind, in the same order."""
    return [step for step in steps if not is_void(step.step_id, activations)]
