"""What a client asks for: whole shards of a slot and ranges of whole blocks, and which bytes are the answer.

Whole blocks only, so that whatever was asked for can be verified. The text comes from the network: every field
is checked before use.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from emergency_ckpt.core.index_runs import runs_from_json, runs_to_json, whole_number
from emergency_ckpt.core.layout import SlotPlaces
from emergency_ckpt.core.shards import BLOCK_BYTES

MAX_REQUEST_BYTES = 1024 * 1024
MAX_RANGES = 16384
MAX_ANSWER_BYTES = 1024 * 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class BlockRange:
    """Blocks `first` to `first + count` of a shard; the last block of a shard may be a short one."""

    shard: int
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


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """One request: shards are named by their indices in the layout of the slot.

    Attributes:
      whole: shards that are wanted whole, ascending.
      parts: blocks of others; they come after those.

    Where whole shards follow each other in the slot, the few bytes that lie between them come along, so that
    they are sent as one.
    """

    whole: Sequence[int]
    parts: Sequence[BlockRange] = ()

    def to_bytes(self) -> bytes:
        """As JSON: `{"whole": runs of indices, "parts": [[shard, first block, number of blocks], ...]}`."""
        parts = [[part.shard, part.first, part.count] for part in self.parts]
        return json.dumps({"whole": runs_to_json(self.whole), "parts": parts}, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Asked:
        """Raises ValueError for everything that `to_bytes` would not write."""
        try:
            raw: Any = json.loads(data)
            whole = runs_from_json(raw["whole"], MAX_RANGES)
            whole_number(whole[-1] if whole else 0)  # A run may go on to anywhere.
            rows: Any = raw["parts"]
            if not isinstance(rows, list) or not 0 < len(whole) + len(rows) <= MAX_RANGES:
                raise ValueError(f"expected 1 to {MAX_RANGES} shards and ranges")
            return cls(whole, [BlockRange(*map(whole_number, row)) for row in rows])
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise ValueError(f"what is asked for cannot be read: {error!s:.200}") from error

    def pieces(self, places: SlotPlaces) -> list[tuple[int, int]]:
        """`(offset, length)` of what is sent of a slot. Raises ValueError for what is not in it."""
        found = _joined(_find(self.whole, places), places)
        at_parts = _find([part.shard for part in self.parts], places)
        for part, offset, nbytes in zip(
            self.parts, places.offsets[at_parts].tolist(), places.sizes[at_parts].tolist(), strict=True
        ):
            begin, end = part.bytes_within(nbytes)
            found.append((offset + begin, end - begin))
        if sum(length for _, length in found) > MAX_ANSWER_BYTES:
            raise ValueError(f"more than {MAX_ANSWER_BYTES} bytes were asked for in one request")
        return found


def _find(shards: Sequence[int], places: SlotPlaces) -> np.ndarray:
    """Where these shards stand in a slot."""
    wanted = np.array(shards, np.int64)
    found = np.searchsorted(places.shards, wanted)
    there = found < len(places.shards)
    there[there] = places.shards[found[there]] == wanted[there]
    if not there.all():
        raise ValueError(f"this slot does not have shard {wanted[~there][0]}")
    return found


def _joined(at: np.ndarray, places: SlotPlaces) -> list[tuple[int, int]]:
    """`(offset, length)` of whole shards; those that follow each other are one piece."""
    if not len(at):
        return []
    if (places.sizes[at] == 0).any():
        raise ValueError("a shard without bytes was asked for")
    starts = np.flatnonzero(np.diff(at, prepend=-2) != 1)
    begins = places.offsets[at[starts]]
    last = at[np.append(starts[1:], len(at)) - 1]
    lengths = places.offsets[last] + places.sizes[last] - begins
    return list(zip(begins.tolist(), lengths.tolist(), strict=True))


def gaps_behind(whole: Sequence[int], places: SlotPlaces) -> list[int]:
    """Per whole shard of a request, how many bytes come between it and what comes next."""
    at = _find(whole, places)
    ends = places.offsets[at] + places.sizes[at]
    gaps = np.where(np.diff(at) == 1, places.offsets[at[1:]] - ends[:-1], 0)
    return [*gaps.tolist(), 0][: len(whole)]
