"""A slot in plain memory, filled from a snapshot the way the local tier fills its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from emergency_ckpt.core.checksums import ShardWriter, block_seed
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.shards import BLOCK_BYTES
from emergency_ckpt.jaxio.assemble import StoredShard, assemble
from emergency_ckpt.jaxio.binding import StateBinder
from emergency_ckpt.jaxio.layouts import build_layout
from emergency_ckpt.jaxio.snapshot import Snapshot, take_snapshot
from emergency_ckpt.jaxio.topology import Topology

GENERATION = 3


@dataclasses.dataclass
class MemorySlot:
    layout: Layout
    data: np.ndarray
    checksums: dict[int, tuple[int, ...]]
    values: dict[str, Any]

    @classmethod
    def fill(
        cls, layout: Layout, snapshot: Snapshot, process: int = 0, block_bytes: int = BLOCK_BYTES
    ) -> MemorySlot:
        slot = cls(layout, np.zeros(layout.data_bytes(process), np.uint8), {}, dict(snapshot.values))
        entries = {entry.shard: entry for entry in layout.slot_entries(process)}
        writers = {}
        for index, entry in entries.items():
            shard, place = layout.shards[index], slot.data[entry.offset : entry.offset + entry.nbytes]
            seed = block_seed(GENERATION, shard, layout.leaf[shard.leaf].dtype)
            writers[index] = ShardWriter(place, seed, block_bytes)
        snapshot.write(lambda index, piece: writers[index].write(piece))
        slot.checksums.update((index, writer.finish()) for index, writer in writers.items())
        return slot

    def read(self, index: int, process: int = 0) -> StoredShard:
        entry = next(e for e in self.layout.slot_entries(process) if e.shard == index)
        return StoredShard(self.data[entry.offset : entry.offset + entry.nbytes], self.checksums[index])

    def restore(self, abstract_state: Any) -> Any:
        return assemble(abstract_state, self.layout, 0, GENERATION, self.read, self.values)


def written(snapshot: Snapshot) -> dict[int, bytes]:
    """The bytes of each shard."""
    found: dict[int, bytes] = {}

    def take(shard: int, data: np.ndarray) -> None:
        found[shard] = found.get(shard, b"") + data.tobytes()

    snapshot.write(take)
    return found


def save(state: Any, abstract_state: Any = None) -> MemorySlot:
    """The state's bytes, as a single process saves them."""
    abstract_state = state if abstract_state is None else abstract_state
    layout = build_layout(abstract_state, Topology.single_process())
    return MemorySlot.fill(layout, take_snapshot(StateBinder(abstract_state, layout, 0), state))


def abstract(state: Any) -> Any:
    """The state as users describe it before it exists: arrays by shape, dtype and sharding."""

    def describe(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(describe, state)


def bits(leaf: Any) -> tuple[Any, ...]:
    """Everything that must come back: type, dtype, shape, bytes of all shards, sharding, committed or not."""
    if isinstance(leaf, jax.Array):
        data = leaf
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(leaf)
        shards = [(s.device.id, s.index, np.asarray(s.data).tobytes()) for s in data.addressable_shards]
        return "array", str(leaf.dtype), leaf.shape, shards, leaf.sharding, leaf.committed
    if isinstance(leaf, np.ndarray):
        return "numpy", leaf.dtype, leaf.shape, leaf.tobytes()
    return type(leaf), repr(leaf)


def same(first: Any, second: Any) -> bool:
    """Whether two states agree in structure and in every bit."""
    return jax.tree.structure(first) == jax.tree.structure(second) and [
        bits(leaf) for leaf in jax.tree.leaves(first)
    ] == [bits(leaf) for leaf in jax.tree.leaves(second)]
