"""Who uploads which shard: every shard once, by a live holder, balanced by bytes.

Deterministic, so that all processes derive the same plan from the same layout and the same set of live holders.
Time grows with the number of (holder, shard) pairs, which is the size of the layout itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

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


def assign_uploads(layout: Layout, holders: Collection[int]) -> UploadPlan:
    """Spreads the shards of `layout` over the processes `holders`, which hold what the layout says.

    Largest shards first, each to its least loaded live holder; replicas make every slice take part.
    """
    live = set(holders)
    loads = [(0, 0)] * layout.process_count
    assigned: list[list[int]] = [[] for _ in range(layout.process_count)]
    missing: list[int] = []
    nbytes = layout.shard_nbytes
    for shard in sorted(range(len(layout.shards)), key=lambda i: (-nbytes[i], i)):
        candidates = [p for p in layout.shard_holders[shard] if p in live]
        if not candidates:
            missing.append(shard)
            continue
        process = min(candidates, key=lambda p: loads[p])
        assigned[process].append(shard)
        loads[process] = (loads[process][0] + nbytes[shard], loads[process][1] + 1)
    if missing:
        named = ", ".join(str(layout.shards[i]) for i in sorted(missing)[:3])
        return UploadPlan(
            None,
            tuple(sorted(missing)),
            f"{len(missing)} of {len(layout.shards)} shards have no live holder among {len(live)} processes"
            f" (first: {named})",
        )
    used = [loads[p][0] for p in sorted(live) if p < layout.process_count]
    return UploadPlan(
        tuple(tuple(sorted(shards)) for shards in assigned),
        (),
        f"{len(layout.shards)} shards, {sum(used)} bytes over {len(used)} processes,"
        f" {min(used, default=0)} to {max(used, default=0)} bytes each",
    )
