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
from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.local.damage import find_all_damage, find_damage
from emergency_ckpt.local.manifest import Manifest
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

    @functools.cached_property
    def missing(self) -> tuple[int, ...]:
        """Ascending indices into `layout.shards`, of the shards of this slot that are not good."""
        entries = self.layout.slot_entries(self.manifest.position)
        return tuple(entries[place].shard for place in self.manifest.missing)

    def shard(self, shard_index: int) -> np.ndarray:
        """Flat uint8 view of one shard (an index into `layout.shards`). Raises CorruptDataError if missing."""
        _, entry = self._good(shard_index)
        return self.data[entry.offset : entry.offset + entry.nbytes]

    def checksums(self, shard_index: int) -> tuple[int, ...]:
        """The block checksums of one shard. Raises CorruptDataError if it is missing."""
        place, _ = self._good(shard_index)
        return self.manifest.checksums[place]

    def seed(self, shard_index: int) -> int:
        """The block seed of this shard in the generation that saved it."""
        return shard_seed(self.manifest.step.generation, self.layout, shard_index)

    def find_damage(self) -> str | None:
        """Verifies all blocks of shards that are not missing; says in words what is wrong, None if nothing."""
        return find_damage(self.manifest, self.layout, self.data, self._seeds)

    def find_all_damage(self) -> tuple[int, ...]:
        """Verifies like `find_damage`; the indices of all shards that are bad, ascending."""
        return find_all_damage(self.manifest, self.layout, self.data, self._seeds)

    def _good(self, shard_index: int) -> tuple[int, SlotEntry]:
        place, entry = self._entries[shard_index]
        if place in self._missing_places:
            raise CorruptDataError(
                f"shard {self.layout.shards[shard_index]} of {self.manifest.step} is missing in slot "
                f"{self.index}: it was found damaged, or has not been fetched yet"
            )
        return place, entry

    @property
    def _seeds(self) -> dict[int, int]:
        return {shard: self.seed(shard) for shard in self._entries}

    @functools.cached_property
    def _missing_places(self) -> frozenset[int]:
        return frozenset(self.manifest.missing)

    @functools.cached_property
    def _entries(self) -> dict[int, tuple[int, SlotEntry]]:
        """Per shard index its place among the entries, and the entry."""
        return {e.shard: (i, e) for i, e in enumerate(self.layout.slot_entries(self.manifest.position))}
