"""Shards that the same ones hold, together as a block: there are millions of shards, and few ways to hold them.

Every list of shards cuts the blocks that it meets into what it holds and what it does not.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from emergency_ckpt.core.box_table import Numbers
from emergency_ckpt.core.shard_table import HeldShards


class ShardBlocks:
    """Shards by which of several lists they are in.

    Attributes:
      of: per shard the number of its block; 0 is the block of those in no list.
    """

    def __init__(self, shards: int) -> None:
        """`shards`: how many there are."""
        self.of = np.zeros(shards, np.int64)
        self._parents: list[tuple[int, int]] = [(0, -1)]  # Of each block: the one that it was cut from, a list.

    def divide(self, number: int, shards: Numbers) -> None:
        """Takes in list `number`, which has these shards, each once."""
        here = self.of[shards]
        if not len(here):
            return
        if here[0] == here[-1] and (here == here[0]).all():
            blocks, places = here[:1], np.zeros(len(here), np.int64)
        else:
            blocks, places = np.unique(here, return_inverse=True)
        self.of[shards] = len(self._parents) + places
        self._parents.extend((block, number) for block in blocks.tolist())

    def lists(self, block: int) -> list[int]:
        """The lists that have the shards of a block."""
        found: list[int] = []
        while block:
            block, number = self._parents[block]
            found.append(number)
        return found

    def __len__(self) -> int:
        """How many numbers there are; of some blocks nothing is left."""
        return len(self._parents)


class ShardHolders(Sequence[tuple[int, ...]]):
    """Per shard the processes that hold it, ascending.

    Attributes:
      blocks: per shard the number of its block.
      processes: per block who holds its shards.
    """

    def __init__(self, held: HeldShards, shards: int) -> None:
        """`shards`: how many there are."""
        blocks = ShardBlocks(shards)
        for number, indices in enumerate(held.lists):
            blocks.divide(number, indices)
        numbers = np.flatnonzero(np.bincount(blocks.of, minlength=len(blocks)))
        rank = np.zeros(len(blocks), np.int64)
        rank[numbers] = np.arange(len(numbers))
        self.blocks: Numbers = rank[blocks.of]
        by_list: list[list[int]] = [[] for _ in held.lists]
        for process, kind in enumerate(held.kinds):
            by_list[kind].append(process)
        self.processes = tuple(
            tuple(sorted(process for kind in blocks.lists(block) for process in by_list[kind]))
            for block in numbers.tolist()
        )

    def of_blocks(self) -> Iterator[tuple[tuple[int, ...], Numbers]]:
        """Per block (who holds its shards, its shards ascending)."""
        for number, processes in enumerate(self.processes):
            yield processes, self.shards_of(number)

    def shards_of(self, block: int) -> Numbers:
        """The shards of a block, ascending."""
        return self._in_order[self._ends[block] : self._ends[block + 1]]

    @functools.cached_property
    def _in_order(self) -> Numbers:
        """All shards, block after block."""
        return np.argsort(self.blocks, kind="stable")

    @functools.cached_property
    def _ends(self) -> tuple[int, ...]:
        counts = np.bincount(self.blocks, minlength=len(self.processes)).tolist()
        return (0, *itertools.accumulate(counts))

    def __len__(self) -> int:
        return len(self.blocks)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[int, ...], ...]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self.processes[int(self.blocks[index])]
