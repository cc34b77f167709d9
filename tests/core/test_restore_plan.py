"""Every set of survivors that covers the state yields a plan, and every other one says why not."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.restore_plan import Planner, RestorePlan, SourceKind, Strike
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


def test_lost_extras_are_taken_from_the_persistent_tier_together_with_the_arrays() -> None:
    planner = with_extras(make_planner(3, 2, {StepId(1, 5): {0}}, persistent=(StepId(1, 5),)), {0: (0, 4)})
    plan, reason = planner.plan()
    assert plan is not None
    assert {source.kind for source in plan.sources} == {SourceKind.PERSISTENT}
    assert "extras of processes 1, 2, 3, 5 have no survivor" in reason
