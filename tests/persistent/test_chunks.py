"""Chunks: every saved shard is made of whole chunks, and none is larger than allowed."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.shards import Box
from emergency_ckpt.persistent.chunks import chunk_count, chunk_shape


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """An array that is cut along each axis at any places, and its boxes."""
    shape = tuple(draw(st.lists(st.integers(0, 60), max_size=3)))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))}) for n in shape]
    spans = [list(itertools.pairwise(c)) or [(0, 0)] for c in cuts]
    boxes = [Box(tuple(a for a, _ in p), tuple(b for _, b in p)) for p in itertools.product(*spans)]
    return shape, boxes


@given(grids(), st.sampled_from([1, 2, 4, 16]), st.integers(1, 5000))
def test_boxes_are_made_of_whole_chunks_of_bounded_size(
    grid: tuple[tuple[int, ...], list[Box]], itemsize: int, most: int
) -> None:
    shape, boxes = grid
    chunk = chunk_shape(shape, boxes, itemsize, most)
    assert len(chunk) == len(shape)
    assert all(n >= 1 for n in chunk)
    assert math.prod(chunk) * itemsize <= max(most, itemsize)
    for box in boxes:
        for axis, size in enumerate(shape):
            assert box.start[axis] % chunk[axis] == 0 or box.start[axis] == size
            assert box.stop[axis] % chunk[axis] == 0 or box.stop[axis] == size


@given(grids(), st.integers(1, 5000))
def test_the_number_of_chunks_is_that_of_the_grid(grid: tuple[tuple[int, ...], list[Box]], most: int) -> None:
    shape, boxes = grid
    chunk = chunk_shape(shape, boxes, 1, most)
    assert chunk_count(shape, chunk) == math.prod(
        len(range(0, n, step)) for n, step in zip(shape, chunk, strict=True)
    )


def test_evenly_sharded_leaves_have_one_chunk_per_shard_where_they_fit() -> None:
    boxes = [Box((r * 8, c * 16), (r * 8 + 8, c * 16 + 16)) for r in range(4) for c in range(2)]
    assert chunk_shape((32, 32), boxes, 4, 1 << 20) == (8, 16)


def test_a_large_axis_of_prime_length_is_not_cut_into_single_rows() -> None:
    """A vocabulary of 50257: the other axis is cut, or this one unevenly where no shard ends in it."""
    whole = [Box((0, 0), (50257, 768))]
    chunk = chunk_shape((50257, 768), whole, 4, 64 << 20)
    assert chunk_count((50257, 768), chunk) <= 4
    assert chunk_count((50257,), chunk_shape((50257,), [Box((0,), (50257,))], 4, 64 << 10)) <= 4
