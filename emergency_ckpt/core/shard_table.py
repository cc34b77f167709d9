"""The shards of a layout and who holds which, as tables: a job of thousands of processes has millions of them.

To the outside these are plain sequences; leaves that are cut alike share one table of boxes, and processes that
hold the same shards share one list.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import overload

import numpy as np

from emergency_ckpt.core.box_table import BoxTable, Numbers
from emergency_ckpt.core.shards import Shard


class ShardTable(Sequence[Shard]):
    """Every distinct shard, leaf after leaf and ascending by box within each; made into objects when asked for.

    Attributes:
      leaves: names of the leaves that have shards, each once.
      boxes: per leaf its boxes; leaves that are cut alike share one table.
      first: per leaf the index of its first shard, and at the end the number of all.
    """

    def __init__(self, leaves: Iterable[str], boxes: Iterable[BoxTable]) -> None:
        """Raises ValueError where a leaf is named twice."""
        self.leaves = tuple(leaves)
        alike: dict[BoxTable, BoxTable] = {}
        same: dict[int, BoxTable] = {}
        given = tuple(boxes)
        self.boxes = tuple(
            same[id(table)] if id(table) in same else same.setdefault(id(table), alike.setdefault(table, table))
            for table in given
        )
        self.first: tuple[int, ...] = (0, *itertools.accumulate(map(len, self.boxes)))
        self.leaf_number: Mapping[str, int] = {leaf: number for number, leaf in enumerate(self.leaves)}
        if len(self.leaf_number) != len(self.leaves) or len(self.leaves) != len(self.boxes):
            raise ValueError("a leaf appears twice")

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> ShardTable:
        """The table of these shards. Raises ValueError where they do not lie leaf by leaf, boxes ascending."""
        groups = [
            (leaf, BoxTable.of(shard.box for shard in group))
            for leaf, group in itertools.groupby(shards, key=lambda shard: shard.leaf)
        ]
        return cls((leaf for leaf, _ in groups), (table for _, table in groups))

    def find(self, shard: Shard) -> int | None:
        """The index of this very shard."""
        number = self.leaf_number.get(shard.leaf)
        row = None if number is None else self.boxes[number].find(shard.box)
        return None if number is None or row is None else self.first[number] + row

    def named(self, index: int) -> tuple[str, str]:
        """The leaf and the box of a shard, in words; of many shards faster than of their objects."""
        number = bisect.bisect_right(self.first, index) - 1
        return self.leaves[number], self.boxes[number].named(index - self.first[number])

    def numbers_in(self, other: ShardTable) -> Numbers:
        """Per shard its index in another table, -1 where that has no such shard."""
        if self == other:
            return np.arange(len(self))
        found = np.full(len(self), -1, np.int64)
        known: dict[tuple[int, int], Numbers] = {}
        for number, leaf in enumerate(self.leaves):
            place = other.leaf_number.get(leaf)
            if place is None:
                continue
            mine, theirs = self.boxes[number], other.boxes[place]
            rows = known.get((id(mine), id(theirs)))
            if rows is None:
                rows = known[id(mine), id(theirs)] = mine.rows_in(theirs)
            here = found[self.first[number] : self.first[number + 1]]
            np.copyto(here, rows + other.first[place], where=rows >= 0)
        return found

    def __len__(self) -> int:
        return self.first[-1]

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, index: int | slice) -> Shard | tuple[Shard, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        at = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= at < len(self):
            raise IndexError(f"there are {len(self)} shards, not one of index {index}")
        number = bisect.bisect_right(self.first, at) - 1
        return Shard(self.leaves[number], self.boxes[number].box(at - self.first[number]))

    def __iter__(self) -> Iterator[Shard]:
        for leaf, table in zip(self.leaves, self.boxes, strict=True):
            for row in range(len(table)):
                yield Shard(leaf, table.box(row))

    def __contains__(self, value: object) -> bool:
        return isinstance(value, Shard) and self.find(value) is not None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ShardTable):
            return self is other or (self.leaves == other.leaves and self.boxes == other.boxes)
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.leaves, self.first))

    def __repr__(self) -> str:
        return f"ShardTable({len(self)} shards of {len(self.leaves)} leaves)"


class ShardIndex(Mapping[Shard, int]):
    """The index of each shard of a table."""

    def __init__(self, shards: ShardTable) -> None:
        self._shards = shards

    def __getitem__(self, shard: Shard) -> int:
        found = self._shards.find(shard)
        if found is None:
            raise KeyError(shard)
        return found

    def __iter__(self) -> Iterator[Shard]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


class HeldShards(Sequence[tuple[int, ...]]):
    """Per process the ascending indices of its shards; made into tuples when asked for.

    Attributes:
      kinds: per process the number of its list, in the order in which lists appear first.
      lists: the distinct lists.
    """

    def __init__(self, kinds: Iterable[int], lists: Sequence[Numbers]) -> None:
        """`kinds` may number the lists in any way, and some may be equal or in nobody's hands."""
        numbers: dict[bytes, int] = {}
        kept: list[Numbers] = []
        renumbered: dict[int, int] = {}
        for kind in (found := tuple(kinds)):
            if kind not in renumbered:
                held = np.ascontiguousarray(lists[kind])
                number = numbers.setdefault(held.tobytes(), len(numbers))
                if number == len(kept):
                    held.flags.writeable = False
                    kept.append(held)
                renumbered[kind] = number
        self.kinds = tuple(renumbered[kind] for kind in found)
        self.lists = tuple(kept)

    @classmethod
    def of(cls, held: Iterable[Sequence[int]]) -> HeldShards:
        """Of plain lists, one per process. Raises ValueError where one does not ascend."""
        lists = [np.array(tuple(indices), np.int64) for indices in held]
        for indices in lists:
            if (indices[1:] <= indices[:-1]).any():
                raise ValueError("the shards of a process are not an ascending list of indices")
        return cls(range(len(lists)), lists)

    @classmethod
    def of_pairs(cls, kinds: Sequence[int], owners: Numbers, indices: Numbers) -> HeldShards:
        """`owners` has the number of a list for each of `indices`, which ascend within each list."""
        count = max(kinds, default=-1) + 1
        order = np.argsort(owners, kind="stable")
        ends = np.searchsorted(owners[order], np.arange(count + 1))
        by_list = indices[order]
        return cls(kinds, [by_list[a:b] for a, b in itertools.pairwise(ends.tolist())])

    def of_process(self, process: int) -> Numbers:
        """The shards of one process."""
        return self.lists[self.kinds[process]]

    def __len__(self) -> int:
        return len(self.kinds)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[int, ...], ...]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return tuple(self.of_process(index).tolist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, HeldShards):
            alike = self.kinds == other.kinds
            return alike and all(map(np.array_equal, self.lists, other.lists))
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.kinds)

    def __repr__(self) -> str:
        return f"HeldShards({len(self.kinds)} processes, {len(self.lists)} different lists)"
