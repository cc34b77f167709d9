"""What a client asks for: ranges of whole blocks of shards, in the order in which their bytes are answered.

Whole blocks only, so that whatever was asked for can be verified. The text comes from the network: every field
is checked before use.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from emergency_ckpt.core.shards import BLOCK_BYTES, Box, Shard

MAX_REQUEST_BYTES = 1024 * 1024
MAX_RANGES = 16384
MAX_ANSWER_BYTES = 1024 * 1024 * 1024
_MAX_DIMENSIONS = 64
_MAX_NUMBER = 2**63


@dataclasses.dataclass(frozen=True, slots=True)
class BlockRange:
    """Blocks `first` to `first + count` of a shard; the last block of a shard may be a short one."""

    shard: Shard
    first: int
    count: int

    def bytes_within(self, shard_nbytes: int) -> tuple[int, int]:
        """`(begin, end)` in a shard of this size. Raises ValueError for blocks that it does not have."""
        blocks = -(-shard_nbytes // BLOCK_BYTES)
        if self.count < 1 or self.first + self.count > blocks:
            raise ValueError(
                f"blocks {self.first} to {self.first + self.count} were asked for of a shard of {blocks} blocks"
            )
        return self.first * BLOCK_BYTES, min(shard_nbytes, (self.first + self.count) * BLOCK_BYTES)


def encode_ranges(ranges: Iterable[BlockRange]) -> bytes:
    """As a list of [leaf, start, stop, first block, number of blocks]."""
    rows = [[r.shard.leaf, list(r.shard.box.start), list(r.shard.box.stop), r.first, r.count] for r in ranges]
    return json.dumps(rows, separators=(",", ":")).encode()


def decode_ranges(data: bytes) -> list[BlockRange]:
    """Raises ValueError for everything that `encode_ranges` would not write."""
    try:
        rows: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(rows, list) or not 0 < len(rows) <= MAX_RANGES:
        raise ValueError(f"expected a list of 1 to {MAX_RANGES} ranges")
    return [_decode_row(row) for row in rows]


def _decode_row(row: Any) -> BlockRange:
    if not isinstance(row, list) or len(row) != 5:
        raise ValueError(f"expected [leaf, start, stop, first block, number of blocks], found {row!r:.80}")
    leaf, start, stop, first, count = row
    if not isinstance(leaf, str):
        raise ValueError(f"expected the name of a leaf, found {leaf!r:.80}")
    return BlockRange(Shard(leaf, Box(_bounds(start), _bounds(stop))), _number(first), _number(count))


def _bounds(raw: Any) -> tuple[int, ...]:
    if not isinstance(raw, list) or len(raw) > _MAX_DIMENSIONS:
        raise ValueError(f"expected the bounds of a box, found {raw!r:.80}")
    return tuple(map(_number, raw))


def _number(raw: Any) -> int:
    if type(raw) is not int or not 0 <= raw < _MAX_NUMBER:
        raise ValueError(f"expected a whole number from 0 to 2**63 - 1, found {raw!r:.40}")
    return raw
