"""What a job comes back from when ramdisks are lost, decided by the planner that real restores use.

A large job falls into groups of hosts that share no shard with others; what can be restored is worked out for
one group of a kind and what is lost in it, and then known for all.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Collection, Sequence

from emergency_ckpt.core.copies import Survivable, survivable
from emergency_ckpt.core.forecast.job_shape import JobShape, Protection, layouts_of
from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.shards import Box
from emergency_ckpt.core.storage import either


class Source(enum.IntEnum):
    """Where a restore comes from: the slowest of its sources."""

    OWN = 0  # Every host reads its own ramdisk.
    PEERS = 1  # Some hosts take shards from others.
    PERSISTENT = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Restored:
    """The step that comes back, and from where."""

    step: int
    source: Source


class PlannedRecovery:
    """This package: any mix of survivors that has every shard restores the newest step."""

    def __init__(self, shape: JobShape, protection: Protection) -> None:
        """Raises ConfigError for copies that there cannot be."""
        self._devices, self._storage = layouts_of(shape, protection.copies, protection.spreads)
        groups = _groups(either(self._devices, self._storage))
        self._group_of = {p: (number, at) for number, of in enumerate(groups) for at, p in enumerate(of)}
        self._kinds, self._kind_of = self._sort(groups)
        self._alike = [_Alike(devices, storage) for devices, storage in self._kinds]
        self._known: dict[tuple[int, frozenset[int], bool], Restored] = {}

    @property
    def survivable(self) -> Survivable:
        """How many hosts or slices may be lost, whichever they are."""
        return survivable(self._storage)

    def restore(self, lost: Collection[int], local: int | None, persistent: int) -> Restored:
        """What the planner chooses.

        Args:
          lost: the hosts whose ramdisks are empty, each once.
          local: the step on the others; None: they have none either.
          persistent: the newest committed step, older than `local` or the same (0: the state at the start).
        """
        if local is None or local < persistent or len(lost) == len(self._group_of):
            return Restored(persistent, Source.PERSISTENT)
        by_group: dict[int, list[int]] = collections.defaultdict(list)
        for host in lost:
            number, at = self._group_of[host]
            by_group[number].append(at)
        asked = {(kind, frozenset[int]()) for kind in range(len(self._kinds))}
        asked |= {(self._kind_of[number], frozenset(of)) for number, of in by_group.items()}
        found = [self._restore_group(kind, gone, persistent == local) for kind, gone in asked]
        source = max(each.source for each in found)
        is_local = all(each.step for each in found)
        return Restored(local if is_local else persistent, source if is_local else Source.PERSISTENT)

    def _restore_group(self, kind: int, lost: frozenset[int], same: bool) -> Restored:
        """Step 1 is the local one; the persistent tier has the same, or step 0."""
        lost = self._alike[kind].representative(lost)
        key = kind, lost, same
        if key not in self._known:
            devices, storage = self._kinds[kind]
            needed = either(devices, storage)
            step = StepId(1, 1)
            inventories = tuple(
                Inventory(p, (Holding(step, storage.hash, p, f"{storage.held.kinds[p]}"),))
                for p in range(storage.process_count)
                if p not in lost
            )
            planner = Planner(
                needed,
                tuple((p,) for p in range(needed.process_count)),
                inventories,
                (StepId(1, int(same)),),
                stored=None if storage is needed else storage,
            )
            plan, reason = planner.plan()
            assert plan is not None, reason
            is_own = all(each.is_whole for each in plan.processes)
            source = Source.PERSISTENT if plan.uses_persistent else Source.OWN if is_own else Source.PEERS
            self._known[key] = Restored(plan.step.step, source)
        return self._known[key]

    def _sort(self, groups: Sequence[Sequence[int]]) -> tuple[list[tuple[Layout, Layout]], list[int]]:
        """One pair of layouts per kind of group, and the kind of each group."""
        kinds: dict[object, int] = {}
        tuples: dict[tuple[int, int], tuple[int, ...]] = {}

        def shards(which: int, layout: Layout, process: int) -> tuple[int, ...]:
            key = which, layout.held.kinds[process]
            if key not in tuples:
                tuples[key] = tuple(layout.held.of_process(process).tolist())
            return tuples[key]

        layouts: list[tuple[Layout, Layout]] = []
        kind_of: list[int] = []
        for processes in groups:
            held = [
                [shards(which, layout, p) for p in processes]
                for which, layout in enumerate((self._devices, self._storage))
            ]
            different = {*held[0], *held[1]}
            number = {s: i for i, s in enumerate(sorted({s for of in different for s in of}))}
            renamed = {of: tuple(number[s] for s in of) for of in different}
            devices, storage = ([renamed[of] for of in each] for each in held)
            slices = _ranks([self._devices.process_slice[p] for p in processes])
            key = slices, tuple(devices), tuple(storage)
            if key not in kinds:
                kinds[key] = len(layouts)
                layouts.append(_small_layouts(len(number), slices, devices, storage))
            kind_of.append(kinds[key])
        return layouts, kind_of


class _Alike:
    """Hosts of a group that hold the same, on devices and in slots, stand for each other."""

    def __init__(self, devices: Layout, storage: Layout) -> None:
        kinds = list(zip(devices.held.kinds, storage.held.kinds, strict=True))
        self._kind_of = kinds
        self._members: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        for process, kind in enumerate(kinds):
            self._members[kind].append(process)

    def representative(self, lost: frozenset[int]) -> frozenset[int]:
        """One host of each sort of which some are lost, all of those of which all are.

        What is left of a sort gives the others everything, be it one host or many.
        """
        counts = collections.Counter(self._kind_of[process] for process in lost)
        found: list[int] = []
        for kind, count in counts.items():
            members = self._members[kind]
            found += members if count == len(members) else members[:1]
        return frozenset(found)


def _groups(layout: Layout) -> list[list[int]]:
    """Processes that share shards, directly or through others; ascending."""
    leaders = list(range(layout.process_count))

    def leader(process: int) -> int:
        while leaders[process] != process:
            leaders[process] = leaders[leaders[process]]
            process = leaders[process]
        return process

    for holders, _ in layout.shard_holders.of_blocks():
        for process in holders[1:]:
            leaders[leader(process)] = leader(holders[0])
    found: dict[int, list[int]] = collections.defaultdict(list)
    for process in range(layout.process_count):
        found[leader(process)].append(process)
    return list(found.values())


def _ranks(slices: Sequence[int]) -> tuple[int, ...]:
    """The same slices, counted from 0: groups of other slices that are alike are of one kind."""
    numbers = {s: i for i, s in enumerate(sorted(set(slices)))}
    return tuple(numbers[s] for s in slices)


def _small_layouts(count: int, slices: Sequence[int], *held: Sequence[Sequence[int]]) -> tuple[Layout, Layout]:
    """Layouts of `count` shards, as these processes hold them; the very same object where they are equal."""
    devices, storage = (
        Layout.build_from_boxes(
            [LeafSpec("state", (count,), "uint8")],
            {"state": {p: [Box((s,), (s + 1,)) for s in of] for p, of in enumerate(each)}},
            tuple(slices),
        )
        for each in held
    )
    return devices, devices if storage.held == devices.held else storage
