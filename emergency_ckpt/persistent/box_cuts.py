"""Cutting a box that is larger than what may be read at a time into pieces of whole chunks.

The pieces cover the box, do not overlap, and no two of them need the same chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

from emergency_ckpt.core.shards import Box


def cut_box(box: Box, chunk: Sequence[int], itemsize: int, most_bytes: int) -> list[Box]:
    """Pieces of at most `most_bytes`, or within one chunk where that is larger; in C order of their halves.

    `chunk` is the shape of the array's chunks, whose grid begins at the origin.
    """
    if box.size * itemsize <= most_bytes:
        return [box]
    for axis, step in enumerate(chunk):
        start, stop = box.start[axis], box.stop[axis]
        first, last = start // step, (stop - 1) // step
        if first < last:
            border = (first + last + 1) // 2 * step
            halves = (_within(box, axis, start, border), _within(box, axis, border, stop))
            return [piece for half in halves for piece in cut_box(half, chunk, itemsize, most_bytes)]
    return [box]


def _within(box: Box, axis: int, start: int, stop: int) -> Box:
    return Box(
        (*box.start[:axis], start, *box.start[axis + 1 :]), (*box.stop[:axis], stop, *box.stop[axis + 1 :])
    )
