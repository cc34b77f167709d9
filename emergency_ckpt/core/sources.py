"""Who gives what: the shards that processes need, spread over those that hold them.

Holders of the same shards give the same number of bytes, but for one shard (where they are very many, but for
what one process takes); each gives a contiguous run of what a process needs, so that many give at once and none
is asked for many small things.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection

import numpy as np

from emergency_ckpt.core.box_table import Numbers
from emergency_ckpt.core.cover import Flags
from emergency_ckpt.core.holders import ShardBlocks
from emergency_ckpt.core.restore_plan import Take
from emergency_ckpt.core.survivors import Survivors
from emergency_ckpt.core.universe import Universe, among, distinct, joined

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
            for block, segment in self._segments(needed):
                holders = self._holders_of(block)
                for giver, part in self._spread(process, segment, holders.processes, used):
                    kind, position = holders.slots[giver]
                    given.setdefault((giver, kind, position), []).append(part)
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

    def _segments(self, needed: Numbers) -> list[tuple[int, Numbers]]:
        """The shards block by block, those of most bytes first: small ones go along with them."""
        blocks = self._blocks.of[needed]
        if (blocks == blocks[0]).all():
            return [(int(blocks[0]), needed)]
        found = [(block, needed[blocks == block]) for block in distinct(blocks).tolist()]
        return sorted(found, key=lambda each: (-int(self._universe.nbytes[each[1]].sum()), int(each[1][0])))

    def _spread(
        self, process: int, segment: Numbers, holders: Numbers, used: Collection[int]
    ) -> list[tuple[int, Numbers]]:
        """(holder, its part) of shards that all these holders have, in runs that even out what each gives."""
        sizes = self._universe.nbytes[segment]
        total = int(sizes.sum())
        loads = self._loads[holders]
        elsewhere = self._slice[holders] != self._slice[process]
        order = np.lexsort((holders, elsewhere, loads))[:MOST_GIVERS]
        if total < UNIT_BYTES:
            before = holders[np.isin(holders, np.array(list(used), np.int64))] if used else holders[:0]
            giver = int(before[0]) if len(before) else int(holders[order[0]])
            self._loads[giver] += total
            return [(giver, segment)]
        ends = np.cumsum(sizes)
        firsts = np.flatnonzero(np.diff((ends - sizes) // UNIT_BYTES, prepend=-1))
        if len(holders) == 1 or len(firsts) == 1:
            giver = int(holders[order[0]])
            self._loads[giver] += total
            return [(giver, segment)]
        behind = np.append(firsts[1:], len(ends))
        givers = np.repeat(self._runs(ends[behind - 1], holders[order], elsewhere[order]), behind - firsts)
        parts = np.argsort(givers, kind="stable")
        borders = np.flatnonzero(np.diff(givers[parts])) + 1
        return [(int(givers[part[0]]), segment[part]) for part in np.split(parts, borders)]

    def _runs(self, ends: Numbers, holders: Numbers, elsewhere: Flags) -> Numbers:
        """Per unit (`ends`: bytes up to its end) its giver; adds to the loads.

        Holders, least loaded first, are filled to one level. Each gives the units that lie within its share;
        those across a border go to whoever has least, the largest first, so that loads differ by no more than
        one unit in the end.
        """
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        loads = self._loads[holders]
        levels = -(-(ends[-1] + np.cumsum(loads)) // np.arange(1, len(loads) + 1))
        count = int(np.flatnonzero(levels > loads)[-1]) + 1
        borders = np.cumsum(levels[count - 1] - loads[:count])
        place = np.minimum(np.searchsorted(borders, starts, side="right"), count - 1)
        inside = ends <= borders[place]
        owner = np.where(inside, holders[place], -1)
        np.add.at(loads, place[inside], (ends - starts)[inside])
        across = np.flatnonzero(~inside).tolist()
        across.sort(key=lambda unit: (starts[unit] - ends[unit], unit))
        heap = [
            (load, far, holder, at)
            for at, (load, far, holder) in enumerate(
                zip(loads.tolist(), elsewhere.tolist(), holders.tolist(), strict=True)
            )
        ]
        heapq.heapify(heap)
        for unit in across:
            load, far, holder, at = heap[0]
            owner[unit] = holder
            loads[at] = load + int(ends[unit] - starts[unit])
            heapq.heapreplace(heap, (int(loads[at]), far, holder, at))
        self._loads[holders] = loads
        return owner

    def _take(self, giver: int, kind: int, position: int, parts: list[Numbers]) -> Take:
        of = self._survivors.kinds[kind]
        numbers = np.sort(joined(parts))
        if of.layout:
            numbers = np.sort(of.indices[np.searchsorted(of.good, numbers)])
        return Take(giver, self._universe.hashes[of.layout], position, tuple(numbers.tolist()))
