"""What others get of a slot: one to be written, or a sealed one to be read.

A view holds no lock: who reads a slot that is not pinned verifies what was read.
"""

from __future__ import annotations

import dataclasses
import functools
from datetime import timedelta

import numpy as np

from emergency_ckpt.core.checksums import shard_seed
from emergency_ckpt.core.layout import Layout, SlotEntry
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.local.manifest import Manifest, find_damage
from emergency_ckpt.local.slot_file import SlotFile

READY_TIMEOUT = timedelta(minutes=10)


@dataclasses.dataclass(frozen=True)
class OpenSlot:
    """A slot that is being written: `data` is its flat uint8 memory (ready once `wait_ready` returned)."""

    index: int
    step: StepId
    file: SlotFile

    @property
    def data(self) -> np.ndarray:
        return self.file.data

    def wait_ready(self) -> None:
        """Waits until all pages are allocated. Call before the first write."""
        self.file.wait_ready(READY_TIMEOUT)


@dataclasses.dataclass(frozen=True)
class SealedSlot:
    """A sealed slot for reading. Its bytes may change once it is reused: verify what you read, or pin it."""

    index: int
    manifest: Manifest
    layout: Layout
    data: np.ndarray

    def shard(self, shard_index: int) -> np.ndarray:
        """Flat uint8 view of one shard (an index into `layout.shards`)."""
        entry = self._entries[shard_index][1]
        return self.data[entry.offset : entry.offset + entry.nbytes]

    def checksums(self, shard_index: int) -> tuple[int, ...]:
        return self.manifest.checksums[self._entries[shard_index][0]]

    def seed(self, shard_index: int) -> int:
        """The block seed of this shard in the generation that saved it."""
        return shard_seed(self.manifest.step.generation, self.layout, shard_index)

    def find_damage(self) -> str | None:
        """Verifies all blocks; says in words what is wrong, None when nothing is."""
        seeds = {entry.shard: self.seed(entry.shard) for _, entry in self._entries.values()}
        return find_damage(self.manifest, self.layout, self.data, seeds)

    @functools.cached_property
    def _entries(self) -> dict[int, tuple[int, SlotEntry]]:
        """Per shard index its place among the entries, and the entry."""
        return {e.shard: (i, e) for i, e in enumerate(self.layout.slot_entries(self.manifest.position))}
