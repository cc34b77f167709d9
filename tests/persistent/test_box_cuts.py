"""Pieces of a box: together they are it, each is small or within one chunk, no two need the same chunk."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.shards import Box
from emergency_ckpt.persistent.box_cuts import cut_box

AXES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 5)), max_size=3)


@given(axes=AXES, itemsize=st.sampled_from([1, 4]), most=st.integers(1, 200))
def test_pieces_are_the_box_in_chunks(axes: list[tuple[int, int, int]], itemsize: int, most: int) -> None:
    box = Box(tuple(a for a, _, _ in axes), tuple(a + n for a, n, _ in axes))
    chunk = [c for _, _, c in axes]
    pieces = cut_box(box, chunk, itemsize, most)
    count = np.zeros(box.stop, np.int32)
    for piece in pieces:
        count[piece.slices()] += 1
    assert (count[box.slices()] == 1).all()
    assert count.sum() == box.size
    chunks_of = [
        set(itertools.product(*(range(a // c, -(-b // c)) for a, b, c in bounds(p, chunk)))) for p in pieces
    ]
    assert all(p.size * itemsize <= most or len(c) == 1 for p, c in zip(pieces, chunks_of, strict=True))
    if len(pieces) > 1:
        assert sum(map(len, chunks_of)) == len(set.union(*chunks_of))


def bounds(piece: Box, chunk: list[int]) -> list[tuple[int, int, int]]:
    return list(zip(piece.start, piece.stop, chunk, strict=True))
