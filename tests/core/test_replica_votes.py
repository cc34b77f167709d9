"""Of slots that should be equal each shard is taken from most, of as many from the lowest slice, and named."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.parts import part_digests
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.replica_votes import Outvoted, SlotOf, slot_fingerprints
from emergency_ckpt.core.replicas import Fingerprints
from emergency_ckpt.core.restore_plan import Take
from emergency_ckpt.core.shards import Box, Shard

STEP = StepId(2, 30)
LEAVES = ("a", "b", "c")


def make_layout(processes: int) -> Layout:
    """Every process is a slice and holds three leaves of one shard each, and a value."""
    held = {p: [Shard(leaf, Box((0,), (4,))) for leaf in LEAVES] for p in range(processes)}
    leaves = [LeafSpec(leaf, (4,), "float32") for leaf in LEAVES]
    return Layout.build(leaves, held, tuple(range(processes)), value_leaves=["lr"])


Copies = list[tuple[int, int, int, int]]


def planned(copies: Copies, missing: dict[int, tuple[int, ...]] | None = None) -> Planner:
    """`copies`: per process a number for the content of each leaf and of the value; 0: it never came."""
    layout = make_layout(len(copies))
    inventories: list[Inventory] = []
    numbers: dict[SlotOf, Fingerprints] = {}
    for p, (*leaves, lr) in enumerate(copies):
        checksums = [[n] if n else [] for n in leaves]
        parts = part_digests(layout, p, checksums, {"lr": lr})
        held = Holding(STEP, layout.hash, p, str(copies[p]), (), (missing or {}).get(p, ()), parts)
        inventories.append(Inventory(p, (held,)))
        numbers[SlotOf(STEP, p, layout.hash, p)] = slot_fingerprints(layout, p, checksums, {"lr": lr})
    groups = (tuple(range(len(copies))),)
    planner = Planner(layout, groups, tuple(inventories), ())
    asked = {slot for each in planner.differing_replicas(1) for slot in each.asked}
    return dataclasses.replace(planner, fingerprints={slot: numbers[slot] for slot in asked})


def outvoted(planner: Planner) -> dict[int, Outvoted]:
    """By process."""
    return {slot.process: found for slot, found in planner._outvoted(STEP).items()}


contents = st.tuples(*(st.integers(1, 3),) * 4)


@given(st.lists(contents, min_size=2, max_size=7))
def test_all_processes_end_with_one_version_of_each_leaf_which_is_the_one_that_most_have(
    copies: Copies,
) -> None:
    planner = planned(copies)
    plan, reason = planner.plan()
    assert plan is not None, reason
    for leaf in range(3):
        counts = collections.Counter(copy[leaf] for copy in copies)
        most = max(counts.values())
        right = next(copy[leaf] for copy in copies if counts[copy[leaf]] == most)  # The lowest slice is first.
        for process, own in enumerate(plan.processes):
            source = process
            if not own.in_place:
                (source,) = [take.process for take in own.takes if leaf in take.shards]
            elif any(leaf in take.shards for take in own.takes):
                pytest.fail("a slot whose bytes were outvoted was mended in place")
            assert copies[source][leaf] == right
    # Values belong together, and all get those of one process.
    told = {next((t.process for t in own.takes if not t.shards), p) for p, own in enumerate(plan.processes)}
    assert len({copies[p][3] for p in told}) == 1
    names = {each.leaf for each in planner.divergences(STEP)}
    assert names == {name for at, name in enumerate((*LEAVES, "lr")) if len({c[at] for c in copies}) > 1}


def test_of_as_many_versions_the_one_that_is_whole_somewhere_counts_before_the_lowest_slice() -> None:
    found = outvoted(planned([(1, 1, 1, 1), (2, 1, 1, 1)], missing={0: (0,)}))
    assert found == {0: Outvoted(frozenset({0})), 1: Outvoted()}


def test_a_shard_that_never_came_has_no_vote_and_is_no_difference() -> None:
    planner = planned([(0, 1, 1, 1), (0, 1, 1, 1), (7, 1, 2, 1)], missing={0: (0,), 1: (0,)})
    assert [each.leaf for each in planner.divergences(STEP)] == ["c"]
    assert outvoted(planner) == {0: Outvoted(), 1: Outvoted(), 2: Outvoted(frozenset({2}))}


def test_a_process_whose_values_are_outvoted_keeps_its_shards_and_takes_the_values_of_another() -> None:
    planner = planned([(1, 1, 1, 5), (1, 1, 1, 6), (1, 1, 1, 6)])
    assert outvoted(planner)[0] == Outvoted(values=True)
    plan, _ = planner.plan()
    assert plan is not None
    assert [own.in_place for own in plan.processes] == [False, True, True]
    layout = planner.layout
    assert plan.processes[0].takes == (Take(0, layout.hash, 0, (0, 1, 2)), Take(1, layout.hash, 1, ()))
    # Where nobody can be asked for them, its slot is none, and it gets everything by broadcast.
    plan, _ = dataclasses.replace(planner, served=frozenset()).plan()
    assert plan is not None
    assert plan.processes[0].sender == 1


def test_fingerprints_of_another_slot_are_refused() -> None:
    planner = planned([(1, 1, 1, 1), (2, 1, 1, 1)])
    numbers = {slot: np.zeros(2, np.uint64) for slot in planner.fingerprints}
    with pytest.raises(ValueError, match="not of 3 shards and 1 values"):
        dataclasses.replace(planner, fingerprints=numbers).plan()
