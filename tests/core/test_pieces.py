"""Pieces of an array, put one after the other, are the array; and none is larger than asked."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.pieces import Cut, cut_array

shapes = st.lists(st.integers(0, 7), max_size=5).map(tuple)
itemsizes = st.sampled_from([1, 2, 4, 8, 16])


def taken(array: np.ndarray, cut: Cut) -> list[np.ndarray]:
    """The pieces as `jax.lax.dynamic_slice` would give them, without what they repeat."""
    found = []
    for start, repeated in cut.pieces():
        assert all(a >= 0 and a + n <= m for a, n, m in zip(start, cut.piece_shape, array.shape, strict=True))
        piece = array[tuple(slice(a, a + n) for a, n in zip(start, cut.piece_shape, strict=True))]
        assert piece.shape == cut.piece_shape
        found.append(piece.reshape(-1)[repeated:])
    return found


@given(shapes, itemsizes, st.integers(1, 200))
def test_the_pieces_are_the_array_in_c_order(shape: tuple[int, ...], itemsize: int, piece_bytes: int) -> None:
    array = np.arange(math.prod(shape)).reshape(shape)
    cut = cut_array(shape, itemsize, piece_bytes)
    np.testing.assert_array_equal(np.concatenate(taken(array, cut)), array.reshape(-1))
    assert math.prod(cut.piece_shape) * itemsize <= max(piece_bytes, itemsize)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=3).map(tuple), st.integers(1024, 10**6))
def test_pieces_are_not_much_smaller_than_they_may_be(shape: tuple[int, ...], piece_bytes: int) -> None:
    count = sum(1 for _ in zip(cut_array(shape, 4, piece_bytes).pieces(), range(10_000), strict=False))
    assert count <= min(10_000, 1 + 3 * math.prod(shape) * 4 // piece_bytes)


@pytest.mark.parametrize(
    ("shape", "piece_shape", "starts"),
    [
        ((), (), [()]),
        ((0, 4), (0, 4), [(0, 0)]),
        ((8, 4), (3, 4), [(0, 0), (3, 0), (5, 0)]),
        ((1, 1, 8, 4), (1, 1, 3, 4), [(0, 0, 0, 0), (0, 0, 3, 0), (0, 0, 5, 0)]),
        ((2, 24), (1, 12), [(0, 0), (0, 12), (1, 0), (1, 12)]),
    ],
)
def test_rows_of_the_first_axis_that_is_not_too_large_are_cut(
    shape: tuple[int, ...], piece_shape: tuple[int, ...], starts: list[tuple[int, ...]]
) -> None:
    cut = cut_array(shape, 1, 12)
    assert cut.piece_shape == piece_shape
    assert [start for start, _ in cut.pieces()] == starts


def test_pieces_of_the_last_axis_begin_at_even_places() -> None:
    cut = cut_array((1000,), 1, 300)
    assert [start for start, _ in cut.pieces()] == [(0,), (256,), (512,), (744,)]
