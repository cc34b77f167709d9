"""What this package is to reach beside Orbax and a bare copy, and what a run measured of it.

Ratios are taken round by round. A target is judged by the median of the steady state; the first use, with
memory that nobody has touched, is shown beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.plan import MIB
from benchmarks.samples import Samples, Spread

OURS, ORBAX, MEMCPY, NO_SAVES = "emergency_ckpt", "orbax", "memcpy", "no_saves"
FETCH, BARE = "fetch", "bare copy"
FETCH_STREAMS = (1, 2, 4, 8)
LENGTHENING = "loop_lengthening_seconds"

_Measured = Callable[[Samples], Spread | None]


@dataclasses.dataclass(frozen=True)
class Target:
    """One figure to reach: at least `limit`, or at most where `at_most` says so.

    Attributes:
      unit: what the figures are shown in, and how many of their own units that is.
      steady, first: how they follow from a job's samples.
    """

    title: str
    limit: float
    steady: _Measured
    first: _Measured | None = None
    at_most: bool = False
    unit: tuple[str, float] = ("x", 1.0)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A target and what was measured of it; `reached` is None where nothing was."""

    target: Target
    steady: Spread | None
    first: Spread | None

    @property
    def reached(self) -> bool | None:
        if self.steady is None:
            return None
        found, limit = self.steady.median, self.target.limit
        return found <= limit if self.target.at_most else found >= limit


def judge(job: Samples) -> list[Judged]:
    """All targets against the samples of a job."""
    return [Judged(t, t.steady(job), t.first(job) if t.first else None) for t in TARGETS]


def _over(contender: str, theirs: str, ours: str) -> _Measured:
    """How many times as long the other one takes."""
    return lambda job: Spread.of_ratios(job.of(contender, theirs), job.of(OURS, ours))


def _ours(measurement: str) -> _Measured:
    return lambda job: Spread.of(job.of(OURS, measurement))


def _fetch(shards: str, streams: int) -> Target:
    name = fetch_measurement(shards, streams)
    return Target(
        f"fetch from another agent, {shards} shards, {streams} streams: part of the speed of a bare copy",
        0.8,
        lambda job: Spread.of_ratios(job.of(BARE, name), job.of(FETCH, name)),
    )


def fetch_measurement(shards: str, streams: int) -> str:
    """The name under which samples of the section fetch are kept."""
    return f"{shards} on {streams} streams, seconds"


TARGETS = (
    Target(
        "local save, call to sealed: times as fast as Orbax",
        15,
        _over(ORBAX, "save_sealed_seconds", "save_sealed_seconds"),
        _over(ORBAX, "first_save_sealed_seconds", "first_save_sealed_seconds"),
    ),
    Target(
        "local save, call to sealed, checksums included: part of the speed of a bare memcpy",
        0.6,
        _over(MEMCPY, "copy_seconds", "save_sealed_seconds"),
        _over(MEMCPY, "first_copy_seconds", "first_save_sealed_seconds"),
    ),
    Target(
        "restore from the own slot: times as fast as Orbax",
        5,
        _over(ORBAX, "restore_seconds", "restore_seconds"),
        _over(ORBAX, "first_restore_seconds", "first_restore_seconds"),
    ),
    Target("a step with nothing due", 20e-6, _ours("idle_call_seconds"), at_most=True, unit=("µs", 1e6)),
    Target(
        "train loop that saves at every step: Orbax makes it longer by so many times as much",
        5,
        _over(ORBAX, LENGTHENING, LENGTHENING),
    ),
    Target(
        "blocked per call, once the step is done",
        5e-3,
        _ours("save_blocked_seconds"),
        _ours("first_save_blocked_seconds"),
        at_most=True,
        unit=("ms", 1e3),
    ),
    Target(
        # Python's table of interned strings takes a step of 2 MiB once; a leak of 450 bytes per save shows.
        "growth of private memory from the first tenth of many saves to the last",
        4 * MIB,
        _ours("memory_growth_bytes"),
        at_most=True,
        unit=("MiB", 1 / MIB),
    ),
    Target(
        "bytes over the network in a restart in which nothing was lost",
        0,
        _ours("intact_fetched_bytes"),
        at_most=True,
        unit=("B", 1.0),
    ),
    Target(
        "bytes over the network beside the lost slice's, one of two being lost",
        0,
        _ours("slice_lost_fetched_beside_bytes"),
        at_most=True,
        unit=("B", 1.0),
    ),
    *(_fetch(shards, streams) for shards in ("64 MiB", "100 kB") for streams in FETCH_STREAMS),
    Target(
        "planning of a restore, same and other job shapes: the slowest plan",
        2,
        _ours("plan_seconds"),
        at_most=True,
        unit=("s", 1.0),
    ),
    Target(
        "planning of a restore: memory at most",
        1024 * MIB,
        _ours("plan_bytes"),
        at_most=True,
        unit=("MiB", 1 / MIB),
    ),
)
