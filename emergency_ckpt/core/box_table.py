"""The boxes into which one leaf is cut, as one table of numbers: thousands of them take no objects.

Rows are distinct and ascend in the order of boxes. Boxes are looked up by what they are and by what they meet,
the latter by bisecting the cut points where the boxes form a grid.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from emergency_ckpt.core.shards import Box, text_of_bounds

Numbers: TypeAlias = npt.NDArray[np.int64]

_MOST_DIMENSIONS = 64


class BoxTable:
    """Boxes of one leaf, ascending; `rows` has the starts and then the stops of each."""

    def __init__(self, rows: Numbers) -> None:
        """`rows`: int64[boxes, 2 * dimensions]. Raises ValueError for what is no ascending list of boxes."""
        count, width = rows.shape
        dimensions = width // 2
        if width % 2 or dimensions > _MOST_DIMENSIONS or (not width and count > 1):
            raise ValueError(f"{count} rows of {width} numbers are no table of boxes")
        starts, stops = rows[:, :dimensions], rows[:, dimensions:]
        if (starts < 0).any() or (stops < starts).any():
            raise ValueError("box bounds are not 0 <= start <= stop")
        steps = rows[1:] - rows[:-1]
        if len(steps):
            first = (steps != 0).argmax(axis=1)
            if (steps[np.arange(len(steps)), first] <= 0).any():
                raise ValueError("the boxes of a leaf are not distinct and ascending")
        self.rows = rows
        self.rows.flags.writeable = False
        self.dimensions = dimensions

    @classmethod
    def of(cls, boxes: Iterable[Box]) -> BoxTable:
        """The table of these boxes, which are ascending. Raises ValueError for other ones."""
        found = [(*box.start, *box.stop) for box in boxes]
        width = len(found[0]) if found else 0
        if any(len(row) != width for row in found):
            raise ValueError("the boxes of a leaf have different numbers of dimensions")
        return cls(np.array(found, np.int64).reshape(len(found), width))

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BoxTable):
            return NotImplemented
        return self is other or np.array_equal(self.rows, other.rows)

    def __hash__(self) -> int:
        return hash(self.key)

    @functools.cached_property
    def key(self) -> tuple[int, bytes]:
        """Equal for equal tables, and only for them."""
        return self.dimensions, self.rows.tobytes()

    def box(self, row: int) -> Box:
        bounds: list[int] = self.rows[row].tolist()
        return Box(tuple(bounds[: self.dimensions]), tuple(bounds[self.dimensions :]))

    def named(self, row: int) -> str:
        """A box as text, as the box itself says it."""
        text = self._texts.get(row)
        if text is None:
            bounds: list[int] = self.rows[row].tolist()
            text = self._texts[row] = text_of_bounds(bounds[: self.dimensions], bounds[self.dimensions :])
        return text

    @functools.cached_property
    def _texts(self) -> dict[int, str]:
        """By row, of those that were named: a process names the same box of many leaves that are cut alike."""
        return {}

    @functools.cached_property
    def sizes(self) -> Numbers:
        """Elements of each box."""
        return (self.rows[:, self.dimensions :] - self.rows[:, : self.dimensions]).prod(axis=1)

    def find(self, box: Box) -> int | None:
        """The row of this very box."""
        return self._row_of.get((*box.start, *box.stop)) if len(box.start) == self.dimensions else None

    def rows_in(self, other: BoxTable) -> Numbers:
        """Per box its row in another table, -1 where that has no such box."""
        if self.key == other.key:
            return np.arange(len(self))
        if self.dimensions != other.dimensions:
            return np.full(len(self), -1, np.int64)
        row_of = other._row_of
        return np.array([row_of.get(tuple(row), -1) for row in self.rows.tolist()], np.int64)

    def meeting(self, box: Box) -> Numbers:
        """The rows of all boxes that share an element with `box`, ascending."""
        if len(box.start) != self.dimensions or not box.size:
            return np.empty(0, np.int64)
        if self._grid is not None:
            return self._grid.meeting(box)
        starts, stops = self.rows[:, : self.dimensions], self.rows[:, self.dimensions :]
        common = (starts < np.array(box.stop, np.int64)) & (stops > np.array(box.start, np.int64))
        return np.flatnonzero(common.all(axis=1) & (self.sizes > 0))

    @property
    def is_grid(self) -> bool:
        """Whether the boxes lie in a grid of cut points: no two of them share an element."""
        return self._grid is not None

    @functools.cached_property
    def _row_of(self) -> Mapping[tuple[int, ...], int]:
        return {tuple(row): number for number, row in enumerate(self.rows.tolist())}

    @functools.cached_property
    def _grid(self) -> _Grid | None:
        starts, stops = self.rows[:, : self.dimensions], self.rows[:, self.dimensions :]
        if not self.dimensions or not (self.sizes > 0).all():
            return None
        axes: list[_Axis] = []
        for axis in range(self.dimensions):
            intervals = np.unique(np.stack((starts[:, axis], stops[:, axis]), axis=1), axis=0)
            if (intervals[1:, 0] < intervals[:-1, 1]).any():
                return None
            axes.append(_Axis(intervals[:, 0].tolist(), intervals[:, 1].tolist()))
        cells = [[axis.first(start) for axis, start in zip(axes, row, strict=True)] for row in starts.tolist()]
        return _Grid(tuple(axes), {tuple(cell): row for row, cell in enumerate(cells)})


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Disjoint intervals along one dimension, ascending."""

    starts: list[int]
    stops: list[int]

    def first(self, at: int) -> int:
        """The first interval that ends after `at`."""
        return bisect.bisect_right(self.stops, at)

    def meeting(self, start: int, stop: int) -> range:
        return range(self.first(start), bisect.bisect_left(self.starts, stop))


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Boxes as cells of a grid; not every cell is a box."""

    axes: tuple[_Axis, ...]
    cells: Mapping[tuple[int, ...], int]

    def meeting(self, box: Box) -> Numbers:
        ranges = [axis.meeting(a, b) for axis, a, b in zip(self.axes, box.start, box.stop, strict=True)]
        if math.prod(map(len, ranges)) <= len(self.cells):
            found = [self.cells.get(cell, -1) for cell in itertools.product(*ranges)]
        else:
            found = [row for cell, row in self.cells.items() if _within(cell, ranges)]
        return np.array(sorted(row for row in found if row >= 0), np.int64)


def _within(cell: Sequence[int], ranges: Sequence[range]) -> bool:
    return all(at in meeting for at, meeting in zip(cell, ranges, strict=True))
