"""Who gives what: the shards that processes need, spread over those that hold them.

Holders of the same shards give the same number of bytes, but for one shard (where they are very many, but for
what one process takes); each gives a contiguous run of what a process needs, so that many give at once and none
is asked for many small things.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from emergency_ckpt.core.box_table import Numbers
from emergency_ckpt.core.cover import Flags
from emergency_ckpt.core.holders import ShardBlocks
from emergency_ckpt.core.restore_plan import Take
from emergency_ckpt.core.survivors import Survivors
from emergency_ckpt.core.universe import Universe, among, joined

UNIT_BYTES = 256 * 1024
"""Neighbouring shards that are smaller together are taken from one holder: asking costs more than sending."""

MOST_GIVERS = 32
"""Of more holders of the same shards a process takes from those that gave least so far."""


@dataclasses.dataclass(frozen=True)
class _Holders:
    """Who holds some shards: processes ascending, and for each the kind of its slot and its position."""

    processes: Numbers
    slots: dict[int, tuple[int, int]]


class Givers:
    """The slots that processes may take from, and how much each was made to give so far.

    Shards that the same kinds of slots hold form a block; 0 is the block of those that nobody gives.
    """

    def __init__(self, universe: Universe, survivors: Survivors, served: frozenset[int] | None) -> None:
        """`served`: the processes that others can fetch from; None: all."""
        self._universe = universe
        self._survivors = survivors
        self._loads = np.zeros(universe.wanted.process_count, np.int64)
        self._slice = np.array(universe.wanted.process_slice, np.int64)
        self._blocks = ShardBlocks(len(universe))
        self._holders: dict[int, _Holders] = {}
        self._serving: list[tuple[tuple[int, int], ...]] = []
        for number, kind in enumerate(survivors.kinds):
            slots = tuple(slot for slot in kind.slots if served is None or slot[0] in served)
            self._serving.append(slots)
            if slots:
                self._blocks.divide(number, kind.good)

    @property
    def available(self) -> Flags:
        """Per shard of the universe, whether anybody gives it."""
        return self._blocks.of > 0

    def reach(self, process: int, needed: Numbers) -> Flags:
        """Which of these shards a process has in a slot of its own or can take."""
        found = self._blocks.of[needed] > 0
        for kind, _ in self._survivors.of_process.get(process, ()):
            found |= among(needed, self._survivors.kinds[kind].good)
        return found

    def takes(self, process: int, needed: Numbers) -> tuple[Take, ...]:
        """Where a process takes these shards from, all of which are in its reach; ascending, each once."""
        given: dict[tuple[int, int, int], list[Numbers]] = {}
        for kind, position in self._survivors.of_process.get(process, ()):
            own = among(needed, self._survivors.kinds[kind].good)
            if own.any():
                given[process, kind, position] = [needed[own]]
                needed = needed[~own]
        if len(needed):
            used: list[int] = []
            for block, shards, sizes in self._segments(needed):
                holders = self._holders_of(block)
                for giver, part in self._spread(process, sizes, holders, used):
                    kind, position = holders.slots[giver]
                    given.setdefault((giver, kind, position), []).append(shards[part])
                    used.append(giver)
        return tuple(self._take(*source, parts) for source, parts in sorted(given.items()))

    def _holders_of(self, block: int) -> _Holders:
        found = self._holders.get(block)
        if found is None:
            slots: dict[int, tuple[int, int]] = {}
            for kind in self._blocks.lists(block):
                slots.update((process, (kind, position)) for process, position in self._serving[kind])
            found = _Holders(np.array(sorted(slots), np.int64), slots)
            self._holders[block] = found
        return found

    def _segments(self, needed: Numbers) -> list[tuple[int, Numbers, Numbers]]:
        """(block, its shards, their sizes), those of most bytes first: small ones go along with them."""
        blocks = self._blocks.of[needed]
        sizes = self._universe.nbytes[needed]
        if (blocks == blocks[0]).all():
            return [(int(blocks[0]), needed, sizes)]
        order = blocks.argsort(kind="stable")
        blocks, needed, sizes = blocks[order], needed[order], sizes[order]
        found = [(int(blocks[a]), needed[a:b], sizes[a:b]) for a, b in _pieces(blocks)]
        return sorted(found, key=lambda each: (-int(each[2].sum()), int(each[1][0])))

    def _spread(
        self, process: int, sizes: Numbers, holders: _Holders, used: Collection[int]
    ) -> list[tuple[int, slice]]:
        """(holder, its part) of shards that all these holders have, in runs that even out what each gives."""
        ends = sizes.cumsum()
        total = int(ends[-1])
        all_of = slice(None)
        if total < UNIT_BYTES and (before := [giver for giver in used if giver in holders.slots]):
            self._loads[min(before)] += total
            return [(min(before), all_of)]
        if len(holders.processes) == 1:
            givers, elsewhere = holders.processes, [False]
        else:
            givers, elsewhere = self._least_loaded(process, holders.processes)
        starts = ends - sizes
        if len(givers) == 1 or total < UNIT_BYTES or starts[-1] < UNIT_BYTES:
            self._loads[givers[0]] += total
            return [(int(givers[0]), all_of)]
        loads: list[int] = self._loads[givers].tolist()
        shares = _level(loads, total)
        runs, across = _cut(starts, ends, shares)
        for place, begin, end in runs:
            loads[place] += int(ends[end - 1] - starts[begin])
        # Those across a border go to whoever has least, the largest first, so that loads differ by no more than
        # one unit in the end.
        heap = [(load, elsewhere[place], int(givers[place]), place) for place, load in enumerate(loads)]
        heapq.heapify(heap)
        for nbytes, begin, end in across:
            load, far, giver, place = heap[0]
            loads[place] = load - nbytes
            runs.append((place, begin, end))
            heapq.heapreplace(heap, (loads[place], far, giver, place))
        self._loads[givers] = loads
        return [(int(givers[place]), slice(begin, end)) for place, begin, end in runs]

    def _least_loaded(self, process: int, holders: Numbers) -> tuple[Numbers, list[bool]]:
        """Those that gave least so far, ascending by that, and whether each is in another slice.

        Of equal ones those of the process's own slice come first, then the lowest.
        """
        elsewhere = self._slice[holders] != self._slice[process]
        rank = 2 * self._loads[holders] + elsewhere
        if len(holders) > MOST_GIVERS:
            near = (rank <= np.partition(rank, MOST_GIVERS - 1)[MOST_GIVERS - 1]).nonzero()[0]
            order = near[rank[near].argsort(kind="stable")][:MOST_GIVERS]
        else:
            order = rank.argsort(kind="stable")
        return holders[order], elsewhere[order].tolist()

    def _take(self, giver: int, kind: int, position: int, parts: list[Numbers]) -> Take:
        layout = self._survivors.kinds[kind].layout
        numbers = np.sort(joined(parts)) if len(parts) > 1 else parts[0]
        indices = self._universe.indices(layout, numbers)
        return Take(giver, self._universe.hashes[layout], position, tuple(indices.tolist()))


def _pieces(ascending: Numbers) -> Iterator[tuple[int, int]]:
    """`(begin, end)` of each run of equal numbers."""
    borders = (ascending[1:] != ascending[:-1]).nonzero()[0] + 1
    return itertools.pairwise((0, *borders.tolist(), len(ascending)))


def _level(loads: Sequence[int], nbytes: int) -> list[int]:
    """How much each of the first ones takes, if loads, which ascend, are filled to one level."""
    above, count = nbytes + loads[0], 1
    level = above
    while count < len(loads) and -(-(above + loads[count]) // (count + 1)) > loads[count]:
        above += loads[count]
        count += 1
        level = -(-above // count)
    return [level - load for load in loads[:count]]


def _cut(
    starts: Numbers, ends: Numbers, shares: Sequence[int]
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Cuts shards, one behind the other, into shares, between units (see `UNIT_BYTES`).

    Returns the runs of whole units that lie within a share, as (its place, begin, end), and the units across a
    border of shares as (bytes below zero, begin, end), the largest first.
    """
    borders = np.cumsum(shares[:-1])
    units = starts[starts.searchsorted(borders, side="right") - 1] // UNIT_BYTES
    first = starts.searchsorted(units * UNIT_BYTES)
    behind = starts.searchsorted((units + 1) * UNIT_BYTES)
    runs: list[tuple[int, int, int]] = []
    across: set[tuple[int, int, int]] = set()
    at = 0
    for place, (border, begin, end) in enumerate(
        zip(borders.tolist(), first.tolist(), behind.tolist(), strict=True)
    ):
        unit_start, unit_end = int(starts[begin]), int(ends[end - 1])
        if border >= unit_end:
            begin = end
        elif border > unit_start:
            across.add((unit_start - unit_end, begin, end))
        else:
            end = begin
        if at < begin:
            runs.append((place, at, begin))
        at = end
    if at < len(starts):
        runs.append((len(shares) - 1, at, len(starts)))
    return runs, sorted(across)
