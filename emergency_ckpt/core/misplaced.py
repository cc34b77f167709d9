"""Hosts that hold, whole, what other hosts need, and need what they do not hold: they changed places.

What travels for that alone is said, because another order of the mesh would save it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from emergency_ckpt.core.plan_words import processes_named
from emergency_ckpt.core.restore_plan import ProcessPlan
from emergency_ckpt.core.survivors import Survivors
from emergency_ckpt.core.universe import Universe


@dataclasses.dataclass(frozen=True)
class Misplaced:
    """Processes that fetch what another order of hosts would have given them, ascending, and how many bytes."""

    processes: tuple[int, ...]
    nbytes: int

    def describe(self) -> str:
        return (
            f"{processes_named(self.processes)} fetch {self.nbytes} bytes only because hosts have changed "
            "places since the save: the shards that they need lie whole on others that need different ones. "
            "emergency_ckpt.arrange_mesh, called on the mesh before it is used, lets hosts stand where their "
            "shards are (whole slices; with move_hosts=True the hosts within them, too)"
        )


def find_misplaced(universe: Universe, survivors: Survivors, plans: Sequence[ProcessPlan]) -> Misplaced | None:
    """What of a plan another order would save; None where that is nothing. `plans`: per process, its part."""
    lists, wanted = universe.wanted.held.lists, universe.wanted.held.kinds
    holds: dict[int, set[int]] = collections.defaultdict(set)
    for process, slots in survivors.of_process.items():
        for number, _ in slots:
            kind = survivors.kinds[number]
            if kind.shards < len(lists) and len(kind.good) == len(lists[kind.shards]):
                holds[process].add(kind.shards)
    # Hosts that stand right keep what they have; the others can give theirs to one place each.
    spare = collections.Counter(
        min(kinds) for process, kinds in holds.items() if kinds and wanted[process] not in kinds
    )
    found: dict[int, int] = {}
    sizes = {h: each.shard_nbytes for h, each in zip(universe.hashes, universe.layouts, strict=True)}
    for process, kind in enumerate(wanted):
        if kind in holds.get(process, ()) or not spare[kind]:
            continue
        others = [take for take in plans[process].takes if take.process != process]
        nbytes = sum(sizes[take.layout][shard] for take in others for shard in take.shards)
        spare[kind] -= 1
        found[process] = nbytes
    total = sum(found.values())
    return Misplaced(tuple(p for p, nbytes in found.items() if nbytes), total) if total else None
