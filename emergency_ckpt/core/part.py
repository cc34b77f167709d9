"""A part of a layout: the leaves that one restore is about, all of them or some.

Where a part lies in a slot follows from the layout, so that every process knows which bytes the others need.
"""

from __future__ import annotations

import dataclasses
import functools

from emergency_ckpt.core.layout import Layout, LeafSpec, SlotEntry


@dataclasses.dataclass(frozen=True)
class Part:
    """Some leaves of a layout, by name; `names` None stands for all."""

    layout: Layout
    names: frozenset[str] | None = None

    @property
    def is_whole(self) -> bool:
        return self.names is None

    @functools.cached_property
    def leaves(self) -> tuple[LeafSpec, ...]:
        """The array leaves."""
        return tuple(leaf for leaf in self.layout.leaves if self._has(leaf.name))

    @functools.cached_property
    def value_leaves(self) -> frozenset[str]:
        """Names of the leaves that are not arrays."""
        return frozenset(filter(self._has, self.layout.value_leaves))

    def entries(self, process: int) -> tuple[SlotEntry, ...]:
        """Where the shards of this part lie in the slot of `process`."""
        shards = self.layout.shards
        return tuple(e for e in self.layout.slot_entries(process) if self._has(shards[e.shard].leaf))

    def ranges(self, process: int) -> tuple[tuple[int, int], ...]:
        """The same as (offset, length) of runs of bytes, neighbours joined."""
        wanted = set(self.entries(process))
        runs: list[tuple[int, int]] = []
        joins = False
        for entry in self.layout.slot_entries(process):
            if not entry.nbytes and entry not in wanted:
                continue  # It has no byte that could lie between its neighbours.
            if entry in wanted and joins:
                runs[-1] = runs[-1][0], entry.offset + entry.nbytes - runs[-1][0]
            elif entry in wanted:
                runs.append((entry.offset, entry.nbytes))
            joins = entry in wanted
        return tuple(runs)

    def _has(self, name: str) -> bool:
        return self.names is None or name in self.names
