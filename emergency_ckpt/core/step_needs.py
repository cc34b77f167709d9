"""What each process needs of one step, and whether it can get it: own slot, slots of others, persistent tier.

Processes with the same shards are looked at together where nothing tells them apart. Nothing is handed out
before everybody's needs are known to be met.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from emergency_ckpt.core.box_table import Numbers
from emergency_ckpt.core.cover import Cover, Flags, find_cover
from emergency_ckpt.core.restore_plan import IN_PLACE, ProcessPlan, Take
from emergency_ckpt.core.shards import Shard
from emergency_ckpt.core.sources import Givers
from emergency_ckpt.core.survivors import Kind, Survivors
from emergency_ckpt.core.universe import Universe, among, distinct, joined, without


@dataclasses.dataclass(frozen=True, eq=False)
class _Need:
    """What one process has to get.

    Attributes:
      in_place: its own slot is kept.
      near: shards that it has or can take as they are, ascending.
      far: shards that nobody gives it as they are.
    """

    in_place: bool
    near: Numbers
    far: Numbers

    @property
    def is_whole(self) -> bool:
        return self.in_place and not len(self.near) and not len(self.far)


@dataclasses.dataclass(frozen=True)
class StepNeeds:
    """The needs of all processes of one step.

    Attributes:
      universe: the shards of all layouts.
      survivors: the slots that may be used.
      served: the processes that others can fetch from; None: all.
      groups: the processes that can send to each other by broadcast.
      single_replica: one slice gets everything, the others receive it.
      lacking: shards that the persistent tier does not have; None where it does not have the step.
    """

    universe: Universe
    survivors: Survivors
    served: frozenset[int] | None
    groups: tuple[tuple[int, ...], ...]
    single_replica: bool
    lacking: frozenset[Shard] | None

    @functools.cached_property
    def lost(self) -> Mapping[int, Numbers]:
        """Per process that cannot get all, the shards that it cannot get, as indices of the wanted layout."""
        return {
            process: numbers
            for process in range(len(self._needs))
            if process not in self._senders and len(numbers := self._unmet(process))
        }

    @functools.cached_property
    def survive(self) -> Flags:
        """Per shard of the wanted layout, whether any slot has it as it is, in reach or not."""
        found = np.zeros(len(self.universe), np.bool_)
        for kind in self.survivors.kinds:
            found[kind.good] = True
        return found[: len(self.universe.wanted.shards)]

    def processes(self) -> tuple[ProcessPlan, ...]:
        """Per process where it gets everything from. Nothing may be lost."""
        assert not self.lost
        return tuple(self._process(process) for process in range(len(self._needs)))

    def reads(self, shards: Iterable[Shard], values: bool) -> bool:
        """Whether anybody reads some of these from the persistent tier; `values`: or what is no array."""
        contested = self._meeting(shards)
        for process, need in enumerate(self._needs):
            if process in self._senders:
                continue
            persistent = self._cover_for(process)[1] if len(need.far) else need.far
            if contested[persistent].any():
                return True
            if values and not need.in_place and not len(need.near) and len(persistent) == len(need.far):
                return True
        return False

    def _process(self, process: int) -> ProcessPlan:
        need = self._needs[process]
        if process in self._senders:
            return ProcessPlan(sender=self._senders[process])
        if need.is_whole:
            return IN_PLACE
        wanted, persistent = need.near, need.far[:0]
        if len(need.far):
            sources, persistent = self._cover_for(process)
            wanted = distinct(joined((wanted, sources)))
        takes = self._givers.takes(process, wanted) if len(wanted) else ()
        if not need.in_place:
            takes += self._description(process)
        return ProcessPlan(need.in_place, takes, tuple(persistent.tolist()))

    def _description(self, process: int) -> tuple[Take, ...]:
        """A take of no shards: of the slot that has the right values, where not all have."""
        describers = self.survivors.describers
        slot = next((each for each in describers if each.process == process), next(iter(describers), None))
        return () if slot is None else (Take(slot.process, slot.layout, slot.position, ()),)

    # What is needed.

    @functools.cached_property
    def _givers(self) -> Givers:
        return Givers(self.universe, self.survivors, self.served)

    @functools.cached_property
    def _needs(self) -> Sequence[_Need]:
        """Per process; those of the same shards that keep no slot and reach the same share one."""
        layout = self.universe.wanted
        found: list[_Need] = []
        alike: dict[int, _Need] = {}
        whole = _Need(True, np.empty(0, np.int64), np.empty(0, np.int64))
        for process, kind in enumerate(layout.held.kinds):
            own = self.survivors.of_process.get(process, ())
            slots = [self.survivors.kinds[k] for k, _ in own]
            kept = [each for each in slots if each.shards == kind and not each.is_outvoted]
            best = min(kept, key=self._rank, default=None)
            held = layout.held.lists[kind]
            if best is not None and len(best.good) == len(held):
                need = whole
            elif best is not None:
                need = self._need(process, True, without(held, best.good))
            elif own and not self._is_served(process):
                need = self._need(process, False, held)  # It alone has what lies in its slots.
            else:
                need = (
                    alike[kind] if kind in alike else alike.setdefault(kind, self._need(process, False, held))
                )
            found.append(need)
        return found

    def _rank(self, kept: Kind) -> tuple[int, str]:
        """The slot with most good shards is kept; its process chooses alike (see `runtime.filling`)."""
        return -len(kept.good), self.universe.hashes[kept.layout]

    def _need(self, process: int, in_place: bool, left: Numbers) -> _Need:
        left = left[self.universe.nbytes[left] > 0]
        reached = self._givers.reach(process, left)
        return _Need(in_place, left[reached], left[~reached])

    # What nobody gives as it is.

    @functools.cached_property
    def _cover(self) -> Cover:
        """Of all shards that somebody lacks, by what everybody can fetch."""
        far = {id(need): need.far for need in self._needs if len(need.far)}
        return find_cover(self.universe, distinct(joined(tuple(far.values()))), self._givers.available)

    def _cover_for(self, process: int) -> tuple[Numbers, Numbers]:
        """What covers the shards that nobody gives a process as they are, and those that are not covered.

        By the process's own slots as well, where others cannot fetch from those.
        """
        need = self._needs[process]
        if id(need) not in self._covers:
            cover = self._cover
            if not self._is_served(process) and (own := self.survivors.of_process.get(process, ())):
                available = self._givers.available
                for kind, _ in own:
                    available[self.survivors.kinds[kind].good] = True
                cover = find_cover(self.universe, need.far, available)
            self._covers[id(need)] = cover.of(need.far)
        return self._covers[id(need)]

    @functools.cached_property
    def _covers(self) -> dict[int, tuple[Numbers, Numbers]]:
        """By need: processes that share one reach the same."""
        return {}

    def _is_served(self, process: int) -> bool:
        return self.served is None or process in self.served

    def _uncovered(self, process: int) -> Numbers:
        far = self._needs[process].far
        return self._cover_for(process)[1] if len(far) else far

    def _unmet(self, process: int) -> Numbers:
        """What not even the persistent tier gives."""
        uncovered = self._uncovered(process)
        if self.lacking is None or not len(uncovered):
            return uncovered
        return uncovered[self._damaged[uncovered]]

    @functools.cached_property
    def _damaged(self) -> Flags:
        """Per wanted shard, whether the persistent tier lacks some of it."""
        return self._meeting(self.lacking or ())

    def _meeting(self, shards: Iterable[Shard]) -> Flags:
        """Per wanted shard, whether any of these has some of it."""
        table = self.universe.wanted.table
        found = np.zeros(len(table), np.bool_)
        for shard in shards:
            leaf = table.leaf_number.get(shard.leaf)
            if leaf is not None:
                found[table.first[leaf] + table.boxes[leaf].meeting(shard.box)] = True
        return found

    # Broadcast.

    @functools.cached_property
    def _senders(self) -> Mapping[int, int]:
        """Per process that receives all its shards by broadcast, who sends them."""
        kinds = self.universe.wanted.held.kinds
        senders: dict[int, int] = {}
        first = self._hydrating_slice() if self.single_replica else None
        for group in self.groups:
            whole = [p for p in group if self._needs[p].is_whole]
            rest = [p for p in group if not self._needs[p].is_whole]
            for process in rest:
                # Nobody whom it needs can be asked, but a counterpart has everything.
                able = [p for p in whole if kinds[p] == kinds[process]]
                if able and len(self._uncovered(process)):
                    senders[process] = able[0]
            root = next((p for p in group if self.universe.wanted.process_slice[p] == first), None)
            if root is None:
                continue
            for process in rest:
                if process != root and kinds[process] == kinds[root]:
                    senders[process] = senders.get(root, root)
        return senders

    def _hydrating_slice(self) -> int:
        """The slice whose processes hold most of what they need; of several the first."""
        layout = self.universe.wanted
        held = np.zeros(max(layout.slice_count, 1), np.int64)
        for process, kind in enumerate(layout.held.kinds):
            wanted = layout.held.lists[kind]
            own = np.zeros(len(wanted), np.bool_)
            for number, _ in self.survivors.of_process.get(process, ()):
                own |= among(wanted, self.survivors.kinds[number].good)
            held[layout.process_slice[process]] += layout.shard_sizes[wanted[own]].sum()
        return int(held.argmax())
