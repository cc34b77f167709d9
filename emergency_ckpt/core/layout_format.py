"""Shards and holders of a layout in JSON. Version 2 is small: leaves that are cut and held alike are one entry.

Equal tables give equal JSON, and whatever is read is a sound table or refused; sizes are bounded before memory
is taken. Version 1 wrote every shard and every index out; it is read as before, and written for layouts of that
version, whose names are hashes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from emergency_ckpt.core.box_table import BoxTable, Numbers
from emergency_ckpt.core.shard_table import HeldShards, ShardTable
from emergency_ckpt.core.shards import Box, Shard

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)

# Of shards, and of (process list, shard) pairs: 16,384 processes with 4,096 shards each.
_MOST_ENTRIES = 1 << 26


def shards_to_json(shards: ShardTable, held: HeldShards, version: int) -> dict[str, Any]:
    """The fields of a layout's JSON that say which shards exist and who holds them."""
    if version == 1:
        boxes = [[shard.leaf, list(shard.box.start), list(shard.box.stop)] for shard in shards]
        return {"shards": boxes, "process_shards": [list(indices) for indices in held]}
    owners, indices = _pairs(shards, held)
    ends = np.searchsorted(indices, shards.first).tolist()
    numbers: dict[tuple[BoxTable, bytes, bytes], int] = {}
    cuts: list[list[Any]] = []
    leaves: list[list[Any]] = []
    for number, (leaf, table) in enumerate(zip(shards.leaves, shards.boxes, strict=True)):
        own = owners[ends[number] : ends[number + 1]]
        rows = indices[ends[number] : ends[number + 1]] - shards.first[number]
        key = table, own.tobytes(), rows.tobytes()
        if key not in numbers:
            numbers[key] = len(cuts)
            cuts.append([len(table), table.rows.ravel().tolist(), own.tolist(), rows.tolist()])
        leaves.append([leaf, numbers[key]])
    return {"cuts": cuts, "shards": leaves, "process_kinds": list(held.kinds)}


def shards_from_json(raw: Any, version: int) -> tuple[ShardTable, HeldShards]:
    """Raises ValueError, TypeError, KeyError, IndexError or OverflowError for what is no sound table."""
    if version == 1:
        return _parse_plain(raw)
    kinds = tuple(map(int, raw["process_kinds"]))
    if any(not 0 <= kind < len(kinds) for kind in kinds):
        raise ValueError("process_kinds names lists that there cannot be")
    cuts = [_parse_cut(cut, max(kinds, default=-1) + 1) for cut in raw["cuts"]]
    named = [(str(leaf), cuts[_index(cut, len(cuts))]) for leaf, cut in raw["shards"]]
    if max(sum(len(cut[0]) for _, cut in named), sum(len(cut[1]) for _, cut in named)) > _MOST_ENTRIES:
        raise ValueError(f"more than {_MOST_ENTRIES} shards")
    shards = ShardTable((leaf for leaf, _ in named), (cut[0] for _, cut in named))
    owners = [cut[1] for _, cut in named]
    indices = [cut[2] + first for first, (_, cut) in zip(shards.first, named, strict=False)]
    return shards, HeldShards.of_pairs(kinds, _joined(owners), _joined(indices))


def _pairs(shards: ShardTable, held: HeldShards) -> tuple[Numbers, Numbers]:
    """(number of a list, shard) of everything that is held, ascending by shard and then by list."""
    owners = np.repeat(np.arange(len(held.lists)), [len(indices) for indices in held.lists])
    indices = _joined(held.lists)
    order = np.argsort(indices, kind="stable")
    return owners[order], indices[order]


def _parse_cut(raw: Any, lists: int) -> tuple[BoxTable, Numbers, Numbers]:
    """A table of boxes, and who holds which of them: numbers of lists, and rows that ascend within each."""
    count, bounds, owners, rows = raw
    count = int(count)
    numbers = _numbers(bounds)
    if not 0 < count <= max(1, len(numbers)) or len(numbers) % count:
        raise ValueError(f"{len(numbers)} numbers are no {count} boxes")
    table = BoxTable(numbers.reshape(count, len(numbers) // count))
    owned, held = _numbers(owners), _numbers(rows)
    if len(owned) != len(held) or _outside(owned, lists) or _outside(held, count):
        raise ValueError("a cut names lists or boxes that there are not")
    if ((held[1:] - held[:-1]) * lists + (owned[1:] - owned[:-1]) <= 0).any():
        raise ValueError("the holders of a cut do not ascend")
    return table, owned, held


def _parse_plain(raw: Any) -> tuple[ShardTable, HeldShards]:
    shards = ShardTable.of(
        Shard(str(leaf), Box(tuple(map(int, start)), tuple(map(int, stop))))
        for leaf, start, stop in raw["shards"]
    )
    return shards, HeldShards.of([tuple(map(int, held)) for held in raw["process_shards"]])


def _numbers(raw: Any) -> Numbers:
    return np.array(list(map(int, raw)), np.int64)


def _outside(numbers: Numbers, count: int) -> bool:
    return bool(((numbers < 0) | (numbers >= count)).any())


def _index(raw: Any, count: int) -> int:
    index = int(raw)
    if not 0 <= index < count:
        raise IndexError(f"{index} is none of {count}")
    return index


def _joined(arrays: Sequence[Numbers]) -> Numbers:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)
