"""The parts of a slot: its shards by who else holds them, each with a digest of its own.

Two slots of one layout share whole parts, or nothing of them: so their digests can be compared even where the
slots hold different shards. Who holds a shard follows from the layout alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import xxhash

from emergency_ckpt.core.box_table import Numbers
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.values import Value, values_to_json

MOST_PARTS = 64
"""Slots with more parts have no digests of them."""


def part_numbers(layout: Layout, kind: int) -> Numbers:
    """Per shard of a list of shards (a kind of slot), in its order, the number of its part.

    Parts are numbered in the order of their first shards.
    """
    blocks = layout.shard_holders.blocks[layout.held.lists[kind]]
    if not len(blocks) or (blocks == blocks[0]).all():
        return np.zeros(len(blocks), np.int64)
    _, first, places = np.unique(blocks, return_index=True, return_inverse=True)
    return first.argsort().argsort()[places.reshape(-1)]


def part_digests(
    layout: Layout, position: int, checksums: Sequence[Sequence[int]], values: Mapping[str, Value]
) -> tuple[str, ...]:
    """One digest per part of a slot, and behind them that of its values; none where there are too many.

    `checksums`: of each shard, in the order of the slot, those of its blocks as saved.
    """
    numbers = part_numbers(layout, layout.held.kinds[position])
    parts: dict[int, list[Sequence[int]]] = {}
    for number, blocks in zip(numbers.tolist(), checksums, strict=True):
        parts.setdefault(number, []).append(blocks)
    if len(parts) > MOST_PARTS:
        return ()
    texts = [json.dumps(parts[number]) for number in range(len(parts))]
    return tuple(_digest(text) for text in (*texts, json.dumps(values_to_json(values))))


def _digest(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
