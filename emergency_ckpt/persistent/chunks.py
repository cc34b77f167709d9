"""How a leaf is cut into zarr chunks: every saved shard is made of whole chunks.

A chunk therefore has one writer; two writers to one chunk would lose data without an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from emergency_ckpt.core.shards import Box


def chunk_shape(
    shape: Sequence[int], boxes: Iterable[Box], itemsize: int, max_chunk_bytes: int
) -> tuple[int, ...]:
    """Shape of the chunks of an array of `shape` whose saved shards are `boxes`.

    Every box begins at a multiple of the chunk and ends at one or at the end of the array. A chunk takes at
    most `max_chunk_bytes` unless a single element is larger.
    """
    boxes = list(boxes)
    chunk, free = [], []
    for axis, size in enumerate(shape):
        cuts = {b.start[axis] for b in boxes} | {b.stop[axis] for b in boxes}
        inner = [cut for cut in cuts if 0 < cut < size]
        free.append(not inner)
        chunk.append(math.gcd(*inner) if inner else max(size, 1))
    while math.prod(chunk) * itemsize > max_chunk_bytes and any(n > 1 for n in chunk):
        axis = min((a for a, n in enumerate(chunk) if n > 1), key=lambda a: (_split(chunk[a], free[a]), a))
        chunk[axis] = -(-chunk[axis] // _split(chunk[axis], free[axis]))
    return tuple(chunk)


def chunk_count(shape: Sequence[int], chunk: Sequence[int]) -> int:
    """Number of chunks that an array of `shape` has."""
    return math.prod(-(-size // step) for size, step in zip(shape, chunk, strict=True))


def _split(length: int, free: bool) -> int:
    """The smallest number of pieces to cut a chunk into along an axis.

    An axis that no shard divides may end in a shorter chunk; any other needs equal pieces.
    """
    if free or length % 2 == 0:
        return 2
    return next((n for n in range(3, math.isqrt(length) + 1, 2) if length % n == 0), length)
