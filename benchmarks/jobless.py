"""The sections that need no job: fetches between agents, and the planning of restores.

They have commands of their own, `benchmarks.fetching` and `benchmarks.planning`, with more to choose from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import fetching, planning
from benchmarks.plan import MIB
from benchmarks.samples import Samples
from benchmarks.targets import BARE, FETCH, FETCH_STREAMS, OURS, fetch_measurement

_LEAVES = 1000
_MOST_FETCHED_MIB = 256


@dataclasses.dataclass(frozen=True)
class Jobless:
    """What was measured of fetches and plans; empty where that was not asked for."""

    fetches: Sequence[fetching.Figures] = ()
    plans: Sequence[planning.Figure] = ()

    def add_to(self, samples: Samples) -> None:
        """Adds what targets are judged by."""
        for each in self.fetches:
            name = fetch_measurement(each.shards, each.streams)
            for contender, way in ((FETCH, fetching.OURS), (BARE, fetching.BARE)):
                for seconds in each.seconds(way):
                    samples.add(contender, name, seconds)
        if self.plans:
            samples.add(OURS, "plan_seconds", max(each.seconds for each in self.plans))
            samples.add(OURS, "plan_bytes", max(each.mib for each in self.plans) * MIB)

    def tables(self) -> list[Table]:
        """For people."""
        fetches = [fetching.as_table(self.fetches)] if self.fetches else []
        return fetches + ([planning.as_table(self.plans)] if self.plans else [])

    def to_json(self) -> dict[str, Any]:
        return {
            "fetches": [each.to_json() for each in self.fetches],
            "plans": [each.to_json() for each in self.plans],
        }


def measure(
    sections: Sequence[str],
    directory: Path,
    size_mib: int,
    rounds: int,
    processes: Sequence[int],
    say: Callable[[str], None],
) -> Jobless:
    """Those of the two sections that are wanted. `processes`: the sizes of jobs that are planned for."""
    fetches: list[fetching.Figures] = []
    plans: list[planning.Figure] = []
    if "fetch" in sections:
        for shards in fetching.SHARD_BYTES:
            say(f"fetch, shards of {shards}")
            size = min(size_mib, _MOST_FETCHED_MIB)
            fetches += fetching.measure_all(directory, size, rounds, FETCH_STREAMS, [shards])
    if "plan" in sections:
        for count in processes:
            say(f"plan, {count} processes")
            plans += planning.measure_all([count], _LEAVES)
    return Jobless(fetches, plans)
