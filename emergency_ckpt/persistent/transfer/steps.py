"""One step from one place to another: its files, what they are checked against, and the moment it is seen.

Nobody sees the step before all of it is there and has been read back: at the target it lies under a temporary
name (file systems), or without its marker (buckets). What a copy that was cut short has left is made use of.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np

from emergency_ckpt.core.shards import Shard, dtype_of
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.attempts import TEMPORARY
from emergency_ckpt.persistent.files import ObjectFiles, RenamingFiles
from emergency_ckpt.persistent.reader import BoxRequest, StepReader
from emergency_ckpt.persistent.run_directories import FoundStep, RunDirectory, is_scaffolding
from emergency_ckpt.persistent.step_files import (
    ORBAX_COMMIT_FILE,
    Mark,
    SideInfo,
    digest,
    read_side_info,
    side_file_name,
)
from emergency_ckpt.persistent.transfer.marks import belongs, is_in_array_store, markers_for
from emergency_ckpt.persistent.transfer.objects import Copier, Copying

_ATTEMPTS = "emergency_ckpt/attempts"
_VERIFIED_AT_ONCE = 256 * 1024**2  # at most
# Smaller files are compared byte by byte whatever else is known of them.
_SMALL_BYTES = 1024**2


@dataclasses.dataclass(frozen=True)
class StepFiles:
    """What is to be copied of one step.

    Attributes:
      sizes: of its files, by path, without the markers.
      markers: their content at the target, by path, in the order in which they are written.
      side: what our side file says, None for a step of another program; `side_bytes` is that file.
    """

    found: FoundStep
    files: ObjectFiles
    sizes: Mapping[str, int]
    markers: Mapping[str, bytes]
    side: SideInfo | None
    side_bytes: bytes

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def identity(self) -> str:
        """What tells it from every other step under this number, as far as that can be told."""
        return digest(self.side_bytes or repr(sorted(self.sizes.items())).encode())

    def is_unique(self, path: str, size: int) -> bool:
        """Whether the name of a file is of one content only, and the checksums of the arrays cover it."""
        return size > _SMALL_BYTES and self.side is not None and is_in_array_store(path, self.side.item)


def look_at(run: RunDirectory, step: FoundStep, into_bucket: bool) -> StepFiles:
    """What there is to copy of a step. Raises CorruptDataError, PersistentStoreError, FileNotFoundError."""
    files = run.files.below(step.name)
    sizes = run.sizes(step.name)
    side = read_side_info(files, [path for path in sizes if "/" not in path], step.step)
    mark = Mark.read(files) if side is not None and ORBAX_COMMIT_FILE in sizes else None
    markers = markers_for(files, side, sizes.keys(), into_bucket)
    kept = {
        path: size
        for path, size in sizes.items()
        if path not in markers and not is_scaffolding(path) and (side is None or belongs(path, side, mark))
    }
    name = side_file_name(side.step_id.generation, side.nonce) if side is not None else ""
    return StepFiles(step, files, kept, markers, side, files.read(name) if name else b"")


class StepCopy:
    """One step on its way into a run directory."""

    def __init__(
        self, step: StepFiles, target: RunDirectory, copying: Copying, copied: Callable[[int], None]
    ) -> None:
        self._step = step
        self._target = target
        self._copying = copying
        self._copied = copied
        self._name = step.found.name
        self._where = self._name if target.files.is_bucket else f"{self._name}{TEMPORARY}-copy-{step.identity}"

    def is_there(self, held: FoundStep) -> bool:
        """Whether the committed step at the target is this one, be it with files missing."""
        files = self._target.files.below(held.name)
        if self._step.side is None:
            there = look_at(self._target, held, self._target.files.is_bucket)
            return there.side is None and there.sizes == self._step.sizes and self._same_small_files(files)
        name = side_file_name(self._step.side.step_id.generation, self._step.side.nonce)
        try:
            return files.read(name) == self._step.side_bytes
        except FileNotFoundError:
            return False

    def missing(self) -> list[tuple[str, int]]:
        """The files that the committed step at the target lacks, or has with another size."""
        there = self._target.sizes(self._name)
        return [(path, size) for path, size in self._step.sizes.items() if there.get(path) != size]

    def copy(self) -> None:
        """Copies what is not there yet, reads it back, and makes it a step.

        Raises CorruptDataError for a step that is damaged, PersistentStoreError.
        """
        self._check_alone()
        into = self._target.files.below(self._where)
        self._fill(into, self._target.sizes(self._where))
        self._publish(into)

    def mend(self, everything: bool) -> None:
        """Copies into the committed step at the target what it lacks: it is the same step."""
        into = self._target.files.below(self._name)
        self._fill(into, {} if everything else self._target.sizes(self._name))

    def verify(self) -> None:
        """Reads what is at the target; raises CorruptDataError unless it is what was saved."""
        files = self._target.files.below(self._name)
        if self._step.side is not None:
            self._verify_arrays(files)
        differing = self._copier(files).differing(self._to_compare(), self._target.sizes(self._name).get)
        if differing:
            raise CorruptDataError(
                f"{files.locate(differing[0][0])} is not what {self._step.files.locate()} has"
            )

    def _fill(self, into: ObjectFiles, there: Mapping[str, int]) -> None:
        step, copier = self._step, self._copier(into)
        unique = [(p, n) for p, n in step.sizes.items() if step.is_unique(p, n) and there.get(p) != n]
        trusted = [(p, n) for p, n in step.sizes.items() if step.is_unique(p, n) and there.get(p) == n]
        wanted = unique + copier.differing(self._to_compare(), there.get)
        copier.copy(wanted, lambda path, size: not step.is_unique(path, size))
        if step.side is None:
            return
        try:
            self._verify_arrays(into)
        except CorruptDataError:
            if not trusted:
                self._blame_source()
                raise
            # What an earlier copy has left there was not whole.
            copier.copy(trusted, lambda path, size: True)
            self._verify_arrays(into)

    def _blame_source(self) -> None:
        """Raises CorruptDataError if what is copied is damaged where it comes from."""
        self._verify_arrays(self._step.files)

    def _verify_arrays(self, files: ObjectFiles) -> None:
        verify_arrays(files, self._step.found.step, min(self._copying.memory_bytes, _VERIFIED_AT_ONCE))

    def _publish(self, into: ObjectFiles) -> None:
        markers = dict(self._step.markers)
        if not into.is_bucket:
            for path, data in markers.items():
                into.write(path, data)
            _remove_others(Path(into.locate()), {*self._step.sizes, *markers})
            try:
                cast(RenamingFiles, self._target.files).rename(self._where, self._name)
            except FileExistsError as error:
                raise PersistentStoreError(
                    f"{self._target.files.locate(self._name)} was made by somebody else meanwhile. End the job"
                    " at the target, then copy again."
                ) from error
            return
        last = markers.pop(ORBAX_COMMIT_FILE)
        for path, data in markers.items():
            into.write(path, data)
        if not into.create(ORBAX_COMMIT_FILE, last) and into.read(ORBAX_COMMIT_FILE) != last:
            raise PersistentStoreError(
                f"{into.locate(ORBAX_COMMIT_FILE)} was put by somebody else meanwhile. End the job at the"
                " target, delete that step, then copy again."
            )

    def _check_alone(self) -> None:
        """In a bucket what an attempt has written lies where the step will: it is not written over."""
        files = self._target.files
        if not files.is_bucket:
            return
        attempts = [e.name for e in files.entries(_ATTEMPTS) if e.name.startswith(f"{self._name}-g")]
        if attempts:
            raise PersistentStoreError(
                f"{files.locate(_ATTEMPTS)} says that a job is, or was, writing {self._name}/ there"
                f" ({attempts[0]}). End the job at the target; if none runs, delete that record. Then copy"
                " again."
            )
        kept = {*self._step.sizes, *self._step.markers}
        into = files.below(self._name)
        files.store.delete_many(
            [into.inside() + path for path in self._target.sizes(self._name) if path not in kept]
        )

    def _to_compare(self) -> list[tuple[str, int]]:
        return [(p, n) for p, n in self._step.sizes.items() if not self._step.is_unique(p, n)]

    def _same_small_files(self, files: ObjectFiles) -> bool:
        small = [(path, size) for path, size in self._step.sizes.items() if size <= _SMALL_BYTES]
        return not self._copier(files).differing(small, lambda path: self._step.sizes[path])

    def _copier(self, into: ObjectFiles) -> Copier:
        return Copier(self._step.files, into, self._copying, self._copied)


def verify_arrays(files: ObjectFiles, step: int, at_once: int) -> None:
    """Reads all shards of a step of ours, committed or not; raises CorruptDataError unless all are as saved.

    `at_once`: bytes of shards in memory; of a larger one, all of it.
    """
    reader = StepReader(files, directory_step=step)
    _ = reader.extras
    for shards in _batches(reader, at_once):
        leaves = reader.leaves
        reader.read_boxes(
            [BoxRequest(s.leaf, s.box, np.empty(s.box.shape, dtype_of(leaves[s.leaf].dtype))) for s in shards],
            at_once,
        )


def _batches(reader: StepReader, at_once: int) -> Iterator[list[Shard]]:
    """All shards, so many at a time that they fit into memory."""
    batch: list[Shard] = []
    nbytes = 0
    for shard in reader.saved_checksums:
        size = (
            int(np.prod(shard.box.shape, dtype=np.int64)) * dtype_of(reader.leaves[shard.leaf].dtype).itemsize
        )
        if batch and nbytes + size > at_once:
            yield batch
            batch, nbytes = [], 0
        batch.append(shard)
        nbytes += size
    if batch:
        yield batch


def _remove_others(directory: Path, kept: set[str]) -> None:
    """Removes what an earlier copy has left of other files, half-written ones included."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            if path.relative_to(directory).as_posix() not in kept:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
