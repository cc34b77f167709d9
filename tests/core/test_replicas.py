"""Copies that must be equal are compared, all of them, by processes that agree on what they compare."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.replicas import (
    MOST_COMPARISONS,
    MOST_PROCESSES,
    Comparison,
    comparisons_of,
    digest_of,
    find_divergences,
)
from emergency_ckpt.core.shards import Box, Shard

ROWS = 8


def make_layout(held: Mapping[int, set[int]], slices: tuple[int, ...] | None = None) -> Layout:
    """A leaf of eight rows, each of which is a shard of its own; per process the rows that it holds."""
    leaves = [LeafSpec("w", (ROWS, 2), "float32")]
    holders = {p: [Shard("w", Box((row, 0), (row + 1, 2))) for row in rows] for p, rows in held.items()}
    return Layout.build(leaves, holders, slices or tuple(range(len(held))), value_leaves=["lr"])


@given(st.lists(st.sets(st.integers(0, ROWS - 1), min_size=1), min_size=1, max_size=40))
def test_all_processes_of_a_comparison_know_the_same_one(held: list[set[int]]) -> None:
    layout = make_layout(dict(enumerate(held)))
    made = {p: comparisons_of(layout, p) for p in range(len(held))}
    for process, comparisons in made.items():
        assert len(comparisons) <= MOST_COMPARISONS
        for each in comparisons:
            assert process in each.processes
            assert 2 <= len(each.processes) <= MOST_PROCESSES
            assert set(each.shards) <= set(layout.process_shards[process])
            for other in each.processes:
                same = [c for c in made[other] if c.name == each.name]
                # Who takes part in too many leaves some out.
                assert same == [each] or len(made[other]) == MOST_COMPARISONS


@given(st.integers(2, 100))
def test_however_many_replicas_there_are_each_is_compared_with_some(count: int) -> None:
    layout = make_layout({p: {0, 1} for p in range(count)})
    compared = {c.processes for p in range(count) for c in comparisons_of(layout, p)}
    assert sorted(p for processes in compared for p in processes) == list(range(count))


def test_counterparts_compare_all_that_they_hold_values_included() -> None:
    layout = make_layout({0: {0, 7}, 1: {1, 7}, 2: {0, 7}, 3: {1, 7}}, (0, 0, 1, 1))
    assert comparisons_of(layout, 3) == (Comparison((1, 3), layout.process_shards[3], ("lr",)),)


def test_a_single_slice_compares_what_its_hosts_have_in_common() -> None:
    layout = make_layout({0: {0, 7}, 1: {1, 7}}, (0, 0))
    (last,) = set(layout.process_shards[0]) & set(layout.process_shards[1])
    assert comparisons_of(layout, 0) == (Comparison((0, 1), (last,)),)


def test_without_copies_nothing_is_compared() -> None:
    assert comparisons_of(make_layout({0: {0}, 1: {1}}), 0) == ()
    assert comparisons_of(make_layout({0: {0}}), 0) == ()


THREE = make_layout({0: {0, 1}, 1: {0, 1}, 2: {0, 1}})
ALL = Comparison((0, 1, 2), (0, 1), ("lr",))


def found(*copies: tuple[int, int, float]) -> dict[int, np.ndarray]:
    """Per process the checksum of each row (two blocks of the second), and the value."""
    return {p: ALL.fingerprints({0: [a], 1: [b, 5]}, {"lr": lr}) for p, (a, b, lr) in enumerate(copies)}


def test_equal_copies_have_equal_digests_and_no_divergence() -> None:
    copies = found(*[(1, 2, 0.5)] * 3)
    assert len({digest_of(each) for each in copies.values()}) == 1
    assert find_divergences(ALL, THREE, copies) == ()


def test_of_three_the_one_that_is_not_like_the_others_is_named_with_leaf_and_box() -> None:
    (one,) = find_divergences(ALL, THREE, found((1, 2, 0.5), (1, 3, 0.5), (1, 2, 0.5)))
    assert (one.leaf, one.boxes) == ("w", (Box((1, 0), (2, 2)),))
    assert (one.versions, one.deviating) == (((0, 2), (1,)), (1,))


def test_of_two_nothing_tells_which_is_right() -> None:
    copies = found((1, 2, 0.5), (1, 3, 0.5))
    (one,) = find_divergences(ALL, THREE, copies)
    assert (one.versions, one.deviating) == (((0,), (1,)), ())


def test_three_different_copies_have_no_majority() -> None:
    (one,) = find_divergences(ALL, THREE, found((1, 2, 0.5), (1, 3, 0.5), (1, 4, 0.5)))
    assert one.deviating == ()


def test_values_are_compared_bit_for_bit() -> None:
    (one,) = find_divergences(ALL, THREE, found((1, 2, 0.5), (1, 2, 0.5), (1, 2, -0.0)))
    assert (one.leaf, one.boxes, one.deviating) == ("lr", (), (2,))
    assert find_divergences(ALL, THREE, found(*[(1, 2, float("nan"))] * 3)) == ()
    assert find_divergences(ALL, THREE, found((1, 2, 0.0), (1, 2, 0.0), (1, 2, -0.0)))


def test_what_is_of_another_comparison_is_refused() -> None:
    with pytest.raises(ValueError, match=r"processes \[1\]"):
        find_divergences(ALL, THREE, {0: np.zeros(3, np.uint64), 1: np.zeros(2, np.uint64)})
