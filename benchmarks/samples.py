"""Samples: one number per round and process, and what is made of them.

A job is as slow as its slowest process, so the value of a round is the largest over the processes.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence


@dataclasses.dataclass
class Samples:
    """By contender and measurement, one value per round."""

    values: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)

    def add(self, contender: str, measurement: str, value: float) -> None:
        self.values.setdefault(contender, {}).setdefault(measurement, []).append(value)

    def of(self, contender: str, measurement: str) -> list[float]:
        """The rounds' values; empty where this was not measured."""
        return self.values.get(contender, {}).get(measurement, [])


def joined(jobs: Sequence[Samples]) -> Samples:
    """The samples of one process in several jobs; what was measured in more than one counts as of the first."""
    found = Samples()
    for job in reversed(jobs):
        for contender, measurements in job.values.items():
            found.values.setdefault(contender, {}).update(measurements)
    return found


def slowest(processes: Sequence[Samples]) -> Samples:
    """The job's samples: in each round, the largest value of all processes."""
    job = Samples()
    for contender, measurements in processes[0].values.items():
        for measurement in measurements:
            rounds = zip(*(each.values[contender][measurement] for each in processes), strict=True)
            for values in rounds:
                job.add(contender, measurement, max(values))
    return job


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of some rounds, with the smallest and the largest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        return cls(statistics.median(values), min(values), max(values)) if values else None

    @classmethod
    def of_ratios(cls, above: Sequence[float], below: Sequence[float]) -> Spread | None:
        """Of `above / below` round by round: what slows a whole round down does not count."""
        pairs = zip(above, below, strict=False)
        return cls.of([a / b for a, b in pairs if a > 0 and b > 0])
