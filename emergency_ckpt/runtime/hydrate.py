"""The memory in which a process makes a step whole: a slot, the missing parts of its own slot, or plain memory.

Until all processes hold the restored state no sealed slot is given up for it: where no slot is free, the bytes
wait in ordinary memory and move into a slot afterwards. A part of a step goes into memory only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
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


class Hydration:
    """The slot, or the memory in its place, that receives one step. Close it with `seal` or `discard`."""

    def __init__(self, job: Job, step: StepId, part: Part) -> None:
        self._job = job
        self.step = step
        self._part = part
        self._still_written = False
        # What may be here of this step is not to be used, but it may be all that is left of some shard.
        here = job.local.sealed(step) is not None
        takes_slot = part.is_whole and not here
        self._slot = self._begin() if takes_slot else None
        self.data = self._slot_memory() if self._slot is not None else self._plain_memory()
        self._entries = {entry.shard: entry for entry in job.layout.slot_entries(job.process)}

    def _begin(self) -> OpenSlot | None:
        try:
            return self._job.local.begin(self.step, timedelta(0))[0]
        except LocalDirectoryError as error:  # The state can be restored all the same.
            self._job.log.warning("restore", self.step.step, str(error))
            return None

    def _slot_memory(self) -> np.ndarray:
        assert self._slot is not None
        try:
            self._slot.wait_ready()
            return self._slot.data
        except LocalDirectoryError as error:
            self._job.log.warning("restore", self.step.step, str(error))
            self.discard()
            return self._plain_memory()
        except BaseException:
            self.discard()
            raise

    def _plain_memory(self) -> np.ndarray:
        # Pages that nothing is written to, those between the leaves of a part, take no memory.
        return np.empty(self._job.layout.data_bytes(self._job.process), np.uint8)

    def place(self, shard: int) -> np.ndarray:
        """Flat uint8 memory of a shard of this process (an index into the shards of the job's layout)."""
        entry = self._entries[shard]
        return self.data[entry.offset : entry.offset + entry.nbytes]

    def read_persistent(self, reader: StepReader, shards: Iterable[int]) -> dict[int, tuple[int, ...]]:
        """Reads shards, verified where the step has checksums; returns their block checksums."""
        self._still_written = True  # A read whose time is over, or that was interrupted, may go on.
        found = read_shards(self._job, self.step, reader, {shard: self.place(shard) for shard in shards})
        self._still_written = False
        return found

    def write(self, offset: int, data: np.ndarray) -> None:
        """Puts received bytes in place."""
        self.data[offset : offset + data.nbytes] = data

    def seal(self, manifest: Manifest) -> Hydrated:
        """The bytes are there and verified against `manifest`."""
        if self._slot is None:
            return Hydrated(SealedSlot(-1, manifest, self._job.layout, self.data), self._job.local, waits=True)
        self._job.local.seal(self._slot, manifest)
        sealed = SealedSlot(self._slot.index, manifest, self._job.layout, self.data)
        return Hydrated(sealed, self._job.local)

    def discard(self) -> None:
        slot, self._slot = self._slot, None
        if slot is None:
            return
        try:
            self._job.local.discard(slot, still_written=self._still_written)
        except LocalDirectoryError as error:  # What made this one useless is to be told, not that.
            self._job.log.warning("restore", self.step.step, str(error))

    def find_damage(self, manifest: Manifest) -> str | None:
        """Verifies what was received before it counts as a slot. A part is verified when it is assembled."""
        if not self._part.is_whole:
            return None
        return SealedSlot(-1, manifest, self._job.layout, self.data).find_damage()


class Repair:
    """This process's own slot for a step, which lacks some shards: these alone are written."""

    def __init__(self, job: Job, slot: RepairSlot) -> None:
        self._job = job
        self._slot = slot

    @property
    def missing(self) -> tuple[int, ...]:
        """What the slot still lacks, as indices into the shards of the job's layout."""
        theirs, ours = self._slot.layout, self._job.layout
        if theirs.hash == ours.hash:
            return self._slot.missing
        return tuple(sorted(ours.shard_index[theirs.shards[shard]] for shard in self._slot.missing))

    def place(self, shard: int) -> np.ndarray:
        return self._slot.shard(self._theirs(shard))

    def read_persistent(self, reader: StepReader, shards: Iterable[int]) -> dict[int, tuple[int, ...]]:
        places = {shard: self.place(shard) for shard in shards}
        return read_shards(self._job, self._slot.manifest.step, reader, places)

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
    job: Job, step: StepId, reader: StepReader, places: Mapping[int, np.ndarray]
) -> dict[int, tuple[int, ...]]:
    """Reads shards of the job's layout from the persistent tier into their places; their block checksums."""
    requests = [
        BoxRequest(job.layout.shards[shard].leaf, job.layout.shards[shard].box, job.layout.typed(shard, place))
        for shard, place in places.items()
    ]
    reader.read_boxes(requests, job.settings.read_bytes, job.settings.drain_timeout.total_seconds())
    return {
        shard: checksum_blocks(place, shard_seed(step.generation, job.layout, shard))
        for shard, place in places.items()
    }


@dataclasses.dataclass(frozen=True)
class Hydrated:
    """A whole step on this process: in a slot, or (`waits`) in memory until a slot is free."""

    slot: SealedSlot
    local: LocalStore
    waits: bool = False

    def settle(self) -> None:
        """Moves waiting bytes into a slot. Call when all processes hold the state and old steps are void.

        Raises what the ramdisk raises; the state is held all the same, and the next save is redundant again.
        """
        if not self.waits or not self.local.directory:
            return
        slot, _ = self.local.begin_anew(self.slot.manifest.step, timedelta(0))
        if slot is None:
            return
        try:
            slot.wait_ready()
            np.copyto(slot.data[: self.slot.data.nbytes], self.slot.data)
            self.local.seal(slot, self.slot.manifest)
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
    """The manifest of a hydrated slot of this process."""
    layout: Layout = job.layout
    return Manifest(
        run=job.run,
        nonce=job.generation.nonce,
        step=step,
        layout=layout.hash,
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
