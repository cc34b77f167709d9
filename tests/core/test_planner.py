"""Survivors that cover the state yield a plan of shards that are there, evenly given; all others yield none."""

from __future__ import annotations

import collections
import dataclasses
import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.other_layouts import OtherLayout
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.restore_plan import PlanOfOne, ProcessPlan, Strike
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.core.sources import MOST_GIVERS, UNIT_BYTES
from tests.core.planning_world import STEP, World, groups_of, worlds


@settings(max_examples=200)
@given(worlds())
def test_survivors_that_cover_the_state_make_a_plan_and_others_name_what_is_lost(world: World) -> None:
    plan, reason = world.planner.plan(strikes=world.strikes)
    lost = world.lost()
    if plan is None or not world.planner.single_replica:  # Those that receive need not reach anybody.
        assert (plan is None) == bool(lost), reason
    assert world.planner.restorable(world.strikes) == ([STEP] if plan else [])
    assert len(reason) < 1500
    if plan is not None:
        world.check(plan)
    elif any(world.holdings(p) for p in range(world.layout.process_count)):
        named = re.findall(r"(\w+)\[([\d:, ]*)\]", reason)
        assert not named or any(f"{leaf}[{box}]" in map(str, lost) for leaf, box in named)
        assert named or "no usable copy" in reason or "damaged" in reason or "unusable" in reason


@given(worlds(), st.randoms(use_true_random=False))
def test_the_order_in_which_things_are_known_does_not_matter(world: World, random: object) -> None:
    planner, strikes = world.planner, list(world.strikes)
    inventories, groups = list(planner.inventories), planner.groups
    others = list(planner.others.items())
    for each in (inventories, strikes, others):
        random.shuffle(each)  # type: ignore[attr-defined]
    shuffled = dataclasses.replace(planner, inventories=tuple(inventories), others=dict(others), groups=groups)
    assert shuffled.plan(strikes=strikes) == planner.plan(strikes=world.strikes)


@given(worlds(everything=True))
def test_nothing_moves_where_nothing_was_lost(world: World) -> None:
    plan, reason = world.planner.plan()
    assert plan is not None
    assert set(plan.processes) == {ProcessPlan(in_place=True)}
    count = world.layout.process_count
    assert reason == f"step 70: {count} of {count} processes have it on their own ramdisk"


@given(worlds())
def test_each_process_reads_its_own_part_of_the_plan(world: World) -> None:
    plan, _ = world.planner.plan(strikes=world.strikes)
    if plan is None:
        return
    common = json.loads(json.dumps(plan.common_json()))
    for process in range(world.layout.process_count):
        own = json.loads(json.dumps(plan.process_json(process)))
        assert PlanOfOne.from_json(process, common, own) == plan.of(process)


# Slices of natural replicas.

MIB = 1024 * 1024


def replicas(slices: int, per_slice: int, sizes: list[int]) -> Layout:
    """Every slice has every leaf, each host a shard of it of the size given for the leaf, in bytes."""
    leaves = [LeafSpec(f"w{i:03}", (per_slice, size), "int8") for i, size in enumerate(sizes)]
    boxes = {
        leaf.name: {
            s * per_slice + i: [Box((i, 0), (i + 1, leaf.shape[1]))]
            for s in range(slices)
            for i in range(per_slice)
        }
        for leaf in leaves
    }
    return Layout.build_from_boxes(leaves, boxes, tuple(s for s in range(slices) for _ in range(per_slice)))


def world_of(layout: Layout, held: set[int], **options: object) -> World:
    inventories = tuple(
        Inventory(p, (Holding(STEP, layout.hash, p, f"{layout.held.kinds[p]}"),)) for p in sorted(held)
    )
    return World(Planner(layout, groups_of(layout), inventories, (), **options))  # type: ignore[arg-type]


def given_bytes(world: World, plans: tuple[ProcessPlan, ...]) -> collections.Counter[int]:
    """Bytes that each process gives to others."""
    found: collections.Counter[int] = collections.Counter()
    nbytes = {shard: world.layout.shard_nbytes[i] for i, shard in enumerate(world.layout.shards)}
    for process, plan in enumerate(plans):
        for giver, shard in world.taken(process, plan):
            found[giver] += nbytes[shard] if giver != process else 0
    return found


sizes = st.lists(st.integers(UNIT_BYTES, 20 * UNIT_BYTES), min_size=1, max_size=30)


@given(st.integers(2, 5), st.integers(1, 3), sizes, st.data())
def test_replicas_give_alike_but_for_one_shard(
    slices: int, per_slice: int, sizes: list[int], data: st.DataObject
) -> None:
    layout = replicas(slices, per_slice, sizes)
    held = data.draw(st.sets(st.integers(0, layout.process_count - 1)))
    world = world_of(layout, held)
    plan, _ = world.planner.plan()
    if plan is None:
        assert {p % per_slice for p in held} != set(range(per_slice))
        return
    world.check(plan)
    loads = given_bytes(world, plan.processes)
    for place in range(per_slice):
        alike = [loads[p] for p in held if p % per_slice == place]
        assert max(alike) - min(alike) <= max(sizes) + len(alike)


@given(st.integers(2, 5), sizes, st.data())
def test_a_process_takes_one_run_from_each_and_a_shard_at_the_borders(
    slices: int, sizes: list[int], data: st.DataObject
) -> None:
    layout = replicas(slices, 1, sizes)
    world = world_of(layout, data.draw(st.sets(st.integers(0, slices - 1), min_size=1)))
    plan, _ = world.planner.plan()
    assert plan is not None
    for process, own in enumerate(plan.processes):
        givers = [take.process for take in own.takes]
        assert len(givers) == len(set(givers)) <= slices - 1
        assert process not in givers
        runs = sum(
            1 + sum(b - a > 1 for a, b in zip(take.shards, take.shards[1:], strict=False)) for take in own.takes
        )
        assert runs <= 2 * len(givers)


def test_small_shards_are_taken_from_one_holder() -> None:
    layout = replicas(4, 1, [100] * 200)
    plan, _ = world_of(layout, {1, 2, 3}).planner.plan()
    assert plan is not None
    assert [len(take.shards) for take in plan.processes[0].takes] == [200]


def test_a_replaced_host_pulls_from_all_that_have_its_shards() -> None:
    layout = replicas(8, 2, [MIB] * 70)
    plan, reason = world_of(layout, set(range(1, 16))).planner.plan()
    assert plan is not None
    assert [(take.process, len(take.shards)) for take in plan.processes[0].takes] == [
        (p, 10) for p in range(2, 16, 2)
    ]
    assert reason == (
        "step 70: 15 of 16 processes have it on their own ramdisk, process 0 gets 70 shards from processes "
        "2, 4, 6, 8, 10, 12, 14"
    )


@given(st.integers(40, 90), sizes, st.data())
def test_of_very_many_holders_some_are_asked_and_all_in_turn(
    slices: int, sizes: list[int], data: st.DataObject
) -> None:
    world = world_of(replicas(slices, 1, sizes), set(range(36)))
    plan, _ = world.planner.plan()
    assert plan is not None
    loads = given_bytes(world, plan.processes)
    largest = 0
    for process in range(36, slices):
        takes = plan.processes[process].takes
        assert len(takes) <= MOST_GIVERS
        parts = [sum(sizes[i] for i in take.shards) for take in takes]
        assert sum(parts) == sum(sizes)
        largest = max(largest, *parts)
    assert max(loads[p] for p in range(36)) - min(loads[p] for p in range(36)) <= largest + max(sizes)


@given(st.integers(1, 4), sizes)
def test_of_a_lost_slice_exactly_its_bytes_are_moved(per_slice: int, sizes: list[int]) -> None:
    world = world_of(replicas(2, per_slice, sizes), set(range(per_slice)))
    plan, _ = world.planner.plan()
    assert plan is not None
    assert sum(given_bytes(world, plan.processes).values()) == per_slice * sum(sizes)


def test_shards_that_all_have_come_from_the_own_slice_first() -> None:
    """Leaf w is sharded within the slice, leaf n is everywhere and small."""
    boxes = {
        "w": {p: [Box((p % 2 * MIB,), (p % 2 * MIB + MIB,))] for p in range(4)},
        "n": {p: [Box((0,), (8,))] for p in range(4)},
        "r": {p: [Box((0,), (MIB,))] for p in range(4)},
    }
    leaves = [LeafSpec("w", (2 * MIB,), "int8"), LeafSpec("n", (8,), "int8"), LeafSpec("r", (MIB,), "int8")]
    layout = Layout.build_from_boxes(leaves, boxes, (0, 0, 1, 1))
    world = world_of(layout, {1, 2, 3})
    plan, _ = world.planner.plan()
    assert plan is not None
    taken = world.taken(0, plan.processes[0])
    assert {shard.leaf: giver for giver, shard in taken} == {"w": 2, "n": 1, "r": 1}


# Replicas that differ.


def with_digests(world: World, digests: dict[int, str]) -> World:
    inventories = tuple(
        dataclasses.replace(
            i,
            holdings=tuple(dataclasses.replace(h, digest=digests.get(i.process, h.digest)) for h in i.holdings),
        )
        for i in world.planner.inventories
    )
    return World(dataclasses.replace(world.planner, inventories=inventories), world.strikes)


@given(st.integers(2, 6), st.data())
def test_all_take_the_bytes_of_the_majority_else_of_the_lowest_slice(slices: int, data: st.DataObject) -> None:
    world = world_of(replicas(slices, 1, [MIB] * 3), set(range(slices)))
    digests = {p: data.draw(st.sampled_from("xyz")) for p in range(slices)}
    counts = collections.Counter(digests.values())
    leading = {digest for digest, count in counts.items() if count == max(counts.values())}
    winner = next(digests[p] for p in range(slices) if digests[p] in leading)
    plan, reason = with_digests(world, digests).planner.plan()
    assert plan is not None
    for process, own in enumerate(plan.processes):
        assert own.in_place == (digests[process] == winner)
        assert all(digests[take.process] == winner for take in own.takes)
    assert ("replicas differ" in reason) == (len(counts) > 1)


def test_what_is_missing_in_a_replica_does_not_take_its_voice() -> None:
    layout = replicas(3, 1, [MIB] * 2)
    world = with_digests(world_of(layout, {0, 1, 2}), {0: "odd"})
    first = dataclasses.replace(world.planner.inventories[1].holdings[0], missing=(0,))
    inventories = list(world.planner.inventories)
    inventories[1] = Inventory(1, (first,))
    plan, _ = dataclasses.replace(world.planner, inventories=tuple(inventories)).plan()
    assert plan is not None
    assert [own.in_place for own in plan.processes] == [False, True, True]
    assert [take.process for take in plan.processes[1].takes] == [2]


# Broadcast.


@given(st.integers(2, 4), st.integers(1, 3), st.booleans(), st.data())
def test_one_slice_gets_everything_and_sends_it_where_that_is_wanted(
    slices: int, per_slice: int, persistent: bool, data: st.DataObject
) -> None:
    layout = replicas(slices, per_slice, [MIB] * 2)
    held = data.draw(st.sets(st.integers(0, layout.process_count - 1)))
    world = world_of(layout, held, single_replica=True)
    if persistent:
        world = World(dataclasses.replace(world.planner, persistent=(STEP,)))
    plan, _ = world.planner.plan()
    if plan is None:
        assert world.lost()
        return
    world.check(plan)
    counts = [sum(p // per_slice == s for p in held) for s in range(slices)]
    first = counts.index(max(counts))
    for process, own in enumerate(plan.processes):
        if process in held:
            assert own == ProcessPlan(in_place=True)
        elif process // per_slice == first:
            assert own.sender is None
        else:
            assert own.sender == first * per_slice + process % per_slice


def test_where_nobody_can_be_asked_the_whole_slot_of_a_counterpart_is_sent() -> None:
    layout = replicas(2, 2, [MIB] * 2)
    world = world_of(layout, {0, 3}, served=frozenset({3}))
    plan, reason = world.planner.plan()
    assert plan is not None
    world.check(plan)
    assert [own.sender for own in plan.processes] == [None, None, 0, None]
    assert [take.process for take in plan.processes[1].takes] == [3]
    assert "process 2 gets it by broadcast from process 0" in reason
    assert plan.sends_broadcast(0)
    assert not plan.sends_broadcast(3)


def test_what_only_silent_processes_have_is_said_to_survive() -> None:
    layout = replicas(2, 1, [MIB] * 2)
    world = world_of(layout, {0}, served=frozenset())
    lone = dataclasses.replace(world.planner, groups=((0,), (1,)))
    plan, reason = lone.plan()
    assert plan is None
    assert reason == (
        "step 70: the shards of process 1 survive only where nobody can fetch them (2 shards, "
        "w000[0:1, 0:1048576] the first); the persistent tier lacks it"
    )
    found = lone.unusable()
    assert found is not None
    assert "cannot fetch them" in found.describe()


# Other cuts.


def test_a_job_of_half_the_hosts_takes_two_shards_for_each_of_its_own() -> None:
    def cut(processes: int) -> Layout:
        rows = 8 // processes
        boxes = {p: [Box((p * rows,), (p * rows + rows,))] for p in range(processes)}
        return Layout.build_from_boxes([LeafSpec("w", (8,), "int8")], {"w": boxes}, (0,) * processes)

    saved, wanted = cut(4), cut(2)
    inventories = (
        Inventory(0, (Holding(STEP, saved.hash, 0, "a"),)),
        Inventory(1, (Holding(STEP, saved.hash, 3, "d"),)),
    )
    planner = Planner(wanted, ((0,), (1,)), inventories, (), others={saved.hash: OtherLayout(saved)})
    plan, reason = planner.plan()
    assert plan is None
    assert "the shards of processes 0, 1 have no survivor (2 shards, w[0:4] the first)" in reason
    with_tier = dataclasses.replace(planner, persistent=(STEP,))
    plan, _ = with_tier.plan()
    assert plan is not None
    assert [own.persistent for own in plan.processes] == [(0,), (1,)]
    more = tuple(
        Inventory(p, (Holding(STEP, saved.hash, q, str(q)),)) for p, q in ((0, 0), (1, 3), (0, 1), (1, 2))
    )
    plan, reason = dataclasses.replace(planner, inventories=more).plan()
    assert plan is not None
    assert [[(take.process, take.position, take.shards) for take in own.takes] for own in plan.processes] == [
        [(0, 0, (0,)), (0, 1, (1,))],
        [(1, 2, (2,)), (1, 3, (3,))],
    ]
    assert reason == "step 70: processes 0, 1 take 4 shards from slots of their own that are not kept"


def test_a_struck_shard_is_taken_from_elsewhere_and_the_rest_of_the_slot_is_kept() -> None:
    layout = replicas(2, 1, [MIB] * 3)
    world = world_of(layout, {0, 1})
    strike = Strike(STEP, 0, frozenset({layout.shards[1]}), "block 0 does not match")
    plan, reason = world.planner.plan(strikes=[strike])
    assert plan is not None
    own = plan.processes[0]
    assert own.in_place
    assert [(take.process, take.shards) for take in own.takes] == [(1, (1,))]
    assert reason == (
        "step 70: 1 of 2 processes have it on their own ramdisk, slice 0 gets 1 shard from slice 1 "
        "(1 shard in the copy of process 0 is damaged (block 0 does not match))"
    )


def test_a_shard_that_is_struck_everywhere_is_read_from_the_persistent_tier() -> None:
    layout = replicas(2, 1, [MIB] * 3)
    world = world_of(layout, {0, 1})
    strikes = [Strike(STEP, p, frozenset({layout.shards[1]})) for p in (0, 1)]
    plan, reason = world.planner.plan(strikes=strikes)
    assert plan is None
    assert "the shards of processes 0, 1 have no survivor (w001[0:1, 0:1048576])" in reason
    plan, reason = dataclasses.replace(world.planner, persistent=(STEP,)).plan(strikes=strikes)
    assert plan is not None
    assert plan.processes == (ProcessPlan(in_place=True, persistent=(1,)),) * 2
    assert plan.uses_persistent
    assert "read 2 shards from the persistent tier" in reason
    damaged = Strike(STEP, None, frozenset({Shard("w001", Box((0, 5), (1, 6)))}))
    plan, reason = dataclasses.replace(world.planner, persistent=(STEP,)).plan(strikes=[*strikes, damaged])
    assert plan is None
    assert "the persistent tier lacks some of it" in reason
