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
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.replica_votes import (
    DifferingReplicas,
    Outvoted,
    Replica,
    SlotOf,
    Vote,
    slot_fingerprints,
    vote,
)
from emergency_ckpt.core.restore_plan import Take
from emergency_ckpt.core.shards import Box, Shard

STEP = StepId(2, 30)
LEAVES = ("a", "b", "c")


def make_layout(processes: int) -> Layout:
    """Every process is a slice and holds three leaves of one shard each, and a value."""
    held = {p: [Shard(leaf, Box((0,), (4,))) for leaf in LEAVES] for p in range(processes)}
    leaves = [LeafSpec(leaf, (4,), "float32") for leaf in LEAVES]
    return Layout.build(leaves, held, tuple(range(processes)), value_leaves=["lr"])


def voted(
    copies: list[tuple[int, int, int, int]], missing: dict[int, tuple[int, ...]] | None = None
) -> tuple[Vote, Layout]:
    """`copies`: per process a number for the content of each leaf and of the value."""
    layout = make_layout(len(copies))
    replicas = tuple(
        Replica(SlotOf(STEP, p, layout.hash, p), str(copy), (missing or {}).get(p, ()))
        for p, copy in enumerate(copies)
    )
    differing = DifferingReplicas(replicas)

    def numbers(slot: SlotOf) -> np.ndarray:
        *leaves, lr = copies[slot.process]
        return slot_fingerprints(layout, slot.position, [[n] if n else [] for n in leaves], {"lr": lr})

    found = {slot: numbers(slot) for slot in differing.asked}
    return vote(differing, {layout.hash: layout}, found, layout.process_slice), layout


def planned(copies: list[tuple[int, int, int, int]], found: Vote, layout: Layout) -> Planner:
    inventories = tuple(
        Inventory(p, (Holding(STEP, layout.hash, p, str(copy)),)) for p, copy in enumerate(copies)
    )
    groups = (tuple(range(len(copies))),)
    return Planner(layout, groups, inventories, (), outvoted=found.outvoted)


contents = st.tuples(*(st.integers(1, 3),) * 4)


@given(st.lists(contents, min_size=2, max_size=7))
def test_all_processes_end_with_one_version_of_each_leaf_which_is_the_one_that_most_have(
    copies: list[tuple[int, int, int, int]],
) -> None:
    found, layout = voted(copies)
    plan, reason = planned(copies, found, layout).plan()
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
    names = {each.leaf for each in found.divergences}
    assert names == {name for at, name in enumerate((*LEAVES, "lr")) if len({c[at] for c in copies}) > 1}


def test_of_as_many_versions_the_one_that_is_whole_somewhere_counts_before_the_lowest_slice() -> None:
    found, layout = voted([(1, 1, 1, 1), (2, 1, 1, 1)], missing={0: (0,)})
    assert found.outvoted[SlotOf(STEP, 0, layout.hash, 0)] == Outvoted(frozenset({0}))
    assert found.outvoted[SlotOf(STEP, 1, layout.hash, 1)] == Outvoted()


def test_a_shard_that_never_came_has_no_vote_and_is_no_difference() -> None:
    found, layout = voted([(0, 1, 1, 1), (0, 1, 1, 1), (7, 1, 2, 1)], missing={0: (0,), 1: (0,)})
    assert [each.leaf for each in found.divergences] == ["c"]
    assert found.outvoted[SlotOf(STEP, 0, layout.hash, 0)] == Outvoted()
    assert found.outvoted[SlotOf(STEP, 2, layout.hash, 2)] == Outvoted(frozenset({2}))


def test_a_process_whose_values_are_outvoted_keeps_its_shards_and_takes_the_values_of_another() -> None:
    copies = [(1, 1, 1, 5), (1, 1, 1, 6), (1, 1, 1, 6)]
    found, layout = voted(copies)
    assert found.outvoted[SlotOf(STEP, 0, layout.hash, 0)] == Outvoted(values=True)
    plan, _ = planned(copies, found, layout).plan()
    assert plan is not None
    assert [own.in_place for own in plan.processes] == [False, True, True]
    assert plan.processes[0].takes == (Take(0, layout.hash, 0, (0, 1, 2)), Take(1, layout.hash, 1, ()))
    # Where nobody can be asked for them, its slot is none, and it gets everything by broadcast.
    alone = dataclasses.replace(planned(copies, found, layout), served=frozenset())
    plan, _ = alone.plan()
    assert plan is not None
    assert plan.processes[0].sender == 1


def test_fingerprints_of_another_slot_are_refused() -> None:
    layout = make_layout(2)
    replicas = tuple(Replica(SlotOf(STEP, p, layout.hash, p), str(p)) for p in range(2))
    numbers = {each.slot: np.zeros(2, np.uint64) for each in replicas}
    with pytest.raises(ValueError, match="not of 4 shards and values"):
        vote(DifferingReplicas(replicas), {layout.hash: layout}, numbers, (0, 1))
