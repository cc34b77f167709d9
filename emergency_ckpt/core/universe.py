"""Shards of several layouts of one state under one numbering, so that equal shards are one shard.

The wanted layout's shards keep their indices; those that only other layouts have follow, layout after layout.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from emergency_ckpt.core.box_table import BoxTable, Numbers
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.shards import Shard


class Universe:
    """All shards of some layouts with the same leaves; `layouts[0]` is the wanted one.

    Attributes:
      layouts: the layouts.
      hashes: their hashes.
      numbers: per layout, the number of each of its shards.
    """

    def __init__(self, wanted: Layout, others: Mapping[str, Layout]) -> None:
        """`others` by hash."""
        self.hashes = (wanted.hash, *sorted(h for h in others if h != wanted.hash))
        self.layouts = (wanted, *(others[h] for h in self.hashes[1:]))
        self._first = [0, len(wanted.shards)]  # Per layout the first number that it brings, and the end.
        self._fresh: list[Numbers] = [np.arange(len(wanted.shards))]  # Per layout the shards that it brings.
        self.numbers: list[Numbers] = [self._fresh[0]]
        for layout in self.layouts[1:]:
            self._add(layout)

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def wanted(self) -> Layout:
        return self.layouts[0]

    def shard(self, number: int) -> Shard:
        layout = bisect.bisect_right(self._first, number) - 1
        return self.layouts[layout].shards[int(self._fresh[layout][number - self._first[layout]])]

    @functools.cached_property
    def nbytes(self) -> Numbers:
        """Bytes of each shard."""
        parts = zip(self.layouts, self._fresh, strict=True)
        return np.concatenate([layout.shard_sizes[fresh] for layout, fresh in parts])

    def indices(self, layout: int, numbers: Numbers) -> Numbers:
        """The shards of these numbers as indices of a layout, which has them all, ascending."""
        if layout == 0:
            return numbers
        found = self._indices.get(layout)
        if found is None:
            found = self._indices[layout] = np.zeros(len(self), np.int64)
            found[self.numbers[layout]] = np.arange(len(self.numbers[layout]))
        return np.sort(found[numbers])

    def ordered(self, layout: int, position: int) -> tuple[Numbers, Numbers]:
        """The numbers of the shards of a slot, ascending, and their indices in the layout in the same order."""
        indices = self.layouts[layout].held.of_process(position)
        if layout == 0:
            return indices, indices
        key = layout, self.layouts[layout].held.kinds[position]
        if key not in self._ordered:
            numbers = self.numbers[layout][indices]
            order = numbers.argsort()
            self._ordered[key] = numbers[order], indices[order]
        return self._ordered[key]

    def set_number(self, layout: int, position: int) -> int:
        """Equal for slots of equal shards; among those of the wanted layout the number of the list there."""
        kind = self.layouts[layout].held.kinds[position]
        if layout == 0:
            return kind
        found = self._set_numbers.get((layout, kind))
        if found is None:
            key = self.ordered(layout, position)[0].tobytes()
            found = self._sets.setdefault(key, len(self._sets))
            self._set_numbers[layout, kind] = found
        return found

    def tables(self, leaf: str) -> list[tuple[int, BoxTable, int]]:
        """The ways in which a leaf is cut: number of the layout, boxes, index of the first shard there."""
        found: list[tuple[int, BoxTable, int]] = []
        for number, layout in enumerate(self.layouts):
            place = layout.table.leaf_number.get(leaf)
            if place is not None:
                found.append((number, layout.table.boxes[place], layout.table.first[place]))
        return found

    @functools.cached_property
    def _sets(self) -> dict[bytes, int]:
        return {held.tobytes(): kind for kind, held in enumerate(self.wanted.held.lists)}

    @functools.cached_property
    def _set_numbers(self) -> dict[tuple[int, int], int]:
        return {}

    @functools.cached_property
    def _ordered(self) -> dict[tuple[int, int], tuple[Numbers, Numbers]]:
        return {}

    @functools.cached_property
    def _indices(self) -> dict[int, Numbers]:
        """By layout, per shard its index there."""
        return {}

    def _add(self, layout: Layout) -> None:
        numbers = layout.table.numbers_in(self.wanted.table)
        for earlier, known in zip(self.layouts[1:], self.numbers[1:], strict=False):
            places = layout.table.numbers_in(earlier.table)
            there = (numbers < 0) & (places >= 0)
            numbers[there] = known[places[there]]
        fresh = np.flatnonzero(numbers < 0)
        numbers[fresh] = self._first[-1] + np.arange(len(fresh))
        self._first.append(self._first[-1] + len(fresh))
        self._fresh.append(fresh)
        self.numbers.append(numbers)


def without(numbers: Numbers, others: Numbers) -> Numbers:
    """`numbers`, less those that are among `others` as well; both ascend."""
    return numbers[~among(numbers, others)]


def among(numbers: Numbers, others: Numbers) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of `numbers` are among `others`, which ascend."""
    if not len(others):
        return np.zeros(len(numbers), np.bool_)
    places = np.minimum(np.searchsorted(others, numbers), len(others) - 1)
    return others[places] == numbers


def joined(arrays: Sequence[Numbers]) -> Numbers:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)


def distinct(numbers: Numbers) -> Numbers:
    """Ascending, each once. (numpy's own goes through a hash table, which is slower here.)"""
    ordered = np.sort(numbers)
    return ordered[np.concatenate([np.ones(min(1, len(ordered)), np.bool_), ordered[1:] != ordered[:-1]])]
