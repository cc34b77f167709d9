"""Finding the bad blocks of a slot: all bytes are hashed by several threads and compared with the manifest.

Shards that the manifest says are missing are left out.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple

from emergency_ckpt.core.checksums import checksum_blocks
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.shards import BLOCK_BYTES, block_ranges
from emergency_ckpt.local.manifest import Manifest

_MAX_VERIFY_THREADS = 8


def find_damage(manifest: Manifest, layout: Layout, data: Any, seeds: Mapping[int, int]) -> str | None:
    """Says in words what the first bad block of a slot is, None when all are good.

    `data` is the slot's flat uint8 array; `seeds` the block seed per shard index (see `core.checksums`).
    """
    with contextlib.closing(_bad_blocks(manifest, layout, data, seeds)) as bad_blocks:
        bad = next(bad_blocks, None)
    if bad is None:
        return None
    return f"block {bad.block} of shard {layout.shards[bad.shard]} does not match its checksum"


def find_all_damage(manifest: Manifest, layout: Layout, data: Any, seeds: Mapping[int, int]) -> tuple[int, ...]:
    """The shards that have a bad block, ascending; arguments as for `find_damage`."""
    return tuple(sorted({bad.shard for bad in _bad_blocks(manifest, layout, data, seeds)}))


class _Check(NamedTuple):
    """One block of a slot and what it must be. A tuple because a slot may have a hundred thousand."""

    shard: int
    block: int
    begin: int
    end: int
    seed: int
    expected: int


def _bad_blocks(
    manifest: Manifest, layout: Layout, data: Any, seeds: Mapping[int, int]
) -> Generator[_Check, None, None]:
    """In the order of the slot.

    Several threads share the work: hashing releases the GIL, and one core does not exhaust the memory.
    """

    def bad_among(checks: list[_Check]) -> list[_Check]:
        return [c for c in checks if checksum_blocks(data[c.begin : c.end], c.seed) != (c.expected,)]

    threads = min(_MAX_VERIFY_THREADS, len(os.sched_getaffinity(0)))
    with concurrent.futures.ThreadPoolExecutor(threads, "emergency_ckpt verify") as pool:
        for bad in pool.map(bad_among, _batches(manifest, layout, seeds)):
            yield from bad


def _batches(manifest: Manifest, layout: Layout, seeds: Mapping[int, int]) -> Iterator[list[_Check]]:
    """All blocks in order, in lists of a block's worth of bytes: tiny shards are not worth a task each."""
    batch: list[_Check] = []
    batch_bytes = 0
    missing = set(manifest.missing)
    entries = zip(layout.slot_entries(manifest.position), manifest.checksums, strict=True)
    for place, (entry, checksums) in enumerate(entries):
        if place in missing:
            continue
        ranges = block_ranges(entry.nbytes)
        for block, ((at, length), expected) in enumerate(zip(ranges, checksums, strict=True)):
            begin = entry.offset + at
            batch.append(_Check(entry.shard, block, begin, begin + length, seeds[entry.shard], expected))
            batch_bytes += length
            if batch_bytes >= BLOCK_BYTES:
                yield batch
                batch, batch_bytes = [], 0
    yield batch
