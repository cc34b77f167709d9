"""Checksums of blocks: 64-bit xxh3, bound to what the bytes are.

The seed is derived from (generation, leaf, box, dtype), so that bytes which were written as another shard, or
in another generation, do not verify even though they are intact. Replicas of a shard have equal checksums.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.shards import BLOCK_BYTES, Shard, block_ranges


def block_seed(generation: int, shard: Shard, dtype: str) -> int:
    """The seed for every block of this shard as saved in this generation."""
    return xxhash.xxh3_64_intdigest(f"{generation}\0{shard.leaf}\0{shard.box}\0{dtype}".encode())


def shard_seed(generation: int, layout: Layout, shard: int) -> int:
    """The block seed of a shard of a layout, by its index."""
    of = layout.shards[shard]
    return block_seed(generation, of, layout.leaf[of.leaf].dtype)


def checksum_blocks(data: Any, seed: int, block_bytes: int = BLOCK_BYTES) -> tuple[int, ...]:
    """One checksum per block of a contiguous buffer (bytes, memoryview or uint8 array)."""
    view = memoryview(data)
    if not view.nbytes:
        return ()  # A view without elements cannot be cast.
    view = view.cast("B")
    return tuple(
        xxhash.xxh3_64_intdigest(view[at : at + length], seed)
        for at, length in block_ranges(view.nbytes, block_bytes)
    )


def first_bad_block(
    data: Any, expected: Sequence[int], seed: int, block_bytes: int = BLOCK_BYTES
) -> int | None:
    """Index of the first block that does not match, or None when all do (a missing block counts as bad)."""
    found = checksum_blocks(data, seed, block_bytes)
    pairs = itertools.zip_longest(found, expected)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def copy_and_checksum(
    source: np.ndarray, target: np.ndarray, seed: int, block_bytes: int = BLOCK_BYTES
) -> tuple[int, ...]:
    """Copies flat uint8 `source` to `target` of equal length, hashing each piece while it is in cache.

    Releases the GIL while copying and while hashing. Returns one checksum per block.
    """
    checksums: list[int] = []
    for at, length in block_ranges(source.nbytes, block_bytes):
        digest = xxhash.xxh3_64(seed=seed)
        for piece in range(at, at + length, _PIECE_BYTES):
            end = min(piece + _PIECE_BYTES, at + length)
            np.copyto(target[piece:end], source[piece:end])
            digest.update(target[piece:end].data)
        checksums.append(digest.intdigest())
    return tuple(checksums)


_PIECE_BYTES = 1024 * 1024
