"""Every set of survivors that covers the state yields a plan, and every other one says why not."""

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
from emergency_ckpt.core.restore_plan import Planner, RestorePlan, SourceKind, Strike
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.errors import CorruptDataError


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


missing = st.sets(st.integers(0, 99)).map(lambda shards: tuple(sorted(shards)))
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
    for process, source in enumerate(plan.sources):
        holders = held.get(plan.step, set())
        if source.kind is SourceKind.OWN_SLOT:
            assert process in holders
        elif source.kind is SourceKind.PERSISTENT:
            assert plan.step in persistent
        else:
            assert source.process is not None
            assert source.process % per_slice == process % per_slice
            sender = plan.sources[source.process]
            assert sender.kind in (SourceKind.OWN_SLOT, SourceKind.PERSISTENT)
    assert RestorePlan.from_json(plan.to_json()) == plan


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
        used = [
            Strike(plan.step, p if source.kind is SourceKind.OWN_SLOT else None)
            for p, source in enumerate(plan.sources)
            if source.kind is not SourceKind.BROADCAST
        ]
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
    assert [s.kind for s in plan.sources] == [
        SourceKind.OWN_SLOT,
        SourceKind.BROADCAST,
        SourceKind.BROADCAST,
        SourceKind.OWN_SLOT,
    ]
    assert "2 of 4 processes have it on their own ramdisk" in reason


def test_the_reason_names_the_lost_shards_and_the_newer_step() -> None:
    planner = make_planner(2, 2, {StepId(1, 120): {0, 2}}, persistent=(StepId(1, 100),))
    plan, reason = planner.plan()
    assert plan is not None
    assert plan.step == StepId(1, 100)
    assert "step 120: the shards of processes 1, 3 have no survivor" in reason
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
    assert [s.kind for s in plan.sources] == [
        SourceKind.OWN_SLOT,
        SourceKind.BROADCAST,
        SourceKind.OWN_SLOT,
    ]
    assert "replicas differ: process 1" in reason


def test_a_tie_between_replicas_goes_to_the_lowest_slice() -> None:
    planner = make_planner(2, 1, {StepId(1, 5): {0, 1}})
    odd = dataclasses.replace(planner.inventories[0].holdings[0], digest="different")
    inventories = (dataclasses.replace(planner.inventories[0], holdings=(odd,)), planner.inventories[1])
    plan, _ = dataclasses.replace(planner, inventories=inventories).plan()
    assert plan is not None
    assert [s.kind for s in plan.sources] == [SourceKind.OWN_SLOT, SourceKind.BROADCAST]


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
        assert Inventory.from_bytes(inventory.to_bytes()) == inventory


@given(st.lists(st.builds(Holding, steps, st.text(), st.integers(0), st.text(), missing=missing), max_size=3))
def test_an_inventory_names_the_shards_that_are_missing(holdings: list[Holding]) -> None:
    inventory = Inventory(1, tuple(holdings))
    assert Inventory.from_bytes(inventory.to_bytes()) == inventory
    raw = json.loads(inventory.to_bytes())
    for holding in raw["holdings"]:
        del holding[6:]  # As an earlier version says it.
    read = Inventory.from_bytes(json.dumps(raw).encode())
    assert read.holdings == tuple(dataclasses.replace(holding, missing=()) for holding in holdings)
    for holding in raw["holdings"]:
        holding += [[], []]
    if holdings:
        with pytest.raises(CorruptDataError):
            Inventory.from_bytes(json.dumps(raw).encode())


@pytest.mark.parametrize("damaged", [{3}, {1, 3}])
def test_a_copy_that_lacks_shards_is_passed_over_as_damaged(damaged: set[int]) -> None:
    planner = make_planner(2, 2, {StepId(1, 4): set(range(4)), StepId(1, 3): set(range(4))})
    inventories = tuple(
        dataclasses.replace(
            inventory,
            holdings=tuple(
                dataclasses.replace(h, missing=(h.position % 2,)) if h.step.step == 4 else h
                for h in inventory.holdings
            ),
        )
        if inventory.process in damaged
        else inventory
        for inventory in planner.inventories
    )
    planner = dataclasses.replace(planner, inventories=inventories)
    plan, reason = planner.plan()
    assert plan is not None
    assert planner.unusable() is None
    if damaged == {3}:
        assert plan.step.step == 4
        assert [source.process for source in plan.sources] == [None, None, None, 1]
        assert "the copy of process 3 is damaged" in reason
    else:
        assert plan.step.step == 3
        assert "step 4: the shards of processes 1, 3 have no survivor" in reason
        assert "the copies of processes 1, 3 are damaged" in reason


def test_lost_extras_are_taken_from_the_persistent_tier_together_with_the_arrays() -> None:
    planner = with_extras(make_planner(3, 2, {StepId(1, 5): {0}}, persistent=(StepId(1, 5),)), {0: (0, 4)})
    plan, reason = planner.plan()
    assert plan is not None
    assert {source.kind for source in plan.sources} == {SourceKind.PERSISTENT}
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
    assert {source.kind for source in plan.sources} == {SourceKind.OWN_SLOT}


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
    fits = {p for p, b in enumerate(held_by) if b >= 0 and b % per_slice == p % per_slice}
    plan, reason = planner.plan()
    assert (plan is not None) == ({p % per_slice for p in fits} == set(range(per_slice)))
    if plan is not None:
        assert {p for p, s in enumerate(plan.sources) if s.kind is SourceKind.OWN_SLOT} == fits
    elif {b % per_slice for b in held_by if b >= 0} == set(range(per_slice)):
        assert planner.unusable() is not None
    else:
        assert planner.unusable() is None
        assert reason


def test_extras_of_a_job_of_another_size_belong_to_nobody() -> None:
    saved = with_extras(make_planner(2, 1, {StepId(1, 7): {0, 1}}), {0: (0, 1), 1: (1, 0)})
    wanted = make_planner(1, 1, {})
    plan, _ = seen_from(saved, wanted.layout, wanted.groups, [1]).plan()
    assert plan is not None
    assert plan.extras_from == (None,)


def test_hosts_that_changed_places_within_a_slice_take_the_step_from_another_slice() -> None:
    saved = make_planner(2, 2, {StepId(1, 7): {0, 1, 2, 3}})
    plan, reason = seen_from(saved, saved.layout, saved.groups, [1, 0, 2, 3]).plan()
    assert plan is not None
    assert [s.kind for s in plan.sources] == [SourceKind.BROADCAST] * 2 + [SourceKind.OWN_SLOT] * 2
    assert "processes 0, 1 cannot be used: the shards in them are those of other processes now" in reason


def test_a_step_that_is_whole_but_on_the_wrong_hosts_is_unusable_and_not_nothing() -> None:
    saved = make_planner(1, 2, {StepId(1, 7): {0, 1}, StepId(1, 5): {0, 1}})
    planner = seen_from(saved, saved.layout, saved.groups, [1, 0])
    found = planner.unusable()
    assert found is not None
    assert found.step == StepId(1, 7)
    assert found.describe() == (
        "a job of 2 processes in 1 slice saved it, and the hosts that hold its shards now need others"
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
