"""Spreading: each shard lies in exactly as many slices as asked for, evenly, and nothing but too many losses
loses one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.copies import survivable
from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.placement import failure_domains
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.replicas import comparisons_of
from emergency_ckpt.core.shards import Box
from emergency_ckpt.core.spread import spread
from emergency_ckpt.core.storage import both, either, storage_layout
from emergency_ckpt.core.upload_assignment import assign_uploads
from tests.core.planning_world import STEP, World, groups_of, layouts


def replicated(slices: int, hosts: int, sizes: dict[str, int], whole: dict[str, int]) -> Layout:
    """Each slice has all: leaves of `sizes` (bytes per host) over its hosts, those of `whole` on each."""
    processes = range(slices * hosts)
    # Leaves that are cut alike share one mapping.
    sharded = {
        n: {p: [Box((p % hosts * n,), (p % hosts * n + n,))] for p in processes} for n in set(sizes.values())
    }
    on_each = {n: {p: [Box((0,), (n,))] for p in processes} for n in set(whole.values())}
    boxes = {name: sharded[n] for name, n in sizes.items()} | {name: on_each[n] for name, n in whole.items()}
    leaves = [LeafSpec(name, (size * hosts,), "int8") for name, size in sizes.items()]
    leaves += [LeafSpec(name, (size,), "int8") for name, size in whole.items()]
    return Layout.build_from_boxes(leaves, boxes, tuple(p // hosts for p in range(slices * hosts)))


@st.composite
def replicated_layouts(draw: st.DrawFn) -> Layout:
    some = st.integers(1, 40)
    sizes = draw(st.lists(some, max_size=12))
    whole = draw(st.lists(some, max_size=4))
    return replicated(
        draw(st.integers(1, 7)),
        draw(st.integers(1, 4)),
        {f"w{i:02}": n for i, n in enumerate(sizes)},
        {f"x{i:02}": n for i, n in enumerate(whole)},
    )


def slices_of(layout: Layout, shard: int) -> set[int]:
    return {layout.process_slice[p] for p in layout.shard_holders[shard]}


def stored_bytes(layout: Layout, process: int) -> int:
    return int(layout.shard_sizes[layout.held.of_process(process)].sum())


@given(layouts(), st.integers(0, 4))
def test_each_shard_lies_in_as_many_slices_as_asked_for_where_so_many_hold_it(
    layout: Layout, copies: int
) -> None:
    stored, wanted = spread(layout, copies), max(1, copies)
    assert stored.shards == layout.shards
    for shard, natural in enumerate(layout.shard_holders):
        slices, holders = slices_of(layout, shard), stored.shard_holders[shard]
        assert len(slices_of(stored, shard)) == min(wanted, len(slices))
        # In the slices that keep it, every host that has it keeps it: no host asks another one of its slice.
        assert list(holders) == [p for p in natural if layout.process_slice[p] in slices_of(stored, shard)]


@given(replicated_layouts(), st.integers(1, 8))
def test_hosts_with_the_same_shards_keep_as_much_as_each_other_but_for_one_shard(
    layout: Layout, copies: int
) -> None:
    stored = spread(layout, copies)
    if copies >= layout.slice_count:
        assert stored is layout, "nothing is spread"
        return
    slices, largest = layout.slice_count, int(layout.shard_sizes.max(initial=0))
    hosts = layout.process_count // slices
    alike = slices % copies == 0 or slices < 2 * copies
    for host in range(hosts):
        kept = [stored_bytes(stored, s * hosts + host) for s in range(slices)]
        assert max(kept) - min(kept) <= largest * (1 if alike else 4)
        assert sum(kept) == stored_bytes(layout, host) * copies
    if alike and all(len(holders) == slices for holders in layout.shard_holders):
        each = [sum(stored_bytes(stored, s * hosts + h) for h in range(hosts)) for s in range(slices)]
        assert max(each) - min(each) <= largest, "so do slices"


@given(replicated_layouts(), st.integers(1, 3))
def test_any_fewer_slices_than_copies_may_be_lost(layout: Layout, copies: int) -> None:
    stored = storage_layout(layout, min(copies, layout.slice_count), spreads=True)
    told = survivable(stored)
    if layout.shards:
        assert told.slices == min(copies, layout.slice_count) - 1
    for lost in itertools.combinations(range(layout.slice_count), told.slices):
        left = [p for p, s in enumerate(layout.process_slice) if s not in lost]
        assert assign_uploads(stored, left).shards is not None, "every shard has a live holder"


@pytest.mark.parametrize(("slices", "copies"), [(4, 2), (6, 3), (9, 3)])
def test_slices_in_groups_lose_less_than_others_would(slices: int, copies: int) -> None:
    """Simultaneous failures of as many slices as there are copies, all of them tried."""
    stored = spread(replicated(slices, 2, {f"w{i:02}": 7 for i in range(40)}, {"x": 3}), copies)
    lost = sum(
        any(slices_of(stored, shard) <= set(failed) for shard in range(len(stored.shards)))
        for failed in itertools.combinations(range(slices), copies)
    )
    assert lost == slices // copies, "only where a whole group fails"
    # And partners have equal slots, whose copies can be told apart.
    assert len(set(stored.process_shards)) == slices // copies * 2


@given(layouts(), st.integers(1, 3))
def test_copies_and_spreading_together_leave_each_shard_in_just_so_many_domains(
    layout: Layout, copies: int
) -> None:
    domains = failure_domains(layout.process_slice)
    copies = min(copies, len(set(domains)))
    stored = storage_layout(layout, copies, spreads=True)
    for shard, holders in enumerate(stored.shard_holders):
        natural = {domains[p] for p in layout.shard_holders[shard]}
        found = len({domains[p] for p in holders})
        assert found == copies or (layout.slice_count <= copies and found == max(copies, len(natural)))
    needed, own = either(stored, layout), both(layout, stored)
    for p in range(layout.process_count):
        here, there = set(layout.process_shards[p]), set(stored.process_shards[p])
        assert (set(needed.process_shards[p]), set(own.process_shards[p])) == (here | there, here & there)


@given(layouts(), st.integers(1, 3), st.data())
def test_every_process_gets_what_it_needs_after_any_loss_that_is_survived(
    layout: Layout, copies: int, data: st.DataObject
) -> None:
    copies = min(copies, len(set(failure_domains(layout.process_slice))))
    stored = storage_layout(layout, copies, spreads=True)
    slices = survivable(stored).slices
    lost = data.draw(st.sets(st.integers(0, layout.slice_count - 1), max_size=max(0, slices)))
    needed = either(stored, layout)
    inventories = tuple(
        Inventory(p, (Holding(STEP, stored.hash, p, "same"),))
        for p in range(layout.process_count)
        if layout.process_slice[p] not in lost
    )
    single = data.draw(st.booleans())
    planner = Planner(
        needed,
        groups_of(needed),
        inventories,
        (),
        single_replica=single,
        stored=None if needed is stored else stored,
    )
    if not inventories:
        return
    plan, reason = planner.plan()
    if not layout.shards:
        return
    assert plan is not None, reason
    World(planner).check(plan)


def test_what_cannot_be_had_is_said_to_have_been_in_one_slice() -> None:
    layout = replicated(2, 2, {"w": 8, "v": 8}, {"x": 3})
    stored = spread(layout, 1)
    left = tuple(Inventory(p, (Holding(STEP, stored.hash, p, "same"),)) for p in (0, 1))
    plan, reason = Planner(layout, groups_of(layout), left, (), stored=stored).plan()
    assert plan is None
    assert "have no survivor" in reason
    assert "with local_checkpoint_spread each was in 1 slice; the persistent tier lacks it" in reason
    plan, reason = Planner(layout, groups_of(layout), left, (STEP,), stored=stored).plan()
    assert plan is not None
    assert "4 of 4 processes" not in reason
    assert "from the persistent tier" in reason


def test_a_plan_where_nothing_was_lost_says_what_lies_where() -> None:
    layout = replicated(2, 2, {"w": 8, "v": 8}, {"x": 3})
    stored = spread(layout, 1)
    every = tuple(Inventory(p, (Holding(STEP, stored.hash, p, "same"),)) for p in range(4))
    _, reason = Planner(layout, groups_of(layout), every, (), stored=stored).plan()
    assert reason == (
        "step 70: 4 of 4 processes have 6 shards on their own ramdisk, slices 0, 1 get 6 shards from each other"
    )


def test_thousands_of_processes_are_spread_alike_and_evenly() -> None:
    layout = replicated(
        2, 1024, {f"w{i:04}": 64 + i % 3 for i in range(300)}, {f"x{i:03}": 16 for i in range(100)}
    )
    stored = spread(layout, 1)
    kept = [stored_bytes(stored, p) for p in range(layout.process_count)]
    assert max(kept) - min(kept) <= 66
    assert sum(kept) == sum(stored_bytes(layout, p) for p in range(1024))
    assert len(stored.to_bytes()) < 4 * len(layout.to_bytes()), "and its file is small"


@pytest.mark.parametrize(
    ("slices", "copies", "partners"), [(4, 2, [(0, 2)]), (2, 1, []), (3, 2, [(0, 2), (0, 4)]), (2, 2, [(0, 2)])]
)
def test_what_several_slices_keep_is_compared(
    slices: int, copies: int, partners: list[tuple[int, ...]]
) -> None:
    layout = replicated(slices, 2, {f"w{i:02}": 7 for i in range(12)}, {})
    stored = spread(layout, copies)
    found = comparisons_of(both(layout, stored), 0)
    assert sorted(each.processes for each in found) == partners
    assert len({s for each in found for s in each.shards}) == (12 * copies // slices if partners else 0)
