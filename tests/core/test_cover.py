"""Boxes and tables of them: what is found, what meets what, and which boxes cover another one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.box_table import BoxTable
from emergency_ckpt.core.cover import cover_of
from emergency_ckpt.core.shard_table import HeldShards, ShardTable
from emergency_ckpt.core.shards import Box, Shard, covers

SHAPE = (6, 5)


def boxes(shape: tuple[int, ...] = SHAPE) -> st.SearchStrategy[Box]:
    bounds = st.tuples(*(st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape))
    return bounds.map(lambda pairs: Box(tuple(a for a, _ in pairs), tuple(b for _, b in pairs)))


@st.composite
def grids(draw: st.DrawFn) -> BoxTable:
    """Cells of a grid of any cut points, some of them left out."""
    cuts = [sorted({0, n, *draw(st.sets(st.integers(1, n - 1)))}) for n in SHAPE]
    cells = [
        Box((a, c), (b, d))
        for a, b in zip(cuts[0], cuts[0][1:], strict=False)
        for c, d in zip(cuts[1], cuts[1][1:], strict=False)
    ]
    kept = draw(st.lists(st.sampled_from(cells), min_size=1, unique=True))
    return BoxTable.of(sorted(kept))


tables = st.one_of(grids(), st.sets(boxes(), min_size=1, max_size=6).map(sorted).map(BoxTable.of))


@given(tables, boxes())
def test_a_table_finds_what_it_has_and_what_meets_a_box(table: BoxTable, box: Box) -> None:
    listed = [table.box(row) for row in range(len(table))]
    assert [table.find(each) for each in listed] == list(range(len(table)))
    assert table.find(box) == (listed.index(box) if box in listed else None)
    assert table.sizes.tolist() == [each.size for each in listed]
    assert table.meeting(box).tolist() == [row for row, each in enumerate(listed) if each.intersect(box)]


@given(grids())
def test_cells_of_a_grid_are_known_to_be_apart(table: BoxTable) -> None:
    assert table.is_grid


@given(tables, tables)
def test_equal_boxes_are_found_in_another_table(one: BoxTable, other: BoxTable) -> None:
    found = [other.find(one.box(row)) for row in range(len(one))]
    assert one.rows_in(other).tolist() == [-1 if row is None else row for row in found]


@given(st.lists(st.tuples(tables, st.randoms(use_true_random=False)), max_size=3), boxes())
def test_a_cover_is_whole_minimal_and_there_whenever_there_is_one(
    given: list[tuple[BoxTable, object]], wanted: Box
) -> None:
    saved = [
        (table, np.array([random.random() < 0.8 for _ in range(len(table))], np.bool_))  # type: ignore[attr-defined]
        for table, random in given
    ]
    held = [table.box(row) for table, flags in saved for row in np.flatnonzero(flags).tolist()]
    found = cover_of(wanted, saved)
    assert (found is not None) == covers(held, wanted)
    if found is None:
        return
    assert all(saved[at][1][row] for at, row in found)
    chosen = [saved[at][0].box(row) for at, row in found]
    assert covers(chosen, wanted)
    for left_out in range(len(chosen)):
        assert not covers(chosen[:left_out] + chosen[left_out + 1 :], wanted)


def test_one_cut_is_preferred_and_of_several_the_one_that_moves_least() -> None:
    halves = BoxTable.of([Box((0,), (8,)), Box((8,), (16,))])
    quarters = BoxTable.of([Box((4 * i,), (4 * i + 4,)) for i in range(4)])
    every = [(table, np.ones(len(table), np.bool_)) for table in (halves, quarters)]
    assert cover_of(Box((0,), (4,)), every) == [(1, 0)]
    assert cover_of(Box((2,), (10,)), every) == [(1, 0), (1, 1), (1, 2)]
    assert cover_of(Box((0,), (16,)), every) == [(0, 0), (0, 1)]


@given(st.lists(tables, max_size=3))
def test_a_table_of_shards_is_the_sequence_of_them(given: list[BoxTable]) -> None:
    shards = [Shard(f"leaf{n}", table.box(row)) for n, table in enumerate(given) for row in range(len(table))]
    table = ShardTable.of(shards)
    assert list(table) == shards
    assert table == tuple(shards)
    assert [table[i] for i in range(len(table))] == shards
    assert table[-2:] == tuple(shards[-2:])
    assert [table.find(shard) for shard in shards] == list(range(len(shards)))
    assert Shard("another", Box((), ())) not in table
    with pytest.raises(IndexError):
        table[len(shards)]
    assert table.numbers_in(table).tolist() == list(range(len(shards)))


held_lists = st.lists(st.sets(st.integers(0, 9)).map(sorted).map(tuple), max_size=5)


@given(held_lists)
def test_lists_of_held_shards_are_kept_once_each(held: list[tuple[int, ...]]) -> None:
    table = HeldShards.of(held)
    assert table == tuple(held)
    assert [table[p] for p in range(len(table))] == held
    assert len(table.lists) == len(set(held))
    owners = np.array([p for p, indices in enumerate(held) for _ in indices], np.int64)
    indices = np.array([i for indices in held for i in indices], np.int64)
    again = HeldShards.of_pairs(range(len(held)), owners, indices)
    assert again == table
    assert hash(again) == hash(table)
