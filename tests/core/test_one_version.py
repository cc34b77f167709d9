"""Replicas differ and sources fail, one after the other: a restored shard is one version everywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.parts import part_digests
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.replica_votes import SlotOf, slot_fingerprints
from emergency_ckpt.core.replicas import Fingerprints
from emergency_ckpt.core.restore_plan import RestorePlan, Strike, Take
from emergency_ckpt.core.shards import Box, Shard
from tests.core.planning_world import STEP, groups_of, layouts

Versions = dict[int, int]  # Per shard which version of it.


@dataclasses.dataclass
class World:
    """Slots of one layout, wherever they lie now, what was saved in each, and what a drain wrote of it."""

    planner: Planner
    saved: dict[int, Versions]
    drained: Versions

    @property
    def layout(self) -> Layout:
        return self.planner.layout

    def kept(self, process: int) -> Versions:
        """What is good in the slot of a process."""
        for holding in self.planner.inventories[process].holdings:
            return {s: v for s, v in self.saved[process].items() if s not in holding.missing}
        return {}

    def needed(self, process: int) -> set[int]:
        return {s for s in self.layout.process_shards[process] if self.layout.shard_nbytes[s]}


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Versions are compared shard by shard, in some slots, or by digests of slots alone."""
    layout = draw(layouts(cut_alike=True).filter(lambda layout: 2 < layout.process_count < 7))
    count = layout.process_count
    odd = st.sampled_from([0, 0, 1, 2])
    saved: dict[int, Versions] = {}
    inventories: list[Inventory] = []
    numbers: dict[SlotOf, Fingerprints] = {}
    at = draw(st.one_of(st.just(range(count)), st.permutations(range(count))))
    for process in range(count):
        if not draw(st.sampled_from([True, True, True, True, False])):
            inventories.append(Inventory(process))
            continue
        position = at[process]
        held = layout.process_shards[position]
        differs = draw(st.booleans())
        saved[process] = {shard: draw(odd) if differs else 0 for shard in held}
        lacking = st.sets(st.sampled_from(held), max_size=2)
        missing = tuple(sorted(draw(st.one_of(st.just(set[int]()), st.just(set[int]()), lacking))))
        checksums = [[100 * shard + version + 1] for shard, version in saved[process].items()]
        parts = part_digests(layout, position, checksums, {})
        digest = str(checksums)
        inventories.append(
            Inventory(process, (Holding(STEP, layout.hash, position, digest, (), missing, parts),))
        )
        numbers[SlotOf(STEP, process, layout.hash, position)] = slot_fingerprints(
            layout, position, checksums, {}
        )
    drained = {
        shard: draw(st.sampled_from([held[shard] for held in saved.values() if shard in held] or [0]))
        for shard in range(len(layout.shards))
    }
    planner = Planner(
        layout,
        groups_of(layout),
        tuple(inventories),
        draw(st.sampled_from([(), (STEP,)])),
        single_replica=draw(st.booleans()),
        served=draw(st.one_of(st.none(), st.none(), st.frozensets(st.integers(0, count - 1)))),
    )
    asked = [slot for each in planner.differing_replicas(1) for slot in each.asked]
    told = draw(st.one_of(st.just(asked), st.just([]), st.lists(st.sampled_from(asked or [None]))))
    planner = dataclasses.replace(planner, fingerprints={slot: numbers[slot] for slot in told if slot})
    return World(planner, saved, drained)


@settings(max_examples=400)
@given(worlds(), st.data())
def test_whichever_sources_are_struck_a_restored_shard_is_one_version_on_all_processes(
    world: World, data: st.DataObject
) -> None:
    """As a restore goes on: what a process has got in one round it keeps, and gets the rest in the next."""
    planner, strikes = world.planner, list[Strike]()
    got: dict[int, Versions] = {process: {} for process in range(world.layout.process_count)}
    rounds = data.draw(st.integers(1, 4))
    for round_number in range(rounds):
        plan, reason = planner.plan(strikes=strikes)
        if plan is None:
            assert reason.startswith("step 70: ") or reason.startswith("no step was found")
            assert len(reason) > len("step 70: ")
            return
        failing = _failing(world, plan, data) if round_number < rounds - 1 else {}
        for process, own in enumerate(plan.processes):
            if own.sender is not None:
                got[process] = {}
                continue
            if not (own.in_place or own.takes):
                got[process] = {}
            before = world.kept(process) if own.in_place else got[process]
            arrived = [_given(world, take, failing) for take in own.takes]
            arrived.append({shard: world.drained[shard] for shard in own.persistent})
            got[process] = {s: v for each in (*arrived, before) for s, v in each.items()}
        for process, failure in failing.items():
            shards = failure.shards
            if shards is None and data.draw(st.booleans()):
                served = planner.served if planner.served is not None else frozenset(got)
                planner = dataclasses.replace(planner, served=served - {process})
            else:
                named = None if shards is None else frozenset(map(world.layout.shards.__getitem__, shards))
                strikes.append(Strike(STEP, process, named, "struck"))
    assert plan is not None
    found: Versions = {}
    for process, own in enumerate(plan.processes):
        sender = process if own.sender is None else own.sender
        versions = got[sender]
        assert world.needed(process) <= versions.keys()
        for shard in world.needed(process):
            assert found.setdefault(shard, versions[shard]) == versions[shard]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A source that is bad: in `shards`, or (None) all of it after it gave the first few of each take."""

    shards: frozenset[int] | None
    first: int = 0


def _failing(world: World, plan: RestorePlan, data: st.DataObject) -> Mapping[int, Failure]:
    """Sources of this plan that fail, by process."""
    used = sorted({take.process for own in plan.processes for take in own.takes})
    chosen = data.draw(st.lists(st.sampled_from(used), min_size=1, max_size=2, unique=True)) if used else []
    found: dict[int, Failure] = {}
    for process in chosen:
        some = st.frozensets(st.sampled_from(sorted(world.saved[process])), min_size=1, max_size=3)
        found[process] = data.draw(
            st.one_of(st.builds(Failure, st.none(), st.integers(1, 4)), st.builds(Failure, some))
        )
    return found


def _given(world: World, take: Take, failing: Mapping[int, Failure]) -> Versions:
    failure = failing.get(take.process, Failure(frozenset()))
    given = take.shards[: failure.first] if failure.shards is None else take.shards
    return {s: world.saved[take.process][s] for s in given if s not in (failure.shards or ())}


def test_the_majority_stands_when_those_that_have_it_are_struck_and_the_step_is_given_up() -> None:
    """A process may have got some of it by then: what others lack of it does not come from the minority."""
    layout = Layout.build(
        [LeafSpec("w", (4,), "int8")], {p: [Shard("w", Box((0,), (4,)))] for p in range(4)}, (0, 1, 2, 3)
    )
    digests = ["minority", "majority", "majority"]
    holdings = [(Holding(STEP, layout.hash, p, digest),) for p, digest in enumerate(digests)]
    inventories = tuple(Inventory(p, held) for p, held in enumerate([*holdings, ()]))
    planner = Planner(layout, groups_of(layout), inventories, ())
    plan, reason = planner.plan()
    assert plan is not None, reason
    assert [own.in_place for own in plan.processes] == [False, True, True, False]
    plan, reason = planner.plan(strikes=[Strike(STEP, p, None, "bad block") for p in (1, 2)])
    assert plan is None
    assert reason == (
        "step 70: the copy of process 1 is damaged (bad block); the copy of process 2 is damaged (bad block); "
        "replicas differ: process 0 takes the bytes of the majority"
    )
