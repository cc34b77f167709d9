"""How often what fails: rates by kind, the mean time between failures of a job, and made-up traces of failures.

Failures come independently of each other and of time (Poisson). That holds well for large jobs and badly for
small ones, where lemons dominate: Kokolis et al. project 1.8 h for 16,384 GPUs from 6.5 failures per 1,000
node-days, and measured 7.9 h with 1,024 where the same rate says 28.8 h.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping

import numpy as np

from emergency_ckpt.core.forecast.job_shape import JobShape
from emergency_ckpt.errors import ConfigError

HOUR = 3600.0
LEAST_HOURS = 0.001
"""What fails more often than every few seconds never runs."""

_LLAMA_HOST_HOURS = 2048 * 54 * 24 / 419
_LLAMA_HARDWARE = 0.78


class Kind(enum.StrEnum):
    """What fails, and with it which ramdisks."""

    PROCESS = "process"  # A trainer dies; ramdisks stay.
    HOST = "host"  # With its ramdisk.
    SLICE = "slice"  # All hosts of a slice with their ramdisks.
    JOB = "job"  # All ramdisks.


@dataclasses.dataclass(frozen=True, slots=True)
class FailureModel:
    """Mean hours between failures: of one host in its trainer, of one host, of one slice, of all at once.

    The defaults of hosts and processes are those of Llama 3's pre-training (arXiv:2407.21783, table 5): 419
    unexpected interruptions in 54 days on 16,384 GPUs, eight to a host, 78 % of them of hardware. Those of
    slices and jobs are guesses: once a year, and once a month (a cluster upgrade, a move to other machines).
    """

    process_hours: float = _LLAMA_HOST_HOURS / (1 - _LLAMA_HARDWARE)
    host_hours: float = _LLAMA_HOST_HOURS / _LLAMA_HARDWARE
    slice_hours: float = 8760.0
    job_hours: float = 720.0

    def __post_init__(self) -> None:
        for name in ("process_hours", "host_hours", "slice_hours", "job_hours"):
            if not getattr(self, name) >= LEAST_HOURS:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; hours between failures are {LEAST_HOURS} or more, or inf"
                )
        if not any(math.isfinite(hours) for hours in dataclasses.astuple(self)):
            raise ConfigError("nothing ever fails: give one mean time between failures that is finite")

    def rates(self, shape: JobShape) -> Mapping[Kind, float]:
        """Failures per second of the whole job, by kind."""
        return {
            Kind.PROCESS: shape.hosts / (self.process_hours * HOUR),
            Kind.HOST: shape.hosts / (self.host_hours * HOUR),
            Kind.SLICE: shape.slices / (self.slice_hours * HOUR),
            Kind.JOB: 1 / (self.job_hours * HOUR),
        }

    def mean_seconds(self, shape: JobShape) -> float:
        """The mean time between failures of the job."""
        return 1 / sum(self.rates(shape).values())

    def share(self, shape: JobShape, of_kind: Mapping[Kind, float]) -> float:
        """The mean of a number per kind over all failures."""
        rates = self.rates(shape)
        return sum(rate * of_kind[kind] for kind, rate in rates.items()) / sum(rates.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """When what failed; `place` is the host, or the slice (0 where all fail)."""

    seconds: float
    kind: Kind
    place: int


def failure_trace(
    model: FailureModel, shape: JobShape, seconds: float, random: np.random.Generator
) -> tuple[Failure, ...]:
    """What fails in so many seconds, whatever the job does meanwhile; ascending in time."""
    found: list[Failure] = []
    places = {Kind.PROCESS: shape.hosts, Kind.HOST: shape.hosts, Kind.SLICE: shape.slices, Kind.JOB: 1}
    for kind, rate in model.rates(shape).items():
        count = int(random.poisson(rate * seconds))
        times = random.uniform(0, seconds, count).tolist()
        where = random.integers(0, places[kind], count).tolist()
        found += (Failure(t, kind, p) for t, p in zip(times, where, strict=True))
    return tuple(sorted(found, key=lambda failure: failure.seconds))


def hosts_lost(failure: Failure, shape: JobShape) -> Iterable[int]:
    """The hosts whose ramdisks a failure takes."""
    if failure.kind is Kind.HOST:
        return (failure.place,)
    if failure.kind is Kind.SLICE:
        return shape.hosts_of(failure.place)
    return range(shape.hosts) if failure.kind is Kind.JOB else ()
