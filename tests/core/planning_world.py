"""Made-up jobs and what is left of them, with an account of every element: what the planner is held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from hypothesis import strategies as st

from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.other_layouts import OtherLayout
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.restore_plan import ProcessPlan, RestorePlan, Strike
from emergency_ckpt.core.shards import Box, Shard

STEP = StepId(3, 70)
Elements = dict[str, np.ndarray]  # Per leaf which elements.


@dataclasses.dataclass(frozen=True)
class World:
    """One step of one run: who holds what, what was struck, what is wanted."""

    planner: Planner
    strikes: tuple[Strike, ...] = ()

    @property
    def layout(self) -> Layout:
        return self.planner.layout

    def layout_of(self, holding: Holding) -> Layout:
        for own in (self.layout, self.planner.stored):
            if own is not None and holding.layout == own.hash:
                return own
        return self.planner.others[holding.layout].layout

    def holdings(self, process: int) -> list[Holding]:
        return [
            h for i in self.planner.inventories if i.process == process for h in i.holdings if h.step == STEP
        ]

    def good(self, process: int, holding: Holding) -> set[int]:
        """Indices into the holding's layout of what is good in it."""
        layout = self.layout_of(holding)
        struck = [s for s in self.strikes if s.process == process]
        if any(s.shards is None for s in struck):
            return set()
        bad = set(holding.missing) | {
            i for s in struck for shard in s.shards or () if (i := layout.shard_index.get(shard)) is not None
        }
        return set(layout.process_shards[holding.position]) - bad

    def in_reach(self, process: int) -> set[Shard]:
        """The shards that a process has or can fetch."""
        served = self.planner.served
        found: set[Shard] = set()
        for other in range(self.layout.process_count):
            if other == process or served is None or other in served:
                for holding in self.holdings(other):
                    found |= {self.layout_of(holding).shards[i] for i in self.good(other, holding)}
        return found

    def whole(self, process: int) -> bool:
        """Whether a slot of its own has all that it needs."""
        wanted = {s for s in self.wanted(process) if s.box.size}
        every = set(self.wanted(process))
        for holding in self.holdings(process):
            layout = self.layout_of(holding)
            held = {layout.shards[i] for i in layout.process_shards[holding.position]}
            good = {layout.shards[i] for i in self.good(process, holding)}
            if held == every and wanted <= good:
                return True
        return False

    def wanted(self, process: int) -> list[Shard]:
        return [self.layout.shards[i] for i in self.layout.process_shards[process]]

    def tier_has(self, shard: Shard) -> bool:
        """Whether the persistent tier gives a shard."""
        if STEP not in self.planner.persistent:
            return False
        struck = [s for s in self.strikes if s.process is None]
        return not any(
            s.shards is None or any(o.leaf == shard.leaf and o.box.intersect(shard.box) for o in s.shards)
            for s in struck
        )

    def counterparts(self, process: int) -> list[int]:
        group = next((g for g in self.planner.groups if process in g), ())
        mine = self.layout.process_shards[process]
        return [p for p in group if p != process and self.layout.process_shards[p] == mine]

    def lost(self) -> set[Shard]:
        """Every wanted shard that somebody cannot get in any way, worked out element by element."""
        lost: set[Shard] = set()
        for process in range(self.layout.process_count):
            if any(self.whole(p) for p in self.counterparts(process)):
                continue
            elements = self.elements(self.in_reach(process))
            lost |= {
                shard
                for shard in self.wanted(process)
                if not elements[shard.leaf][shard.box.slices()].all() and not self.tier_has(shard)
            }
        return lost

    def elements(self, shards: Iterable[Shard]) -> Elements:
        found = {leaf.name: np.zeros(leaf.shape, bool) for leaf in self.layout.leaves}
        for shard in shards:
            found[shard.leaf][shard.box.slices()] = True
        return found

    def taken(self, process: int, plan: ProcessPlan) -> list[tuple[int, Shard]]:
        """(giver, shard) of every take, each checked to be there and to be in reach."""
        found: list[tuple[int, Shard]] = []
        served = self.planner.served
        for take in plan.takes:
            assert take.process == process or served is None or take.process in served
            assert list(take.shards) == sorted(set(take.shards))
            assert take.shards
            matching = [
                h for h in self.holdings(take.process) if (h.layout, h.position) == (take.layout, take.position)
            ]
            assert matching, f"process {take.process} has no such slot"
            assert any(set(take.shards) <= self.good(take.process, h) for h in matching)
            layout = self.layout_of(matching[0])
            found += [(take.process, layout.shards[i]) for i in take.shards]
        return found

    def check(self, plan: RestorePlan) -> None:
        """Every process gets every element that it needs, from those that have it, and nothing twice."""
        assert plan.step == STEP
        assert len(plan.processes) == self.layout.process_count
        for process, own in enumerate(plan.processes):
            if own.sender is not None:
                assert own == ProcessPlan(sender=own.sender)
                assert own.sender in self.counterparts(process)
                assert plan.processes[own.sender].sender is None
                assert not self.whole(process), "what is there need not be sent"
                continue
            taken = [shard for _, shard in self.taken(process, own)]
            assert len(taken) == len(set(taken)), "a shard is taken twice"
            read = [self.layout.shards[i] for i in own.persistent]
            assert set(read) <= set(self.wanted(process))
            assert all(map(self.tier_has, read))
            reach = self.elements(self.in_reach(process))
            for shard in read:
                assert not reach[shard.leaf][shard.box.slices()].all(), "read although it is on ramdisks"
            kept = self.kept(process) if own.in_place else set()
            assert not kept & {*read}
            elements = self.elements([*taken, *read, *kept])
            for shard in self.wanted(process):
                assert elements[shard.leaf][shard.box.slices()].all()
            assert own.is_whole == self.whole(process)
            if own.is_whole:
                assert own == ProcessPlan(in_place=True)
            for giver, shard in self.taken(process, own):
                assert giver == process or shard not in kept, "what is there is fetched"

    def kept(self, process: int) -> set[Shard]:
        """The good shards of its own slot that has exactly what it needs."""
        best: set[Shard] | None = None
        for holding in self.holdings(process):
            layout = self.layout_of(holding)
            held = {layout.shards[i] for i in layout.process_shards[holding.position]}
            good = {layout.shards[i] for i in self.good(process, holding)}
            if held == set(self.wanted(process)) and (best is None or len(good) > len(best)):
                best = good
        assert best is not None, "no slot of its own holds what it needs"
        return best


# Layouts of one state.

LEAVES = (
    LeafSpec("a", (12, 2), "float32"),
    LeafSpec("b", (12,), "int8"),
    LeafSpec("c", (), "float32"),
    LeafSpec("d", (4, 6), "int8"),
    LeafSpec("e", (0, 3), "int8"),
)


def cut_evenly(leaf: LeafSpec, axis: int, pieces: int) -> list[Box]:
    boxes: list[Box] = []
    for piece in range(pieces):
        start, stop = [0] * len(leaf.shape), list(leaf.shape)
        start[axis], stop[axis] = (leaf.shape[axis] * at // pieces for at in (piece, piece + 1))
        boxes.append(Box(tuple(start), tuple(stop)))
    return boxes


@st.composite
def layouts(draw: st.DrawFn, *, cut_alike: bool = False) -> Layout:
    """Slices of hosts, each leaf sharded over a slice, some hosts of it, all slices, or not at all.

    `cut_alike`: no two boxes of a leaf overlap, as in a job of one mesh.
    """
    ways = ["replicated", "sharded", "sharded", "sharded", "partly", "fully", *([] if cut_alike else ["any"])]
    slices, per_slice = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    count = slices * per_slice
    boxes: dict[str, dict[int, list[Box]]] = {}
    for leaf in LEAVES:
        way = draw(st.sampled_from(ways))
        axis = draw(st.integers(0, len(leaf.shape) - 1)) if leaf.shape else 0
        if way == "replicated" or not leaf.shape:
            held = {p: [Box.whole(leaf.shape)] for p in range(count)}
        elif way == "any":
            pool = draw(st.lists(boxes_in(leaf), min_size=1, max_size=4))
            held = {p: [draw(st.sampled_from(pool))] for p in range(count)}
        else:
            pieces = {"sharded": per_slice, "partly": max(1, per_slice // 2), "fully": count}[way]
            cut = cut_evenly(leaf, axis, pieces)
            held = {p: [cut[p % pieces]] for p in range(count)}
        boxes[leaf.name] = held
    return Layout.build_from_boxes(LEAVES, boxes, tuple(p // per_slice for p in range(count)))


def boxes_in(leaf: LeafSpec) -> st.SearchStrategy[Box]:
    bounds = st.tuples(*(st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in leaf.shape))
    return bounds.map(lambda pairs: Box(tuple(a for a, _ in pairs), tuple(b for _, b in pairs)))


def groups_of(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """Counterparts in other slices, or each alone where they hold other shards."""
    per_slice = layout.process_count // layout.slice_count
    groups: list[tuple[int, ...]] = []
    for place in range(per_slice):
        group = tuple(range(place, layout.process_count, per_slice))
        alike = len({layout.process_shards[p] for p in group}) == 1
        groups += [group] if alike else [(p,) for p in group]
    return tuple(groups)


@st.composite
def worlds(draw: st.DrawFn, *, everything: bool = False) -> World:
    """Any survivors of up to three job shapes; `everything`: nothing was lost, of one job shape."""
    wanted = draw(layouts())
    if everything:
        holdings = {p: Holding(STEP, wanted.hash, p, "same") for p in range(wanted.process_count)}
        all_here = tuple(Inventory(p, (h,)) for p, h in holdings.items())
        return World(Planner(wanted, groups_of(wanted), all_here, ()))
    others = draw(st.lists(layouts(), max_size=2))
    known = {layout.hash: layout for layout in (wanted, *others)}
    shapes = st.sampled_from([wanted, wanted, *others])
    held_anywhere = draw(st.booleans())
    inventories: list[Inventory] = []
    strikes: list[Strike] = []
    for process in range(wanted.process_count):
        if not draw(st.sampled_from([True, True, True, False])):
            continue
        layout = draw(shapes)
        position = process % layout.process_count
        if held_anywhere:
            position = draw(st.integers(0, layout.process_count - 1))
        held = st.sampled_from(layout.process_shards[position])
        missing = draw(st.one_of(st.just(set[int]()), st.sets(held, max_size=2)))
        holding = Holding(STEP, layout.hash, position, "same", (), tuple(sorted(missing)))
        inventories.append(Inventory(process, (holding,)))
        if draw(st.integers(0, 5)) == 0:
            named = frozenset(layout.shards[i] for i in draw(st.sets(held, min_size=1, max_size=2)))
            strikes.append(Strike(STEP, process, draw(st.sampled_from([named, None])), "damaged"))
    persistent = draw(st.sampled_from([(), (), (STEP,)]))
    if persistent and draw(st.booleans()) and wanted.shards:
        named = draw(st.frozensets(st.sampled_from(tuple(wanted.shards)), min_size=1, max_size=2))
        strikes.append(Strike(STEP, None, draw(st.sampled_from([named, named, None])), "unreadable"))
    count = wanted.process_count
    served = draw(st.one_of(st.none(), st.none(), st.frozensets(st.integers(0, count - 1))))
    planner = Planner(
        wanted,
        groups_of(wanted),
        tuple(inventories),
        persistent,
        single_replica=draw(st.sampled_from([False, False, True])),
        others={h: OtherLayout(layout) for h, layout in known.items() if h != wanted.hash},
        served=served,
    )
    return World(planner, tuple(strikes))
