"""A state of several shards, and slots of it of which some bytes are spoiled."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.repair import RepairSlot
from emergency_ckpt.local.store import LocalStore
from tests.local.test_store import Directory, content, save

STEP = StepId(1, 1)
SHARDS = 5


def layout() -> Layout:
    """Two processes; this one, 0, has shards 1, 2, 4, 5 and 6 of seven, one of them without an element."""
    sizes = [3, 5_000, 17, 1, 0, 4_096, 9]
    leaves = [LeafSpec("x" * (i + 1), (size,), "uint8") for i, size in enumerate(sizes)]
    shards = [Shard(leaf.name, Box.whole(leaf.shape)) for leaf in leaves]
    held = [shards[i] for i in (1, 2, 4, 5, 6)]
    return Layout.build(leaves, {0: held, 1: shards}, (0, 0))


OWN = layout().process_shards[0]
SOLID = tuple(shard for shard in OWN if layout().shard_nbytes[shard])
"""Shards that have bytes, which may be spoiled."""


def manifest_paths(directory: Directory) -> dict[StepId, Path]:
    paths = directory.path.glob("emergency_ckpt/*/slot_*.manifest")
    return {Manifest.from_bytes(path.read_bytes(), "test").step: path for path in paths}


def manifest_on_disk(directory: Directory, step: StepId = STEP) -> Manifest:
    return Manifest.from_bytes(manifest_paths(directory)[step].read_bytes(), "test")


def spoil(directory: Directory, shards: Iterable[int], step: StepId = STEP) -> None:
    """Flips one bit in each of these shards of the slot of `step`."""
    path = manifest_paths(directory)[step].with_suffix(".data")
    data = bytearray(path.read_bytes())
    for entry in layout().slot_entries(0):
        if entry.shard in set(shards):
            data[entry.offset + entry.nbytes // 2] ^= 0x20
    with path.open("r+b") as file:
        file.write(data)


def damaged_store(directory: Directory, shards: Collection[int], step: StepId = STEP) -> LocalStore:
    """A store that has found `shards` of `step` damaged."""
    store = directory.open(layout())
    assert save(store, step)
    spoil(directory, shards, step)
    (holding,) = store.verify()
    assert holding.missing == tuple(sorted(shards))
    return store


def write(slot: RepairSlot, shard: int, step: StepId = STEP) -> None:
    """What was saved as this shard."""
    slot.shard(shard)[:] = content(layout().shards[shard], step.step, layout().shard_nbytes[shard])


def assert_good(store: LocalStore, shards: Iterable[int], step: StepId = STEP) -> None:
    slot = store.sealed(step)
    assert slot is not None
    assert slot.find_damage() is None
    for shard in shards:
        expected = content(slot.layout.shards[shard], step.step, slot.layout.shard_nbytes[shard])
        np.testing.assert_array_equal(slot.shard(shard), expected)
