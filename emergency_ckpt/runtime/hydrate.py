"""The memory in which a process makes a step whole: a slot, the missing parts of its own slot, or plain memory.

Until all processes hold the restored state no sealed slot is given up for it: where no slot is free, and the
bytes cannot be streamed to the devices, they wait in ordinary memory and move into a slot afterwards. A part of
a step goes into memory only, and so does a step of which slots hold a part: that is stored from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import numpy as np

from emergency_ckpt.core.checksums import checksum_blocks, shard_seed
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.part import Part
from emergency_ckpt.core.values import Value
from emergency_ckpt.errors import LocalDirectoryError
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.repair import RepairSlot
from emergency_ckpt.local.slot_views import OpenSlot, SealedSlot
from emergency_ckpt.local.store import LocalStore
from emergency_ckpt.persistent.reader import BoxRequest, StepReader
from emergency_ckpt.runtime.job import Job

_STOPPABLE_BYTES = 1024**3


class Hydration:
    """The slot, or the memory in its place, that receives one step. Close it with `seal` or `discard`."""

    def __init__(self, job: Job, step: StepId, part: Part, slot: OpenSlot | None) -> None:
        """`slot`: None for plain memory."""
        self._job = job
        self.step = step
        self._part = part
        self._slot = slot
        self._memory: np.ndarray | None = None
        self._still_written = False
        self._entries = {entry.shard: entry for entry in job.needed_layout.slot_entries(job.process)}

    @classmethod
    def begin(cls, job: Job, step: StepId, part: Part) -> Hydration:
        """In a slot if there is a free one."""
        hydration = cls.in_slot(job, step, part) or cls(job, step, part, None)
        hydration.prepare()
        return hydration

    @classmethod
    def in_slot(cls, job: Job, step: StepId, part: Part) -> Hydration | None:
        """In a free slot, if there is one that has its memory."""
        slot = None
        try:
            if _takes_slot(job, step, part):
                slot, _ = job.local.begin(step, timedelta(0))
        except LocalDirectoryError as error:  # The state can be restored all the same.
            job.log.warning("restore", step.step, str(error))
        hydration = cls(job, step, part, slot)
        return hydration if hydration.has_slot() else None

    @classmethod
    def begin_unasked(cls, job: Job, step: StepId, part: Part) -> Hydration | None:
        """Before anybody asked for it: in a slot that is free without a loss to anybody, or not at all."""
        slot = None
        try:
            if _takes_slot(job, step, part):
                slot, _ = job.local.begin_unasked(step)
        except LocalDirectoryError as error:
            job.log.warning("restore", step.step, str(error))
        return None if slot is None else cls(job, step, part, slot)

    def has_slot(self) -> bool:
        """Whether it is in a slot; waits until that has all its pages."""
        slot = self._slot
        if slot is None:
            return False
        try:
            slot.wait_ready()
            self._memory = slot.data
            return True
        except LocalDirectoryError as error:
            self._job.log.warning("restore", self.step.step, str(error))
            self.discard()
            return False
        except BaseException:
            self.discard()
            raise

    def prepare(self) -> None:
        """Makes the memory ready to be written."""
        if self._memory is None and not self.has_slot():
            self._memory = self._plain_memory()

    @property
    def data(self) -> np.ndarray:
        """All of the memory, flat uint8."""
        assert self._memory is not None, "prepare it first"
        return self._memory

    def _plain_memory(self) -> np.ndarray:
        # Pages that nothing is written to take no memory: those between the leaves of a part, and those
        # of shards that stay in the own slot.
        return np.empty(self._job.needed_layout.data_bytes(self._job.process), np.uint8)

    def place(self, shard: int) -> np.ndarray:
        """Flat uint8 memory of a shard of this process (an index into the shards of the job's layout)."""
        entry = self._entries[shard]
        return self.data[entry.offset : entry.offset + entry.nbytes]

    def read_persistent(
        self, reader: StepReader, shards: Iterable[int], is_stopped: Callable[[], bool] | None
    ) -> dict[int, tuple[int, ...]]:
        """Reads shards, verified where the step has checksums; returns their block checksums."""
        self._still_written = True  # A read whose time is over, or that was interrupted, may go on.
        places = {shard: self.place(shard) for shard in shards}
        found = read_shards(self._job, self.step, reader, places, is_stopped)
        self._still_written = False
        return found

    def write(self, offset: int, data: np.ndarray) -> None:
        """Puts received bytes in place."""
        self.data[offset : offset + data.nbytes] = data

    def seal(self, manifest: Manifest, own: OwnPart | None = None) -> Hydrated:
        """The bytes are there and verified against `manifest`, but for those that stay in the own slot, `own`.

        Where slots hold a part of the step, and the own one has it not, that part goes into a free slot now.
        """
        job = self._job
        if self._slot is not None:
            job.local.seal(self._slot, manifest)
            return Hydrated(SealedSlot(self._slot.index, manifest, job.layout, self.data), job.local)
        sealed = SealedSlot(-1, manifest, job.needed_layout, self.data)
        if own is not None:
            return Hydrated(sealed, job.local, own=own)
        waiting = Hydrated(sealed, job.local, waits=(job.layout, job.process))
        if job.stores_all or not self._part.is_whole or not job.local.directory:
            return waiting
        if job.local.sealed(self.step) is not None:
            return waiting
        try:
            slot, _ = job.local.begin(self.step, timedelta(0))
            if slot is not None:
                waiting.store(slot)
                return dataclasses.replace(waiting, waits=None)
        except LocalDirectoryError as error:
            job.log.warning("restore", self.step.step, str(error))
        return waiting

    def discard(self, *, still_written: bool = False) -> None:
        """Gives the slot back; `still_written`: somebody may go on writing there for a while."""
        slot, self._slot = self._slot, None
        if slot is None:
            return
        try:
            self._job.local.discard(slot, still_written=still_written or self._still_written)
        except LocalDirectoryError as error:  # What made this one useless is to be told, not that.
            self._job.log.warning("restore", self.step.step, str(error))

    def find_damage(self, manifest: Manifest) -> str | None:
        """Verifies what was received before it counts as a slot. A part is verified when it is assembled."""
        if not self._part.is_whole:
            return None
        return SealedSlot(-1, manifest, self._job.needed_layout, self.data).find_damage()


def _takes_slot(job: Job, step: StepId, part: Part) -> bool:
    # What may be here of this step is not to be used, but it may be all that is left of some shard.
    return part.is_whole and job.local.sealed(step) is None and job.stores_all


class Repair:
    """This process's own slot for a step, which lacks some shards: these alone are written."""

    def __init__(self, job: Job, slot: RepairSlot) -> None:
        self._job = job
        self._slot = slot

    @property
    def index(self) -> int:
        """Which slot of the process it is."""
        return self._slot.index

    @property
    def missing(self) -> tuple[int, ...]:
        """What the slot still lacks, as indices into the shards of the job's layout."""
        theirs, ours = self._slot.layout, self._job.layout
        if theirs.hash == ours.hash:
            return self._slot.missing
        return tuple(sorted(ours.shard_index[theirs.shards[shard]] for shard in self._slot.missing))

    def place(self, shard: int) -> np.ndarray:
        return self._slot.shard(self._theirs(shard))

    def read_persistent(
        self, reader: StepReader, shards: Iterable[int], is_stopped: Callable[[], bool] | None
    ) -> dict[int, tuple[int, ...]]:
        places = {shard: self.place(shard) for shard in shards}
        return read_shards(self._job, self._slot.manifest.step, reader, places, is_stopped)

    def count(self, shards: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
        """Counts written shards (with the checksums of their source) as there.

        Returns those whose bytes are not what was saved in this slot.
        """
        ours = {self._theirs(shard): shard for shard in shards}
        checksums = {self._theirs(shard): checksums for shard, checksums in shards.items()}
        return tuple(ours[shard] for shard in self._job.local.repaired(self._slot, ours, checksums))

    def end(self) -> None:
        self._job.local.end_repair(self._slot)

    def _theirs(self, shard: int) -> int:
        if self._slot.layout.hash == self._job.layout.hash:
            return shard
        return self._slot.layout.shard_index[self._job.layout.shards[shard]]


def read_shards(
    job: Job,
    step: StepId,
    reader: StepReader,
    places: Mapping[int, np.ndarray],
    is_stopped: Callable[[], bool] | None,
) -> dict[int, tuple[int, ...]]:
    """Reads shards of the job's layout from the persistent tier into their places; their block checksums."""
    requests = [
        BoxRequest(job.layout.shards[shard].leaf, job.layout.shards[shard].box, job.layout.typed(shard, place))
        for shard, place in places.items()
    ]
    # What may have to stop soon has less on its way.
    read_bytes = (
        job.settings.read_bytes if is_stopped is None else min(job.settings.read_bytes, _STOPPABLE_BYTES)
    )
    reader.read_boxes(requests, read_bytes, job.settings.drain_timeout.total_seconds(), is_stopped)
    return {
        shard: checksum_blocks(place, shard_seed(step.generation, job.layout, shard))
        for shard, place in places.items()
    }


@dataclasses.dataclass(frozen=True)
class OwnPart:
    """This process's own slot where it holds its part of a step and the other slices hold the rest."""

    slot: SealedSlot
    shards: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Hydrated:
    """A whole step on this process: in a slot, or in memory.

    Attributes:
      slot: has all that the process needs, but for what is in `own`.
      waits: the layout, and the position in it, of what of the memory is to go into a slot that becomes free.
      own: the own slot, where a part stayed in it.
    """

    slot: SealedSlot
    local: LocalStore
    waits: tuple[Layout, int] | None = None
    own: OwnPart | None = None

    def source_of(self, shard: int) -> SealedSlot:
        """Where a shard lies."""
        return self.own.slot if self.own is not None and shard in self.own.shards else self.slot

    def settle(self, leaves: Mapping[str, Any]) -> None:
        """Moves waiting bytes into a slot. Call when all processes hold the state and old steps are void.

        Raises what the ramdisk raises; the state is held all the same, and the next save is redundant again.
        """
        del leaves  # The bytes are here.
        if self.waits is None or not self.local.directory:
            return
        slot, _ = self.local.begin_anew(self.slot.manifest.step, timedelta(0))
        if slot is not None:
            self.store(slot)

    def store(self, slot: OpenSlot) -> None:
        """Copies what waits into a slot and seals it. Raises what the ramdisk raises."""
        assert self.waits is not None
        layout, position = self.waits
        entries = layout.slot_entries(position)
        checksums = tuple(self.slot.checksums(entry.shard) for entry in entries)
        manifest = dataclasses.replace(self.slot.manifest, layout=layout.hash, checksums=checksums)
        try:
            slot.wait_ready()
            for entry in entries:
                data = slot.data[entry.offset : entry.offset + entry.nbytes]
                np.copyto(data, self.slot.shard(entry.shard))
            self.local.seal_beside(slot, manifest)
        except BaseException:
            self.local.discard(slot)
            raise


def fitted(slot: SealedSlot, layout: Layout, process: int) -> SealedSlot:
    """A slot that holds just what `process` needs, in the terms of the job's own layout.

    Another process, or a job of another shape, may have sealed it: equal shards lie at equal offsets, and their
    checksums are bound to leaf and box only.
    """
    manifest = dataclasses.replace(slot.manifest, layout=layout.hash, position=process)
    return SealedSlot(slot.index, manifest, layout, slot.data)


def make_manifest(
    job: Job,
    step: StepId,
    checksums: tuple[tuple[int, ...], ...],
    values: Mapping[str, Value],
    extras: Mapping[int, str],
    metadata: Mapping[str, Any],
) -> Manifest:
    """The manifest of a hydrated slot of this process, with all that it needs."""
    return Manifest(
        run=job.run,
        nonce=job.generation.nonce,
        step=step,
        layout=job.needed_layout.hash,
        position=job.process,
        process_count=job.topology.process_count,
        checksums=checksums,
        values=dict(values),
        extras=dict(extras),
        listed=True,
        activations=job.local.activations,
        metadata=dict(metadata),
        place=job.place,
    )
