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
    return _seed(generation, shard.leaf, str(shard.box), dtype)


def shard_seed(generation: int, layout: Layout, shard: int) -> int:
    """The block seed of a shard of a layout, by its index."""
    leaf, box = layout.table.named(shard)
    return _seed(generation, leaf, box, layout.leaf[leaf].dtype)


def _seed(generation: int, leaf: str, box: str, dtype: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{generation}\0{leaf}\0{box}\0{dtype}".encode())


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
    """Copies flat uint8 `source` to `target` of equal length; one checksum per block. Releases the GIL."""
    writer = ShardWriter(target, seed, block_bytes)
    writer.write(source)
    return writer.finish()


class ShardWriter:
    """Copies a shard's bytes to their place piece by piece, hashing them while they are in cache.

    Pieces may be of any lengths: a block that spans several of them has the checksum of its bytes. Copying and
    hashing release the GIL.
    """

    def __init__(self, target: np.ndarray, seed: int, block_bytes: int = BLOCK_BYTES) -> None:
        """`target`: the shard's place, flat uint8."""
        self._target = target
        self._block_bytes = block_bytes
        self._written = 0
        self._checksums: list[int] = []
        self._block = xxhash.xxh3_64(seed=seed)

    def write(self, piece: np.ndarray) -> None:
        """The next bytes of the shard, flat uint8. Raises ValueError for more than there is room for."""
        if self._written + piece.nbytes > self._target.nbytes:
            raise ValueError(
                f"{self._written + piece.nbytes} bytes were written of a shard of {self._target.nbytes}"
            )
        done = 0
        while done < piece.nbytes:
            block_end = (len(self._checksums) + 1) * self._block_bytes
            length = min(_CACHED_BYTES, piece.nbytes - done, block_end - self._written)
            place = self._target[self._written : self._written + length]
            np.copyto(place, piece[done : done + length])
            self._block.update(place.data)
            done += length
            self._written += length
            if self._written == block_end:
                self._end_block()

    def finish(self) -> tuple[int, ...]:
        """One checksum per block. Raises ValueError when bytes are missing."""
        if self._written != self._target.nbytes:
            raise ValueError(f"{self._written} bytes were written of a shard of {self._target.nbytes}")
        if self._written % self._block_bytes:
            self._end_block()
        return tuple(self._checksums)

    def _end_block(self) -> None:
        self._checksums.append(self._block.intdigest())
        self._block.reset()


# Source and target of a piece lie in a second-level cache together, so that hashing does not read memory again.
_CACHED_BYTES = 256 * 1024
