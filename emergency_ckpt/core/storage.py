"""What slots hold, as against what devices hold. All layouts here have the same shards.

A process needs at a restore whatever its devices or its slot are to hold, and may vouch for what both hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from emergency_ckpt.core.box_table import Numbers
from emergency_ckpt.core.copies import with_copies
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.shard_table import HeldShards
from emergency_ckpt.core.spread import spread


def storage_layout(devices: Layout, copies: int, spreads: bool) -> Layout:
    """What the slots hold of a state that devices hold as `devices` says; the same object where it is the same.

    Args:
      copies: in how many failure domains each shard lies at least.
      spreads: in no more slices than that either, so that slices share what all of them hold by nature.

    Raises ConfigError where there are fewer failure domains than copies.
    """
    return with_copies(spread(devices, copies) if spreads else devices, copies)


def either(one: Layout, other: Layout) -> Layout:
    """Each process holds what it does in any of two layouts. One of them itself, where that is it."""
    return _combined(one, other, np.union1d)


def both(one: Layout, other: Layout) -> Layout:
    """Each process holds what it does in both of two layouts. One of them itself, where that is it."""
    return _combined(one, other, lambda a, b: np.intersect1d(a, b, assume_unique=True))


def _combined(one: Layout, other: Layout, combine: Callable[[Numbers, Numbers], Numbers]) -> Layout:
    if one is other:
        return one
    known: dict[tuple[int, int], Numbers] = {}
    for kinds in zip(one.held.kinds, other.held.kinds, strict=True):
        if kinds not in known:
            known[kinds] = combine(one.held.lists[kinds[0]], other.held.lists[kinds[1]])
    numbers = {kinds: number for number, kinds in enumerate(known)}
    pairs = zip(one.held.kinds, other.held.kinds, strict=True)
    held = HeldShards([numbers[kinds] for kinds in pairs], list(known.values()))
    for layout in (one, other):
        if held == layout.held:
            return layout
    return dataclasses.replace(one, process_shards=held)
