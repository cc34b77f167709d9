"""Who uploads which shard: every shard once, by a live holder, balanced by bytes.

Deterministic, so that all processes derive the same plan from the same layout and the same set of live holders.
Shards with the same live holders are handed out together, and where sizes and loads are alike, worked out once.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Collection, Sequence

import numpy as np

from emergency_ckpt.core.box_table import Numbers
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.shard_table import HeldShards


@dataclasses.dataclass(frozen=True, slots=True)
class UploadPlan:
    """The decision and why.

    Attributes:
      shards: per process index, the ascending indices into `Layout.shards` that it uploads; None when some
        shard has no live holder, so that no complete upload exists.
      missing: the shards without a live holder.
      reason: one sentence for a person.
    """

    shards: Sequence[tuple[int, ...]] | None
    missing: tuple[int, ...]
    reason: str


def assign_uploads(layout: Layout, holders: Collection[int], leaving: Collection[int] = ()) -> UploadPlan:
    """Spreads the shards of `layout` over the processes `holders`, which hold what the layout says.

    Shards that fewest processes can upload come first, and among those the largest; each goes to the least
    loaded of them. Replicas make every slice take part. Those that are `leaving` upload what no other holder
    has, and nothing else.
    """
    live = {process for process in holders if 0 <= process < layout.process_count}
    staying = live.difference(leaving)
    by_uploaders: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
    for block, held_by in enumerate(layout.shard_holders.processes):
        able = tuple(process for process in held_by if process in live)
        by_uploaders[tuple(process for process in able if process in staying) or able].append(block)
    missing: list[int] = _shards_of(layout, by_uploaders.pop((), [])).tolist()
    if missing:
        named = ", ".join(str(layout.shards[i]) for i in missing[:3])
        return UploadPlan(
            None,
            tuple(missing),
            f"{len(missing)} of {len(layout.shards)} shards have no live holder among {len(set(holders))}"
            f" processes (first: {named})",
        )
    loads = np.zeros((layout.process_count, 2), np.int64)  # Bytes and shards.
    owners = np.empty(len(layout.shards), np.int64)
    known: dict[tuple[bytes, bytes], Numbers] = {}
    for uploaders, blocks in sorted(by_uploaders.items(), key=lambda item: (len(item[0]), item[0])):
        shards = _shards_of(layout, blocks)
        shards = shards[np.argsort(-layout.shard_sizes[shards], kind="stable")]
        sizes, among = layout.shard_sizes[shards], np.array(uploaders, np.int64)
        before = loads[among] - loads[among].min(axis=0)
        key = sizes.tobytes(), before.tobytes()
        if key not in known:
            known[key] = _spread(sizes, before)
        places = known[key]
        owners[shards] = among[places]
        np.add.at(loads[:, 0], owners[shards], sizes)
        np.add.at(loads[:, 1], owners[shards], 1)
    used = loads[sorted(live), 0].tolist()
    return UploadPlan(
        HeldShards.of_pairs(range(layout.process_count), owners, np.arange(len(owners))),
        (),
        f"{len(layout.shards)} shards, {sum(used)} bytes over {len(used)} processes,"
        f" {min(used, default=0)} to {max(used, default=0)} bytes each",
    )


def _shards_of(layout: Layout, blocks: Sequence[int]) -> Numbers:
    """The shards of these blocks, ascending."""
    parts = [layout.shard_holders.shards_of(block) for block in blocks]
    return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)


def _spread(sizes: Numbers, loads: Numbers) -> Numbers:
    """Per size, in this order, the place of whoever has least so far.

    `loads`: int64[places, (bytes, shards)].
    """
    if len(loads) == 1:
        return np.zeros(len(sizes), np.int64)
    heap = [(nbytes, shards, place) for place, (nbytes, shards) in enumerate(loads.tolist())]
    heapq.heapify(heap)
    places: list[int] = []
    for size in sizes.tolist():
        nbytes, shards, place = heap[0]
        places.append(place)
        heapq.heapreplace(heap, (nbytes + size, shards + 1, place))
    return np.array(places, np.int64)
