"""Which step is planned and why, what a plan says of extras and hosts that moved, and how plans are written."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.other_layouts import OtherLayout
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.restore_plan import ProcessPlan, Strike
from emergency_ckpt.core.shards import Box, Shard


def make_layout(slices: int, per_slice: int) -> Layout:
    holders = {
        s * per_slice + i: [Shard("w", Box((4 * i,), (4 * i + 4,)))]
        for s in range(slices)
        for i in range(per_slice)
    }
    process_slice = tuple(s for s in range(slices) for _ in range(per_slice))
    return Layout.build([LeafSpec("w", (4 * per_slice,), "float32")], holders, process_slice)


def make_planner(
    slices: int,
    per_slice: int,
    held: dict[StepId, set[int]],
    persistent: tuple[StepId, ...] = (),
    **options: object,
) -> Planner:
    layout = make_layout(slices, per_slice)
    inventories = tuple(
        Inventory(
            p,
            tuple(Holding(step, layout.hash, p, f"{step}{p % per_slice}") for step in held if p in held[step]),
            process_count=slices * per_slice,
        )
        for p in range(slices * per_slice)
    )
    groups = tuple(tuple(s * per_slice + i for s in range(slices)) for i in range(per_slice))
    return Planner(layout, groups, inventories, persistent, **options)  # type: ignore[arg-type]


def givers(own: ProcessPlan) -> set[int] | None:
    """Whom a process takes shards from; None where it has all itself."""
    return None if own.is_whole else {take.process for take in own.takes}


jobs = st.tuples(st.integers(1, 4), st.integers(1, 3))
steps = st.builds(StepId, st.integers(1, 2), st.integers(0, 4))


@st.composite
def planners(draw: st.DrawFn) -> tuple[Planner, dict[StepId, set[int]], set[StepId], int]:
    slices, per_slice = draw(jobs)
    held = draw(st.dictionaries(steps, st.sets(st.integers(0, slices * per_slice - 1)), max_size=4))
    persistent = draw(st.sets(steps, max_size=2))
    planner = make_planner(
        slices, per_slice, held, tuple(sorted(persistent)), single_replica=draw(st.booleans())
    )
    return planner, held, persistent, per_slice


@given(planners())
def test_the_newest_covered_step_is_planned_from_holders_only(
    case: tuple[Planner, dict[StepId, set[int]], set[StepId], int],
) -> None:
    planner, held, persistent, per_slice = case
    covered = {s for s, who in held.items() if {p % per_slice for p in who} == set(range(per_slice))}
    plan, reason = planner.plan()
    assert reason
    if plan is None:
        assert not covered | persistent
        return
    assert plan.step == max(covered | persistent)
    holders = held.get(plan.step, set())
    for process, own in enumerate(plan.processes):
        assert own.in_place == (process in holders)
        assert not own.persistent or plan.step in persistent
        assert {take.process for take in own.takes} <= holders
        assert all(take.process % per_slice == process % per_slice for take in own.takes)
        if own.sender is not None:
            assert own.sender % per_slice == process % per_slice
            assert plan.processes[own.sender].sender is None
        elif not own.in_place:
            assert own.takes or own.persistent


@given(planners(), st.data())
def test_striking_sources_walks_back_until_nothing_is_left(
    case: tuple[Planner, dict[StepId, set[int]], set[StepId], int], data: st.DataObject
) -> None:
    planner, held, persistent, _ = case
    strikes: set[Strike] = set()
    for _ in range(len(persistent) + sum(map(len, held.values())) + 1):
        plan, _ = planner.plan(strikes=strikes)
        if plan is None:
            return
        used = [Strike(plan.step, take.process) for own in plan.processes for take in own.takes]
        used += [Strike(plan.step, p) for p, own in enumerate(plan.processes) if own.in_place]
        used += [Strike(plan.step, None)] if plan.uses_persistent else []
        struck = data.draw(st.sampled_from(used))
        assert struck not in strikes, "a struck source was planned again"
        strikes.add(struck)
    raise AssertionError("planning never came to an end")


def test_a_wanted_step_is_taken_even_when_newer_ones_exist() -> None:
    planner = make_planner(2, 1, {StepId(1, 10): {0, 1}, StepId(1, 20): {0, 1}})
    plan, _ = planner.plan(wanted=10)
    assert plan is not None
    assert plan.step == StepId(1, 10)
    missing, reason = planner.plan(wanted=15)
    assert missing is None
    assert "step 15 was not found" in reason


def test_two_half_slices_make_one_step() -> None:
    plan, reason = make_planner(2, 2, {StepId(1, 120): {0, 3}}).plan()
    assert plan is not None
    assert [givers(own) for own in plan.processes] == [None, {3}, {0}, None]
    assert reason == (
        "step 120: 2 of 4 processes have it on their own ramdisk, process 1 gets 1 shard from process 3, "
        "process 2 gets 1 shard from process 0"
    )


def test_the_reason_names_the_lost_shards_and_the_newer_step() -> None:
    planner = make_planner(2, 2, {StepId(1, 120): {0, 2}}, persistent=(StepId(1, 100),))
    plan, reason = planner.plan()
    assert plan is not None
    assert plan.step == StepId(1, 100)
    assert "step 120: the shards of processes 1, 3 have no survivor (w[4:8])" in reason
    assert "all processes read the persistent tier" in reason


def test_void_steps_are_not_candidates() -> None:
    planner = make_planner(1, 1, {StepId(1, 10): {0}, StepId(1, 20): {0}}, activations=(Activation(2, 10),))
    assert planner.candidates() == [StepId(1, 10)]


def test_a_diverging_replica_takes_the_bytes_of_the_majority() -> None:
    planner = make_planner(3, 1, {StepId(1, 5): {0, 1, 2}})
    odd = dataclasses.replace(planner.inventories[1].holdings[0], digest="different")
    inventories = list(planner.inventories)
    inventories[1] = dataclasses.replace(inventories[1], holdings=(odd,))
    plan, reason = dataclasses.replace(planner, inventories=tuple(inventories)).plan()
    assert plan is not None
    assert [givers(own) for own in plan.processes] == [None, {0}, None]
    assert "replicas differ: process 1 takes the bytes of the majority" in reason


def test_a_tie_between_replicas_goes_to_the_lowest_slice() -> None:
    planner = make_planner(2, 1, {StepId(1, 5): {0, 1}})
    odd = dataclasses.replace(planner.inventories[0].holdings[0], digest="different")
    inventories = (dataclasses.replace(planner.inventories[0], holdings=(odd,)), planner.inventories[1])
    plan, _ = dataclasses.replace(planner, inventories=inventories).plan()
    assert plan is not None
    assert [givers(own) for own in plan.processes] == [None, {0}]


def with_extras(planner: Planner, kept: dict[int, tuple[int, ...]]) -> Planner:
    return dataclasses.replace(
        planner,
        inventories=tuple(
            dataclasses.replace(
                inventory,
                holdings=tuple(
                    dataclasses.replace(h, extras_of=kept.get(inventory.process, ()))
                    for h in inventory.holdings
                ),
            )
            for inventory in planner.inventories
        ),
    )


def test_extras_come_from_the_process_that_kept_them() -> None:
    planner = with_extras(make_planner(2, 1, {StepId(1, 5): {1}}), {1: (1, 0)})
    plan, _ = planner.plan()
    assert plan is not None
    assert plan.extras_from == (1, 1)


def test_a_step_whose_extras_are_lost_is_not_restored_from_ramdisks() -> None:
    planner = with_extras(make_planner(2, 1, {StepId(1, 5): {1}}), {1: (1,)})
    plan, reason = planner.plan()
    assert plan is None
    assert "extras of process 0 have no survivor" in reason


@given(planners())
def test_inventories_survive_the_wire(
    case: tuple[Planner, dict[StepId, set[int]], set[StepId], int],
) -> None:
    for inventory in case[0].inventories:
        holdings = tuple(dataclasses.replace(h, missing=(0, 7)) for h in inventory.holdings[:1])
        some = dataclasses.replace(inventory, holdings=holdings + inventory.holdings[1:])
        for each in (inventory, some):
            assert Inventory.from_bytes(each.to_bytes()) == each


def test_in_inventories_of_earlier_versions_nothing_is_missing() -> None:
    inventory = make_planner(1, 1, {StepId(1, 5): {0}}).inventories[0]
    raw = json.loads(inventory.to_bytes())
    raw["holdings"] = [holding[:6] for holding in raw["holdings"]]
    assert Inventory.from_bytes(json.dumps(raw).encode()) == inventory


def test_lost_extras_are_taken_from_the_persistent_tier_together_with_the_arrays() -> None:
    planner = with_extras(make_planner(3, 2, {StepId(1, 5): {0}}, persistent=(StepId(1, 5),)), {0: (0, 4)})
    plan, reason = planner.plan()
    assert plan is not None
    assert [own.persistent for own in plan.processes] == [(0,), (1,)] * 3
    assert "extras of processes 1, 2, 3, 5 have no survivor" in reason


def seen_from(
    planner: Planner, layout: Layout, groups: tuple[tuple[int, ...], ...], held_by: list[int]
) -> Planner:
    """The planner of a job of another shape: process p of it has the ramdisk of process `held_by[p]` before."""
    before = [planner.inventories[p] if p >= 0 else Inventory(0) for p in held_by]
    inventories = tuple(dataclasses.replace(i, process=p) for p, i in enumerate(before))
    others = {planner.layout.hash: OtherLayout(planner.layout, tuple(describe(planner.layout, layout)))}
    if layout.hash == planner.layout.hash:
        others = {}
    return Planner(layout, groups, inventories, planner.persistent, others=others)


def describe(saved: Layout, wanted: Layout) -> list[str]:
    return [
        f"{new.name}: saved {old.dtype}{list(old.shape)}, wanted {new.dtype}{list(new.shape)}"
        for old, new in zip(saved.leaves, wanted.leaves, strict=True)
        if old != new
    ]


@given(jobs, st.data())
def test_hosts_that_kept_their_place_in_the_mesh_restore_alone_under_any_numbering(
    shape: tuple[int, int], data: st.DataObject
) -> None:
    """Places of the mesh stay with the hosts, and the processes there get other numbers."""
    slices, per_slice = shape
    count = slices * per_slice
    saved = make_planner(slices, per_slice, {StepId(1, 7): set(range(count))})
    before = data.draw(st.permutations(range(count)))  # of process p, its number in the life before
    renumbered = Layout(
        saved.layout.leaves,
        saved.layout.shards,
        tuple(saved.layout.process_shards[b] for b in before),
        tuple(saved.layout.process_slice[b] for b in before),
    )
    groups = tuple(tuple(before.index(p) for p in group) for group in saved.groups)
    plan, _ = seen_from(saved, renumbered, groups, list(before)).plan()
    assert plan is not None
    assert all(own.is_whole for own in plan.processes)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.data())
def test_slices_may_come_and_go(per_slice: int, before: int, after: int, data: st.DataObject) -> None:
    """A job with more or fewer slices of the same size uses the ramdisks of the one before it."""
    saved = make_planner(before, per_slice, {StepId(1, 7): set(range(before * per_slice))})
    wanted = make_planner(after, per_slice, {})
    held_by = data.draw(
        st.lists(
            st.sampled_from([-1, *range(before * per_slice)]),
            min_size=after * per_slice,
            max_size=after * per_slice,
        )
    )
    planner = seen_from(saved, wanted.layout, wanted.groups, held_by)
    plan, reason = planner.plan()
    assert (plan is not None) == ({b % per_slice for b in held_by if b >= 0} == set(range(per_slice)))
    assert planner.unusable() is None
    if plan is not None:
        fits = {p for p, b in enumerate(held_by) if b >= 0 and b % per_slice == p % per_slice}
        assert {p for p, own in enumerate(plan.processes) if own.is_whole} == fits
    else:
        assert "have no survivor" in reason or set(held_by) == {-1}


def test_extras_of_a_job_of_another_size_belong_to_nobody() -> None:
    saved = with_extras(make_planner(2, 1, {StepId(1, 7): {0, 1}}), {0: (0, 1), 1: (1, 0)})
    wanted = make_planner(1, 1, {})
    plan, _ = seen_from(saved, wanted.layout, wanted.groups, [1]).plan()
    assert plan is not None
    assert plan.extras_from == (None,)
    assert plan.extras_kept == (0, 0)  # What may be made of them is for those who restore.


def test_extras_of_a_job_of_another_size_are_told_with_those_that_nobody_has() -> None:
    saved = with_extras(make_planner(4, 1, {StepId(1, 7): {0, 1}}), {0: (0, 3), 1: (1, 0)})
    wanted = make_planner(3, 1, {})
    plan, _ = seen_from(saved, wanted.layout, wanted.groups, [0, 1, 2]).plan()
    assert plan is not None
    assert plan.extras_from == (None,) * 3
    assert plan.extras_kept == (0, 1, None, 0)


@pytest.mark.parametrize(
    ("made", "extras_from", "extras_kept"),
    [((0, 1), (2, 2), ()), ((1,), (None, None), (0, 0, 0))],
    ids=["all were made", "some are lost"],
)
def test_extras_that_were_made_for_this_size_come_first_if_all_are_there(
    made: tuple[int, ...], extras_from: tuple[int | None, ...], extras_kept: tuple[int | None, ...]
) -> None:
    """Process 0 still has a slot of three; process 1 of a job of two has filled one anew."""
    step = StepId(1, 7)
    before = with_extras(make_planner(3, 1, {step: {0}}), {0: (0, 1, 2)})
    after = with_extras(make_planner(2, 1, {step: {1}}), {1: made})
    holdings = {0: before.inventories[0].holdings, 1: after.inventories[1].holdings}
    others = {before.layout.hash: OtherLayout(before.layout)}
    inventories = tuple(dataclasses.replace(i, holdings=holdings[i.process]) for i in after.inventories)
    plan, _ = dataclasses.replace(after, inventories=inventories, others=others).plan()
    assert plan is not None
    assert plan.extras_from == tuple(None if p is None else 1 for p in extras_from)
    assert plan.extras_kept == extras_kept


def test_hosts_that_changed_places_within_a_slice_give_each_other_their_shards() -> None:
    saved = make_planner(2, 2, {StepId(1, 7): {0, 1, 2, 3}})
    plan, reason = seen_from(saved, saved.layout, saved.groups, [1, 0, 2, 3]).plan()
    assert plan is not None
    assert [givers(own) for own in plan.processes] == [{1}, {0}, None, None]
    assert [take.position for own in plan.processes for take in own.takes] == [0, 1]
    alone = seen_from(make_planner(1, 2, {StepId(1, 7): {0, 1}}), make_layout(1, 2), ((0,), (1,)), [1, 0])
    plan, _ = alone.plan()
    assert plan is not None
    assert [givers(own) for own in plan.processes] == [{1}, {0}]
    assert reason.startswith("step 7: 2 of 4 processes have it on their own ramdisk")


def test_a_step_that_is_whole_but_out_of_reach_is_unusable_and_not_nothing() -> None:
    saved = make_planner(1, 2, {StepId(1, 7): {0, 1}, StepId(1, 5): {0, 1}})
    planner = dataclasses.replace(seen_from(saved, saved.layout, saved.groups, [1, 0]), served=frozenset[int]())
    found = planner.unusable()
    assert found is not None
    assert found.step == StepId(1, 7)
    assert found.describe() == (
        "a job of 2 processes in 1 slice saved it, and the processes that need its shards cannot fetch them "
        "from the others"
    )
    assert dataclasses.replace(planner, persistent=(StepId(1, 7),)).unusable() is None


def changed_leaves(count: int) -> Layout:
    """The layout of `make_layout(1, 1)` with other leaves."""
    names = [f"w{i}" for i in range(count)]
    return Layout.build(
        [LeafSpec(name, (4,), "int32") for name in names],
        {0: [Shard(name, Box((0,), (4,))) for name in names]},
        (0,),
    )


def test_what_differs_in_a_changed_state_is_said_once_for_all_steps_and_briefly() -> None:
    saved = make_planner(1, 1, {StepId(1, n): {0} for n in (5, 6, 7)})
    lines = tuple(f"w{i}: saved nothing, wanted int32[4]" for i in range(20))
    planner = dataclasses.replace(
        saved, layout=changed_leaves(20), others={saved.layout.hash: OtherLayout(saved.layout, lines)}
    )
    plan, reason = planner.plan()
    assert plan is None
    assert reason.count("cannot be used: another state was saved") == 3
    assert reason.count("20 leaves differ: w0: saved nothing, wanted int32[4]") == 1
    assert "w7: " in reason
    assert "w8: " not in reason
    assert reason.endswith("and 12 more")
    found = planner.unusable()
    assert found is not None
    assert all(line in found.describe() for line in lines)


def test_a_layout_that_nobody_could_send_is_no_source() -> None:
    saved = make_planner(2, 1, {StepId(1, 7): {0, 1}})
    plan, reason = dataclasses.replace(saved, layout=make_layout(1, 1), groups=((0,),)).plan()
    assert plan is None
    assert "their layout is unknown" in reason
