"""Boxes covered by boxes of another cut: which saved shards hold, together, every element of a wanted one.

A grid of cut points is bisected, and leaves that are cut alike, with the same survivors, are worked out once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from emergency_ckpt.core.box_table import BoxTable, Numbers
from emergency_ckpt.core.shards import Box, covers
from emergency_ckpt.core.universe import Universe, distinct, joined

Flags: TypeAlias = npt.NDArray[np.bool_]
Saved: TypeAlias = tuple[BoxTable, Flags]
"""The boxes into which a leaf is cut in one layout, and which of them somebody holds."""


@dataclasses.dataclass(frozen=True)
class Cover:
    """Per shard of `wanted` (ascending), whether it is covered, and by what.

    `sources[first[i]:first[i + 1]]` are the universe numbers of the shards that cover `wanted[i]`.
    """

    wanted: Numbers
    covered: Flags
    first: Numbers
    sources: Numbers

    def of(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """Of these shards, all of them among `wanted`: all sources, each once and ascending; who has none."""
        places = self._place[numbers]
        counts = self.first[places + 1] - self.first[places]
        behind = np.repeat(self.first[places] - np.cumsum(counts) + counts, counts)
        sources = distinct(self.sources[behind + np.arange(len(behind))])
        return sources, numbers[~self.covered[places]]

    @functools.cached_property
    def _place(self) -> Numbers:
        """Per number where it stands in `wanted`. (Bisecting takes far longer where that is long.)"""
        place = np.zeros(int(self.wanted[-1]) + 1 if len(self.wanted) else 0, np.int64)
        place[self.wanted] = np.arange(len(self.wanted))
        return place


def find_cover(universe: Universe, wanted: Numbers, available: Flags) -> Cover:
    """Covers wanted shards, none of which is available as it is, by shards that are.

    Args:
      wanted: indices of the wanted layout's shards, ascending.
      available: per shard of the universe, whether somebody holds it.
    """
    table = universe.wanted.table
    ends = np.searchsorted(wanted, table.first).tolist()
    known: dict[tuple[object, ...], _Pattern] = {}
    counts: list[Numbers] = []
    covered: list[Flags] = []
    sources: list[Numbers] = []
    for leaf, (name, boxes) in enumerate(zip(table.leaves, table.boxes, strict=True)):
        rows = wanted[ends[leaf] : ends[leaf + 1]] - table.first[leaf]
        if not len(rows):
            continue
        # A shard of its own grid is covered by no other shards of that.
        tables = [each for each in universe.tables(name) if each[0] or not boxes.is_grid]
        numbers = [universe.numbers[layout][first : first + len(saved)] for layout, saved, first in tables]
        saved_boxes = [(each[1], available[of]) for each, of in zip(tables, numbers, strict=True)]
        key = id(boxes), rows.tobytes(), tuple((id(saved), flags.tobytes()) for saved, flags in saved_boxes)
        if key not in known:
            known[key] = _Pattern.of([cover_of(boxes.box(row), saved_boxes) for row in rows.tolist()])
        pattern = known[key]
        counts.append(pattern.counts)
        covered.append(pattern.covered)
        if numbers:
            starts = np.cumsum([0, *map(len, numbers)])
            sources.append(joined(numbers)[starts[pattern.tables] + pattern.rows])
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(joined(counts))])
    none = np.zeros(0, np.bool_)
    return Cover(wanted, np.concatenate([none, *covered]), first, joined(sources))


@dataclasses.dataclass(frozen=True, eq=False)
class _Pattern:
    """How the boxes of one leaf are covered: of each whether, by how many, and those by table and row."""

    covered: Flags
    counts: Numbers
    tables: Numbers
    rows: Numbers

    @classmethod
    def of(cls, found: Sequence[list[tuple[int, int]] | None]) -> _Pattern:
        parts = [part for each in found for part in each or ()]
        return cls(
            np.array([each is not None for each in found], np.bool_),
            np.array([len(each or ()) for each in found], np.int64),
            np.array([table for table, _ in parts], np.int64),
            np.array([row for _, row in parts], np.int64),
        )


def cover_of(wanted: Box, saved: Sequence[Saved]) -> list[tuple[int, int]] | None:
    """Which boxes, as (index into `saved`, row there), cover a box; None where some element is nowhere.

    All of one cut where one is enough, the one of the fewest elements; none that is not needed.
    """
    if not wanted.size:
        return []
    if not any(flags.any() for _, flags in saved):
        return None
    meeting = [rows[flags[rows]] for (table, flags) in saved for rows in (table.meeting(wanted),)]
    best: tuple[int, list[tuple[int, int]]] | None = None
    for at, ((table, _), rows) in enumerate(zip(saved, meeting, strict=True)):
        chosen = _of_one(wanted, table, rows)
        if chosen is not None:
            elements = int(table.sizes[np.array(chosen, np.int64)].sum())
            if best is None or elements < best[0]:
                best = elements, [(at, row) for row in chosen]
    if best is not None:
        return best[1]
    every = [(at, row) for at, rows in enumerate(meeting) for row in rows.tolist()]
    return _needed(wanted, every, [saved[at][0].box(row) for at, row in every])


def _of_one(wanted: Box, table: BoxTable, rows: Numbers) -> list[int] | None:
    """The needed ones of these rows, all of which meet the box; None where they do not cover it."""
    if not table.is_grid:
        every = [(0, row) for row in rows.tolist()]
        chosen = _needed(wanted, every, [table.box(row) for _, row in every])
        return None if chosen is None else [row for _, row in chosen]
    starts = np.maximum(table.rows[rows, : table.dimensions], np.array(wanted.start, np.int64))
    stops = np.minimum(table.rows[rows, table.dimensions :], np.array(wanted.stop, np.int64))
    return rows.tolist() if int((stops - starts).prod(axis=1).sum()) == wanted.size else None


def _needed(
    wanted: Box, names: Sequence[tuple[int, int]], boxes: Sequence[Box]
) -> list[tuple[int, int]] | None:
    """A set of these boxes that covers `wanted` and none of which can be left out; None where all do not."""
    if not covers(boxes, wanted):
        return None
    common = {name: wanted.intersect(box) or wanted for name, box in zip(names, boxes, strict=True)}
    kept = dict(sorted(zip(names, boxes, strict=True), key=lambda item: (common[item[0]].size, item[0])))
    for name in tuple(kept):
        less = {other: box for other, box in kept.items() if other != name}
        if covers(tuple(less.values()), wanted):
            kept = less
    return sorted(kept)
