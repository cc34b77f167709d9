"""Who uploads which shard: every shard once, by a live holder, balanced by bytes.

Deterministic, so that all processes derive the same plan from the same layout and the same set of live holders.
Time is near-linear in the layout: shards with the same holders share one heap of loads.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection, Sequence
from typing import NamedTuple

from emergency_ckpt.core.layout import Layout


@dataclasses.dataclass(frozen=True, slots=True)
class UploadPlan:
    """The decision and why.

    Attributes:
      shards: per process index, the ascending indices into `Layout.shards` that it uploads; None when some
        shard has no live holder, so that no complete upload exists.
      missing: the shards without a live holder.
      reason: one sentence for a person.
    """

    shards: tuple[tuple[int, ...], ...] | None
    missing: tuple[int, ...]
    reason: str


class _Load(NamedTuple):
    """What a process has to upload so far; the order is that in which processes are chosen."""

    nbytes: int
    shards: int
    process: int


def assign_uploads(layout: Layout, holders: Collection[int]) -> UploadPlan:
    """Spreads the shards of `layout` over the processes `holders`, which hold what the layout says.

    Largest shards first, each to its least loaded live holder; replicas make every slice take part.
    """
    live = set(holders)
    loads = [_Load(0, 0, process) for process in range(layout.process_count)]
    heaps: dict[tuple[int, ...], list[_Load]] = {}
    assigned: list[list[int]] = [[] for _ in loads]
    missing: list[int] = []
    nbytes = layout.shard_nbytes
    for shard in sorted(range(len(layout.shards)), key=lambda i: (-nbytes[i], i)):
        held_by = layout.shard_holders[shard]
        if held_by not in heaps:
            heaps[held_by] = [loads[p] for p in held_by if p in live]
            heapq.heapify(heaps[held_by])
        least = _least(heaps[held_by], loads)
        if least is None:
            missing.append(shard)
            continue
        assigned[least.process].append(shard)
        loads[least.process] = _Load(least.nbytes + nbytes[shard], least.shards + 1, least.process)
    if missing:
        named = ", ".join(str(layout.shards[i]) for i in sorted(missing)[:3])
        return UploadPlan(
            None,
            tuple(sorted(missing)),
            f"{len(missing)} of {len(layout.shards)} shards have no live holder among {len(live)} processes"
            f" (first: {named})",
        )
    used = [loads[p].nbytes for p in sorted(live) if p < layout.process_count]
    return UploadPlan(
        tuple(tuple(sorted(shards)) for shards in assigned),
        (),
        f"{len(layout.shards)} shards, {sum(used)} bytes over {len(used)} processes,"
        f" {min(used, default=0)} to {max(used, default=0)} bytes each",
    )


def _least(heap: list[_Load], loads: Sequence[_Load]) -> _Load | None:
    """The least loaded process of a heap whose entries may be out of date: loads only grow, so the top is
    right once it is up to date."""
    while heap and heap[0] != loads[heap[0].process]:
        heapq.heapreplace(heap, loads[heap[0].process])
    return heap[0] if heap else None
