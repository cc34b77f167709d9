"""A small state and the calls that write it as a step: four processes, two slices, rows split in two."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from emergency_ckpt.core.checksums import block_seed, checksum_blocks
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.shards import Box, Shard, dtype_of
from emergency_ckpt.core.upload_assignment import assign_uploads
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.attempts import Attempt, PersistentStep
from emergency_ckpt.persistent.committer import StepContent, commit
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.persistent.writer import PartReport, write_part

Arrays = Mapping[str, np.ndarray]


def small_state(seed: int = 0) -> dict[str, np.ndarray]:
    """A matrix that is split, a bias that is whole everywhere, zeros, and a step counter."""
    random = np.random.default_rng(seed)
    return {
        "params.w": random.standard_normal((8, 6)).astype(np.float32),
        "params.b": random.standard_normal(5).astype(np.float32),
        "opt.zeros": np.zeros((4, 4), np.float32),
        "count": np.asarray(seed, np.int32),
    }


def layout_of(arrays: Arrays, values: tuple[str, ...] = (), **build: Mapping[str, bytes]) -> Layout:
    """Matrices are split by rows over the two processes of each slice, everything else is whole."""
    leaves = [LeafSpec(name, array.shape, array.dtype.name) for name, array in arrays.items()]
    holders = {
        process: [Shard(leaf.name, _box(leaf.shape, process % 2)) for leaf in leaves] for process in range(4)
    }
    return Layout.build(leaves, holders, (0, 0, 1, 1), value_leaves=values, **build)


def _box(shape: tuple[int, ...], half: int) -> Box:
    whole = Box.whole(shape)
    if len(shape) != 2 or shape[0] % 2:
        return whole
    rows = shape[0] // 2
    return Box((half * rows, 0), ((half + 1) * rows, shape[1]))


def shard_array(arrays: Arrays, layout: Layout, index: int) -> np.ndarray:
    shard = layout.shards[index]
    return np.ascontiguousarray(arrays[shard.leaf][shard.box.slices()]).reshape(shard.box.shape)


def checksums_of(arrays: Arrays, layout: Layout, index: int, generation: int) -> tuple[int, ...]:
    shard = layout.shards[index]
    data = shard_array(arrays, layout, index).reshape(-1).view(np.uint8)
    return checksum_blocks(data.data, block_seed(generation, shard, layout.leaf[shard.leaf].dtype))


def write_parts(
    store: PersistentStore,
    attempt: Attempt,
    layout: Layout,
    arrays: Arrays,
    options: WriteOptions | None = None,
) -> list[PartReport]:
    """Every process writes what is assigned to it."""
    plan = assign_uploads(layout, range(layout.process_count))
    assert plan.shards is not None, plan.reason
    return [
        write_part(
            store,
            attempt,
            layout,
            process,
            shards,
            lambda i: shard_array(arrays, layout, i),
            lambda i: checksums_of(arrays, layout, i, attempt.step_id.generation),
            options,
        )
        for process, shards in enumerate(plan.shards)
    ]


def save(
    store: PersistentStore,
    attempt: Attempt,
    arrays: Arrays,
    content: StepContent | None = None,
    layout: Layout | None = None,
    options: WriteOptions | None = None,
) -> PersistentStep:
    """Writes and commits a step."""
    layout = layout or layout_of(arrays, tuple(content.values) if content else ())
    return commit(store, attempt, layout, write_parts(store, attempt, layout, arrays, options), content)


def read_whole(reader: StepReader, leaf: str) -> np.ndarray:
    spec = reader.leaves[leaf]
    out = np.empty(spec.shape, dtype_of(spec.dtype))
    reader.read_box(leaf, Box.whole(spec.shape), out)
    return out


def read_shards(reader: StepReader) -> dict[str, np.ndarray]:
    """Every leaf, read shard by shard as it was saved, so that every checksum is used."""
    result = {name: np.empty(leaf.shape, dtype_of(leaf.dtype)) for name, leaf in reader.leaves.items()}
    for shard in reader.saved_checksums:
        out = np.empty(shard.box.shape, result[shard.leaf].dtype)
        reader.read_box(shard.leaf, shard.box, out)
        result[shard.leaf][shard.box.slices()] = out
    return result


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name
