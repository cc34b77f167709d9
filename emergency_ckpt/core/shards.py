"""Boxes, shards and blocks: the units of everything that is stored, served and fetched.

A shard is identified by what it is (leaf and box), never by which process or device happens to hold it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

BLOCK_BYTES = 16 * 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Box:
    """A box of global indices, `[start, stop)` per dimension; the empty tuple of bounds is a scalar's box."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise ValueError(f"box has {len(self.start)} starts and {len(self.stop)} stops")
        if any(a < 0 or b < a for a, b in zip(self.start, self.stop, strict=True)):
            raise ValueError(f"box bounds are not 0 <= start <= stop: {self.start}..{self.stop}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that covers an array of this shape."""
        return cls((0,) * len(shape), tuple(int(n) for n in shape))

    @classmethod
    def from_slices(cls, index: Sequence[slice], shape: Sequence[int]) -> Box:
        """The box of a `jax` shard index (a tuple of unit-step slices) into an array of `shape`."""
        bounds = [s.indices(n) for s, n in zip(index, shape, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError(f"only unit-step slices name a box, not {index}")
        return cls(tuple(b[0] for b in bounds), tuple(max(b[0], b[1]) for b in bounds))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def contains(self, other: Box) -> bool:
        return all(
            a <= c and d <= b for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """The common box, or None where the two share no element."""
        start = tuple(max(a, c) for a, c in zip(self.start, other.start, strict=True))
        stop = tuple(min(b, d) for b, d in zip(self.stop, other.stop, strict=True))
        if any(b <= a for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, stop)

    def relative_to(self, outer: Box) -> Box:
        """This box in the coordinates of `outer`, which must contain it."""
        if not outer.contains(self):
            raise ValueError(f"{self} does not lie within {outer}")
        return Box(
            tuple(a - o for a, o in zip(self.start, outer.start, strict=True)),
            tuple(b - o for b, o in zip(self.stop, outer.start, strict=True)),
        )

    def __str__(self) -> str:
        return text_of_bounds(self.start, self.stop)


def text_of_bounds(start: Sequence[int], stop: Sequence[int]) -> str:
    """A box in words."""
    return "[" + ", ".join([f"{a}:{b}" for a, b in zip(start, stop, strict=True)]) + "]"


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Shard:
    """One leaf restricted to one box. `leaf` is the leaf's name (its keys joined by '.')."""

    leaf: str
    box: Box

    def __str__(self) -> str:
        return f"{self.leaf}{self.box}"


def covers(boxes: Sequence[Box], wanted: Box) -> bool:
    """Whether the union of `boxes` contains every element of `wanted`."""
    missing = [wanted] if wanted.size else []
    for box in boxes:
        missing = [rest for hole in missing for rest in _subtract(hole, box)]
        if not missing:
            return True
    return not missing


def _subtract(hole: Box, box: Box) -> Iterator[Box]:
    """The parts of `hole` that lie outside `box`, as disjoint boxes."""
    common = hole.intersect(box) if hole.start else box
    if common is None:
        yield hole
        return
    start, stop = list(hole.start), list(hole.stop)
    for axis in range(len(start)):
        if start[axis] < common.start[axis]:
            yield Box(tuple(start), (*stop[:axis], common.start[axis], *stop[axis + 1 :]))
            start[axis] = common.start[axis]
        if common.stop[axis] < stop[axis]:
            yield Box((*start[:axis], common.stop[axis], *start[axis + 1 :]), tuple(stop))
            stop[axis] = common.stop[axis]


def dtype_of(name: str) -> np.dtype:
    """The numpy dtype of a name such as 'float32', 'bfloat16' or 'int4' (ml_dtypes included).

    Sub-byte dtypes take one byte per element in host memory and in slots.
    Raises ValueError for a name that neither numpy nor ml_dtypes knows.
    """
    # Looked up by name: numpy's own parser takes whole expressions and fails in many ways.
    scalar: Any = getattr(ml_dtypes, name, None) or np.sctypeDict.get(name)
    if np.generic not in getattr(scalar, "__mro__", ()):
        raise ValueError(f"unknown dtype {name!r}")
    dtype = np.dtype(scalar)
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"dtype {name!r} has no fixed size in memory")
    return dtype


def block_ranges(nbytes: int, block_bytes: int = BLOCK_BYTES) -> list[tuple[int, int]]:
    """`(offset, length)` of every block of a shard of `nbytes`; the last one may be shorter."""
    return [(at, min(block_bytes, nbytes - at)) for at in range(0, nbytes, block_bytes)]


def block_counts(nbytes: np.ndarray) -> np.ndarray:
    """The number of blocks of shards of these sizes."""
    return -(-nbytes // BLOCK_BYTES)
