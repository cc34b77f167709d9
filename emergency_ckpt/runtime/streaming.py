"""Streaming: a step goes to the devices through a bounded window where its host has no room for a second slot.

Nothing of it is in a slot until all processes hold the state: then what the devices hold is saved into a slot,
under the generation and step that were restored. A process that keeps copies for others does not stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta
from typing import Any

import numpy as np

from emergency_ckpt.core.checksums import ShardWriter, shard_seed
from emergency_ckpt.core.values import Value
from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.jaxio.assemble import StoredShard, StreamedLeaves
from emergency_ckpt.jaxio.binding import StateBinder
from emergency_ckpt.jaxio.snapshot import default_window_bytes, take_snapshot
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.slot_views import OpenSlot
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.telemetry.metrics import Metric

_ALIGNMENT = 64


class Stream:
    """One step on its way to the devices of this process, some shards at a time.

    Attributes:
      shards: what its devices hold, as indices into the shards of the job's layout.
      placed: those of them that are there.
    """

    def __init__(self, job: Job, leaves: Mapping[str, Any], generation: int) -> None:
        """`leaves`: abstract leaves by name; `generation`: that which saved the step."""
        self._job = job
        self._abstract = leaves
        self._leaves = StreamedLeaves(leaves, job.layout, job.process, generation)
        self._nbytes = job.layout.shard_nbytes
        self.shards = self._leaves.shards
        self.placed: set[int] = set()
        total = sum(self._nbytes[shard] for shard in self.shards)
        self._window_bytes = min(default_window_bytes(total), job.settings.read_bytes)
        self._memory = np.empty(0, np.uint8)

    def windows(self, shards: Collection[int]) -> Iterator[Mapping[int, np.ndarray]]:
        """The shards in turn, as many as fit into the window, with memory for each; one at least.

        The memory of one is reused for the next.
        """
        window: list[int] = []
        nbytes = 0
        for shard in (shard for shard in self.shards if shard in shards):
            size = -(-self._nbytes[shard] // _ALIGNMENT) * _ALIGNMENT
            if window and nbytes + size > self._window_bytes:
                yield self._places(window, nbytes)
                window, nbytes = [], 0
            window.append(shard)
            nbytes += size
        if window:
            yield self._places(window, nbytes)

    def _places(self, shards: Collection[int], nbytes: int) -> dict[int, np.ndarray]:
        if self._memory.nbytes < nbytes:
            self._memory = np.empty(0, np.uint8)  # Gone before there is a larger one.
            self._memory = np.empty(nbytes, np.uint8)
            self._job.log.metrics.set(Metric.RESTORE_WINDOW_BYTES, nbytes)
        places: dict[int, np.ndarray] = {}
        at = 0
        for shard in shards:
            size = self._nbytes[shard]
            places[shard] = self._memory[at : at + size]
            at += -(-size // _ALIGNMENT) * _ALIGNMENT
        return places

    def put(self, places: Mapping[int, np.ndarray], checksums: Mapping[int, tuple[int, ...]]) -> None:
        """Shards are in these places: verifies them once more and puts them on their devices.

        Raises CorruptDataError.
        """
        self._leaves.put({shard: StoredShard(places[shard], found) for shard, found in checksums.items()})
        self.placed.update(checksums)

    def finish(self, values: Mapping[str, Value]) -> Mapping[str, Any]:
        """The restored leaves by name, once every shard was put."""
        self._memory = np.empty(0, np.uint8)
        return self._leaves.finish(values)

    def write(self, leaves: Mapping[str, Any], slot: OpenSlot, manifest: Manifest) -> None:
        """Saves what the devices hold into a slot. Raises CorruptDataError where it is not what they got."""
        job = self._job
        entries = job.layout.slot_entries(job.process)
        place = {entry.shard: number for number, entry in enumerate(entries)}
        own = set(self.shards)
        binder = StateBinder(self._abstract, job.layout, job.process, job.settings.host_platforms)
        writers = {
            entry.shard: ShardWriter(
                slot.data[entry.offset : entry.offset + entry.nbytes],
                shard_seed(manifest.step.generation, job.layout, entry.shard),
            )
            for entry in entries
            if entry.shard in own
        }
        take_snapshot(binder, leaves).write(lambda shard, data: writers[shard].write(data))
        for shard, writer in writers.items():
            if writer.finish() != manifest.checksums[place[shard]]:
                raise CorruptDataError(
                    f"{job.layout.shards[shard]} of {manifest.step} came back from its device with other bytes "
                    "than were put there: a device or its memory damages data. Replace this host."
                )


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A whole step on the devices of this process, and in no slot yet.

    Attributes:
      manifest: of the slot that it will be in.
    """

    job: Job
    stream: Stream
    manifest: Manifest

    def settle(self, leaves: Mapping[str, Any]) -> None:
        """Saves the state into a slot. Call when all processes hold it and old steps are void.

        Raises what the ramdisk raises, and CorruptDataError; the state is held all the same.
        """
        local = self.job.local
        if not local.directory:
            return
        slot, reason = local.begin_anew(self.manifest.step, timedelta(0))
        if slot is None:
            self.job.log.warning(
                "restore", self.manifest.step.step, f"not on this ramdisk until the next save: {reason}"
            )
            return
        try:
            slot.wait_ready()
            self.stream.write(leaves, slot, self.manifest)
            local.seal_beside(slot, self.manifest)
        except BaseException:
            local.discard(slot)
            raise
