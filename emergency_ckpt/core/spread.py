"""Spreading: slices that hold the same shards by nature share the work of keeping them on their ramdisks.

The result is a storage layout in which each shard that more slices hold than copies are wanted lies in exactly
so many of them, on every host of these slices that holds it. It follows from the layout alone.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import heapq
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from emergency_ckpt.core.box_table import Numbers
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.shard_table import HeldShards


def spread(layout: Layout, copies: int) -> Layout:
    """The storage layout in which no shard lies in more than `copies` slices (at least one).

    What fewer slices hold is left alone; where no shard is held by more, so is all of it. Slices stand in fixed
    groups of `copies`, which keep the same shards (see `core.copies`). Where that leaves some, the last
    group has up to `2 * copies - 1` slices, and each of its shards lies in `copies` of them.

    Hosts that hold the same shards by nature keep the same number of bytes, but for one shard of the largest
    size (a few, where groups are not alike), and slices are evened out where that leaves a choice.
    """
    copies = max(1, copies)
    blocks = _blocks(layout)
    if copies >= layout.slice_count or all(len(block.holders) <= copies for block in blocks):
        return layout
    loads, packer = _Loads.none(layout), _Packer()
    parts: list[list[Numbers]] = [[] for _ in layout.process_slice]
    # What most hosts hold first: what fewer hold evens out what it left behind.
    for block in sorted(blocks, key=lambda each: (-each.process_count, int(each.shards[0]))):
        sizes = layout.shard_sizes[block.shards]
        order = np.argsort(-sizes, kind="stable")
        for slice_, rows in _rows_by_slice(sizes[order], block, copies, loads, packer):
            shards = block.shards[order[rows]]
            loads.add(slice_, block.holders[slice_], int(layout.shard_sizes[shards].sum()))
            for process in block.holders[slice_]:
                parts[process].append(shards)
    none = np.empty(0, np.int64)
    lists = [np.sort(np.concatenate([none, *each])) for each in parts]
    return dataclasses.replace(layout, process_shards=HeldShards(range(len(lists)), lists))


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """Shards that the same processes hold: ascending, and per slice its holders, slices ascending."""

    shards: Numbers
    holders: Mapping[int, Sequence[int]]

    @functools.cached_property
    def process_count(self) -> int:
        return sum(map(len, self.holders.values()))


@dataclasses.dataclass(frozen=True)
class _Loads:
    """Bytes that processes and slices were given so far."""

    of_process: list[int]
    of_slice: list[int]

    @classmethod
    def none(cls, layout: Layout) -> _Loads:
        return cls([0] * layout.process_count, [0] * layout.slice_count)

    def add(self, slice_: int, processes: Sequence[int], nbytes: int) -> None:
        for process in processes:
            self.of_process[process] += nbytes
        self.of_slice[slice_] += nbytes * len(processes)

    def key(self, slices: Sequence[int], block: _Block) -> tuple[int, int]:
        """Compares slices by what the fullest of the holders there has, and then by all that they have."""
        fullest = max(self.of_process[p] for s in slices for p in block.holders[s])
        return fullest, sum(self.of_slice[s] for s in slices)


def _blocks(layout: Layout) -> list[_Block]:
    """All shards that anybody holds, by who holds them."""
    held = layout.held
    block = np.zeros(len(layout.shards), np.int64)
    parents: list[tuple[int, int]] = [(0, -1)]  # Of each block: the one that it was cut from, and a list.
    for kind, indices in enumerate(held.lists):
        blocks, places = np.unique(block[indices], return_inverse=True)
        block[indices] = len(parents) + places
        parents.extend((parent, kind) for parent in blocks.tolist())
    processes: dict[int, list[int]] = collections.defaultdict(list)
    for process, kind in enumerate(held.kinds):
        processes[kind].append(process)
    order = np.argsort(block, kind="stable")
    firsts = np.flatnonzero(np.diff(block[order], prepend=-1)).tolist()
    found: list[_Block] = []
    for begin, end in itertools.pairwise([*firsts, len(order)]):
        at, holders = int(block[order[begin]]), collections.defaultdict[int, list[int]](list)
        while at:
            at, kind = parents[at]
            for process in processes[kind]:
                holders[layout.process_slice[process]].append(process)
        if holders:
            found.append(_Block(order[begin:end], dict(sorted(holders.items()))))
    return found


def _rows_by_slice(
    sizes: Numbers, block: _Block, copies: int, loads: _Loads, packer: _Packer
) -> list[tuple[int, Numbers]]:
    """Per slice, which of the shards of a block it keeps, as rows of `sizes`, which descend."""
    slices = list(block.holders)
    if len(slices) <= copies:
        return [(s, np.arange(len(sizes))) for s in slices]
    groups = [slices[at : at + copies] for at in range(0, len(slices), copies)]
    last: list[int] = []
    if len(groups[-1]) < copies:
        rest = groups.pop()
        last = groups.pop() + rest
    packing = packer.pack(sizes, _Shape(len(groups), copies, len(last)), _tilt(groups, last, block, loads))
    # The fullest part goes to the group that has least: so the difference never grows.
    emptiest = sorted(groups, key=lambda group: (loads.key(group, block), group))
    found = [(s, rows) for group, rows in zip(emptiest, packing.alike, strict=True) for s in group]
    emptiest_slices = sorted(last, key=lambda s: (loads.key([s], block), s))
    return found + list(zip(emptiest_slices, packing.last, strict=True))


def _tilt(groups: Sequence[Sequence[int]], last: Sequence[int], block: _Block, loads: _Loads) -> int:
    """Whether the last group, being larger, has more than the others so far (1), less (-1), or neither."""
    if not groups or not last:
        return 0
    every = [s for group in groups for s in group]
    theirs = sum(loads.key([s], block)[0] for s in every) * len(last)
    own = sum(loads.key([s], block)[0] for s in last) * len(every)
    return (own > theirs) - (own < theirs)


@dataclasses.dataclass(frozen=True)
class _Packing:
    """Rows by group of slices that keep the same, and by slice of the last group; the fullest come first."""

    alike: tuple[Numbers, ...]
    last: tuple[Numbers, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Shape:
    """How many groups of `copies` slices there are, and how many slices in a larger one (0: there is none)."""

    groups: int
    copies: int
    last: int


class _Packer:
    """Packs shards into groups of slices; blocks of the same sizes, as most are in large jobs, only once."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, _Shape, int], _Packing] = {}

    def pack(self, sizes: Numbers, shape: _Shape, tilt: int) -> _Packing:
        """`sizes`: bytes, descending; `tilt`: 1 leaves the larger group less than the others, -1 more."""
        key = sizes.tobytes(), shape, tilt
        if key not in self._known:
            self._known[key] = _pack(sizes.tolist(), shape, tilt)
        return self._known[key]


def _pack(sizes: Sequence[int], shape: _Shape, tilt: int) -> _Packing:
    """Each shard to the group that has least, per slice of it, and there to the slices that have least."""
    groups, copies, last = shape.groups, shape.copies, shape.last
    # Bytes per slice, in units in which those of both kinds of groups are whole numbers.
    weight, weight_of_last = (last or 1), copies
    heap = [(0, group) for group in range(groups)]
    if last:
        # As if it had so much: more than what groups can be apart in the end.
        heap.append((2 * tilt * copies * max(sizes, default=0), groups))
    heapq.heapify(heap)
    rows: list[list[int]] = [[] for _ in range(groups)]
    rows_of_last: list[list[int]] = [[] for _ in range(last)]
    totals, totals_of_last = [0] * groups, [0] * last
    for row, size in enumerate(sizes):
        load, group = heap[0]
        heapq.heapreplace(heap, (load + size * (weight if group < groups else weight_of_last), group))
        if group < groups:
            rows[group].append(row)
            totals[group] += size
            continue
        for member in sorted(range(last), key=lambda m: (totals_of_last[m], m))[:copies]:
            rows_of_last[member].append(row)
            totals_of_last[member] += size
    return _Packing(_fullest_first(rows, totals), _fullest_first(rows_of_last, totals_of_last))


def _fullest_first(rows: Sequence[Sequence[int]], totals: Sequence[int]) -> tuple[Numbers, ...]:
    order = sorted(range(len(rows)), key=lambda at: (-totals[at], at))
    return tuple(np.array(rows[at], np.int64) for at in order)
