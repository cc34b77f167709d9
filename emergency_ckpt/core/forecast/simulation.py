"""A job that fails and comes back, event by event: how much of its time is progress.

Time between two failures is worked out at once, not step by step, so that months of a job of 100,000 chips take
moments. The trace of failures is made without looking at the policy: every policy meets the same one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from emergency_ckpt.core.forecast.failures import Failure, FailureModel, failure_trace, hosts_lost
from emergency_ckpt.core.forecast.job_shape import JobShape
from emergency_ckpt.core.forecast.recovery import Source
from emergency_ckpt.core.forecast.save_costs import Costs
from emergency_ckpt.core.forecast.simulated_policies import (
    Policy,
    local_cost,
    persistent_cost,
    persistent_lag,
    restore_seconds,
)

_MOST_POINTS = 400


@dataclasses.dataclass(frozen=True, slots=True)
class Periods:
    """Steps between two saves. `local` 0: none."""

    local: int
    persistent: int


@dataclasses.dataclass(frozen=True)
class Life:
    """What became of one policy under one trace; shares of the time, which add up to one.

    Attributes:
      useful: steps that count in the end. saving: blocked by saves. rolled_back: steps that were lost, and what
        saving in them took. down: from failures until training went on.
      failures: that hit the job. restored: how often from where.
      points: (seconds, step) of the progress, a few.
    """

    useful: float
    saving: float
    rolled_back: float
    down: float
    failures: int
    restored: Mapping[Source, int]
    points: tuple[tuple[float, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Pace:
    """How fast steps follow each other while nothing fails."""

    step_seconds: float
    periods: Periods
    local_cost: float
    persistent_cost: float

    def seconds(self, begin: int, end: int) -> float:
        """From having step `begin` until `end` is done, and saved off the devices where it is due."""
        return (end - begin) * self.step_seconds + self.saving(begin, end)

    def saving(self, begin: int, end: int) -> float:
        local, persistent = self.periods.local, self.periods.persistent
        taken = self.persistent_cost * (end // persistent - begin // persistent)
        return taken + (self.local_cost * (end // local - begin // local) if local else 0.0)

    def reached(self, begin: int, seconds: float) -> int:
        """The newest step that is done by then."""
        if seconds <= 0:
            return begin
        each = self.step_seconds + self.persistent_cost / self.periods.persistent
        each += self.local_cost / self.periods.local if self.periods.local else 0.0
        step = begin + int(seconds / each)
        while self.seconds(begin, step) > seconds:
            step -= 1
        while self.seconds(begin, step + 1) <= seconds:
            step += 1
        return max(step, begin)

    def saved(self, begin: int, seconds: float, lag: float, period: int) -> int | None:
        """The newest step of this period, newer than `begin`, that can be restored by then."""
        step = self.reached(begin, seconds - lag)
        newest = step - step % period if period else begin
        return newest if newest > begin else None


def simulate(
    policy: Policy,
    shape: JobShape,
    costs: Costs,
    step_seconds: float,
    periods: Periods,
    trace: Sequence[Failure],
    horizon: float,
) -> Life:
    """One life of the job, from step 0 at time 0 to the horizon.

    Failures that come while the job is down take their ramdisks too and begin the restart anew.
    """
    pace = _Pace(step_seconds, periods, local_cost(policy, costs), persistent_cost(policy, costs))
    job = _Job(policy, shape, costs, pace)
    for failure in trace:
        if failure.seconds >= horizon:
            break
        job.fail(failure)
    return job.end(horizon)


class _Job:
    """Where a job stands. `up_at`: since or until when it trains from `step` on."""

    def __init__(self, policy: Policy, shape: JobShape, costs: Costs, pace: _Pace) -> None:
        self._policy, self._shape, self._costs, self._pace = policy, shape, costs, pace
        self._up_at = 0.0
        self._step = 0
        self._local: int | None = None
        self._persistent = 0
        self._lost: set[int] = set()
        self._repaired_at = 0.0
        self._source: Source | None = None
        self._down = self._saving = 0.0
        self._failures = 0
        self._restored: dict[Source, int] = dict.fromkeys(Source, 0)
        self._points: list[tuple[float, int]] = [(0.0, 0)]

    def fail(self, failure: Failure) -> None:
        """Trains until then, if it is up, and goes down."""
        self._failures += 1
        if failure.seconds >= self._up_at:
            self._come_up()
            self._train(failure.seconds)
        else:
            self._down -= self._up_at - failure.seconds
        if self._policy.saves_locally:
            self._lost.update(hosts_lost(failure, self._shape))
        found = self._policy.restore(self._lost, self._local, self._persistent)
        # Saves of steps that are lost are lost time, not saving.
        self._saving -= self._pace.saving(found.step, self._step)
        self._step = found.step
        self._source = found.source
        self._repaired_at = max(self._repaired_at, failure.seconds + self._costs.repair(failure.kind))
        up_at = max(self._repaired_at, failure.seconds) + self._costs.restart
        self._up_at = up_at + restore_seconds(found.source, self._costs)
        self._down += self._up_at - failure.seconds

    def end(self, horizon: float) -> Life:
        """The shares of the time until the horizon."""
        if horizon >= self._up_at:
            self._come_up()
            self._train(horizon)
        else:
            self._down -= self._up_at - horizon
        self._points.append((horizon, self._step))
        useful = self._step * self._pace.step_seconds
        # What was trained beyond the last whole step is no progress; it is counted with what was rolled back.
        rest = horizon - useful - self._saving - self._down
        thin = max(1, -(-len(self._points) // _MOST_POINTS))
        return Life(
            useful / horizon,
            self._saving / horizon,
            rest / horizon,
            self._down / horizon,
            self._failures,
            dict(self._restored),
            (*self._points[:-1:thin], self._points[-1]),
        )

    def _come_up(self) -> None:
        """The restore that was under way is done."""
        if self._source is None:
            return
        self._restored[self._source] += 1
        if self._policy.hydrates:
            self._local = self._step
            self._lost.clear()
        elif self._source is Source.PERSISTENT:
            # The ramdisks that are left hold a step of a life that is over.
            self._local = None
        self._source = None
        self._points.append((self._up_at, self._step))

    def _train(self, until: float) -> None:
        pace, periods, seconds = self._pace, self._pace.periods, until - self._up_at
        begin, self._step = self._step, pace.reached(self._step, seconds)
        self._saving += pace.saving(begin, self._step)
        local = pace.saved(begin, seconds, self._costs.local_lag, periods.local)
        if local is not None and self._policy.saves_locally:
            self._local = local
            self._lost.clear()
        persistent = pace.saved(begin, seconds, persistent_lag(self._policy, self._costs), periods.persistent)
        self._persistent = self._persistent if persistent is None else persistent
        self._points.append((until, self._step))


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A mean and half the width of its 95 % confidence interval (Student's t)."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def interval(values: Sequence[float]) -> Interval:
    """Of independent values; of a single one the width is infinite."""
    from scipy.special import stdtrit  # pyright: ignore

    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return Interval(mean, float("inf"))
    deviation = float(np.std(values, ddof=1))
    return Interval(mean, float(stdtrit(count - 1, 0.975)) * deviation / count**0.5)


@dataclasses.dataclass(frozen=True)
class Simulated:
    """One policy over all runs."""

    policy: str
    periods: Periods
    lives: tuple[Life, ...]

    def share(self, name: str) -> Interval:
        """Of the time: `useful` (the goodput), `saving`, `rolled_back` or `down`."""
        return interval([getattr(life, name) for life in self.lives])

    @property
    def goodput(self) -> Interval:
        return self.share("useful")

    def restored(self, source: Source) -> int:
        """How often it came back from there, in all runs."""
        return sum(life.restored.get(source, 0) for life in self.lives)


def compare(
    policies: Sequence[tuple[Policy, Periods]],
    model: FailureModel,
    shape: JobShape,
    costs: Costs,
    step_seconds: float,
    horizon: float,
    runs: int,
    seed: int,
) -> tuple[Simulated, ...]:
    """Every policy under the same `runs` traces; the seed makes it repeatable."""
    lives: list[list[Life]] = [[] for _ in policies]
    for run in range(runs):
        trace = failure_trace(model, shape, horizon, np.random.default_rng((seed, run)))
        for of, (policy, periods) in zip(lives, policies, strict=True):
            of.append(simulate(policy, shape, costs, step_seconds, periods, trace, horizon))
    return tuple(
        Simulated(policy.name, periods, tuple(of))
        for (policy, periods), of in zip(policies, lives, strict=True)
    )


def gain(better: Simulated, other: Simulated) -> Interval:
    """How much more goodput one has than the other, run by run: the failures are the same."""
    pairs = zip(better.lives, other.lives, strict=True)
    return interval([one.useful - two.useful for one, two in pairs])
