"""A plan for a job: ramdisk, periods, expected goodput, what is lost when. Impossible ones are refused.

What is refused comes with the nearest plan that is possible. The formulas are those of `core.sizing`,
`core.intervals` and `core.storage_cost`; what comes back from which loss is asked of the planner of restores.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

from emergency_ckpt.core.forecast.failures import Kind
from emergency_ckpt.core.forecast.intervals import TwoTiers, daly, young
from emergency_ckpt.core.forecast.job_shape import JobShape
from emergency_ckpt.core.forecast.plan_request import Request, too_large
from emergency_ckpt.core.forecast.recovery import PlannedRecovery, Source
from emergency_ckpt.core.forecast.simulated_policies import (
    OrbaxEmergency,
    PersistentOnly,
    Policy,
    ThisPackage,
    persistent_lag,
    restore_seconds,
    two_tiers,
)
from emergency_ckpt.core.forecast.simulation import Periods
from emergency_ckpt.core.forecast.sizing import BUFFER, Ramdisk, slots_wanted
from emergency_ckpt.core.forecast.storage_cost import MonthlyCost, monthly_cost
from emergency_ckpt.errors import ConfigError

LONGEST_PERIOD = 86400.0
"""Seconds: a day between persistent saves is the most that is advised, however seldom the tier is needed."""

_MOST_DIVISORS = 10**5


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """What it costs to lose something.

    Attributes:
      what: in words. source: from where the job comes back. steps: that are done again, on average.
      seconds: from the failure until training goes on.
    """

    what: str
    source: Source
    steps: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class JobPlan:
    """The answer."""

    request: Request
    periods: Periods
    recovery: PlannedRecovery

    @property
    def ramdisk(self) -> Ramdisk:
        return self.request.ramdisk

    @property
    def ramdisk_mib(self) -> int:
        """The size to ask for."""
        memory = self.request.memory
        return self.ramdisk.asked_mib(None if memory is None else memory.for_ramdisk)

    @functools.cached_property
    def tiers(self) -> TwoTiers:
        """What the closed formulas go by."""
        of = self.request
        return two_tiers(ThisPackage(self.recovery), of.model, of.shape, of.costs)

    @property
    def goodput(self) -> float:
        """The share of time that is progress, by the closed formula; never below 0."""
        return max(0.0, 1 - self.tiers.waste(*self._period_seconds))

    @property
    def best_goodput(self) -> float:
        """The same with the best periods that the saves allow."""
        of = self.request
        best = choose_periods(self.tiers, of.step_seconds, of.costs.local_lag, of.costs.persistent_lag)
        seconds = best.local * of.step_seconds, best.persistent * of.step_seconds
        return max(0.0, 1 - self.tiers.waste(*seconds))

    @property
    def steps_lost(self) -> float:
        """Done again after a failure, on average."""
        return self.tiers.rolled_back(*self._period_seconds) / self.request.step_seconds

    @property
    def persistent_only(self) -> tuple[float, float, float]:
        """Without a local tier: Young's and Daly's period in seconds, and the goodput with Daly's."""
        of = self.request
        tiers = two_tiers(PersistentOnly(), of.model, of.shape, of.costs)
        cost = tiers.persistent_cost
        best = max(daly(cost, tiers.mean_seconds), tiers.persistent_lag + cost, of.step_seconds)
        goodput = max(0.0, 1 - tiers.waste(math.inf, best))
        return young(cost, tiers.mean_seconds), daly(cost, tiers.mean_seconds), goodput

    @property
    def monthly(self) -> MonthlyCost | None:
        of = self.request
        if of.prices is None:
            return None
        return monthly_cost(
            of.state.total_bytes, of.shape.hosts, self._period_seconds[1], of.kept_persistent, of.prices
        )

    @property
    def losses(self) -> tuple[Loss, ...]:
        """From the death of a trainer to the loss of all."""
        return tuple(self._loss(*each) for each in _losses(self.request.shape))

    @property
    def notes(self) -> tuple[str, ...]:
        """What deserves a word."""
        return tuple(_notes(self))

    @property
    def _period_seconds(self) -> tuple[float, float]:
        step = self.request.step_seconds
        return self.periods.local * step, self.periods.persistent * step

    def _loss(self, what: str, kind: Kind, lost: tuple[int, ...]) -> Loss:
        of, costs = self.request, self.request.costs
        source = self.recovery.restore(lost, 1, 0).source
        is_local = source is not Source.PERSISTENT
        period = self.periods.local if is_local else self.periods.persistent
        lag = costs.local_lag if is_local else costs.persistent_lag
        seconds = costs.repair(kind) + costs.restart + restore_seconds(source, costs)
        return Loss(what, source, period / 2 + lag / of.step_seconds, seconds)


def make_plan(request: Request) -> JobPlan:
    """Raises ConfigError for what is impossible, with the nearest plan that is not."""
    _check_slots(request)
    if not request.fits:
        raise ConfigError(too_large(request))
    recovery = PlannedRecovery(request.shape, request.protection)
    plan = JobPlan(request, Periods(1, 1), recovery)
    costs, step = request.costs, request.step_seconds
    best = choose_periods(plan.tiers, step, costs.local_lag, costs.persistent_lag, request.local_period)
    local, persistent = request.local_period, request.persistent_period
    if local is None:
        local = best.local if persistent is None else _beside(persistent, best.local, plan.tiers, request)
    persistent = best.persistent if persistent is None else persistent
    _check_period("local_checkpoint_period", local, step, costs.local_blocked + costs.local_lag)
    _check_period(request.persistent_flag, persistent, step, costs.persistent_blocked + costs.persistent_lag)
    return dataclasses.replace(plan, periods=Periods(local, persistent))


def choose_periods(
    tiers: TwoTiers, step_seconds: float, local_lag: float, persistent_lag: float, local: int | None = None
) -> Periods:
    """The best periods in whole steps: no shorter than a save takes, and the longer a multiple of the shorter.

    A persistent step that is no local one would be a snapshot of its own, and newer than the ramdisks' newest.
    """
    if local is None:
        wanted = tiers.best_local
        if tiers.best_persistent < wanted < math.inf:
            # No step is persistent that is not local: then both have one period, and one cost.
            wanted = young(tiers.local_cost + tiers.persistent_cost, tiers.mean_seconds)
        local = _steps(wanted, step_seconds, tiers.local_cost + local_lag)
    persistent = _steps(tiers.best_persistent, step_seconds, tiers.persistent_cost + persistent_lag)
    local = max(1, min(local, persistent)) if tiers.best_local == math.inf else max(1, local)
    return Periods(local, -(-persistent // local) * local)


def policies(plan: JobPlan) -> tuple[tuple[Policy, Periods], ...]:
    """The three that a simulation compares: this plan, and two others with the periods best for them."""
    of = plan.request
    found: list[tuple[Policy, Periods]] = []
    for policy in (PersistentOnly(), OrbaxEmergency(of.shape)):
        tiers = two_tiers(policy, of.model, of.shape, of.costs)
        lag = persistent_lag(policy, of.costs)
        best = choose_periods(tiers, of.step_seconds, of.costs.local_lag, lag)
        if not policy.saves_locally:
            seconds = daly(tiers.persistent_cost, tiers.mean_seconds)
            best = Periods(0, _steps(seconds, of.step_seconds, tiers.persistent_cost + lag))
        found.append((policy, best))
    return (*found, (ThisPackage(plan.recovery), plan.periods))


def _steps(seconds: float, step_seconds: float, least_seconds: float) -> int:
    wanted = round(min(seconds, LONGEST_PERIOD) / step_seconds)
    return max(1, math.ceil(least_seconds / step_seconds), wanted)


def _beside(persistent: int, wanted: int, tiers: TwoTiers, request: Request) -> int:
    """The best local period that divides a persistent one that is given; `wanted` where none is near."""
    step, wanted = request.step_seconds, min(wanted, persistent)
    least = math.ceil((tiers.local_cost + request.costs.local_lag) / step)
    small = [d for d in range(1, min(math.isqrt(persistent), _MOST_DIVISORS) + 1) if persistent % d == 0]
    near = [d for d in {*small, *(persistent // d for d in small)} if max(least, wanted / 2) <= d <= wanted * 2]
    return min(near, key=lambda d: tiers.waste(d * step, persistent * step), default=wanted)


def _check_slots(request: Request) -> None:
    least, wanted = request.protection.kept + 1, slots_wanted(request.protection.kept, True)
    if request.slots is not None and not least <= request.slots <= wanted:
        raise ConfigError(
            f"{request.slots} slots: {request.protection.kept} kept steps and the one that is written need "
            f"{least}, and more than {wanted} are never used; the nearest is "
            f"{min(max(request.slots, least), wanted)}"
        )
    if not 0 <= request.buffer <= 10:
        raise ConfigError(f"a buffer of {request.buffer}: expected a share of the slots, such as {BUFFER}")


def _check_period(flag: str, steps: int, step_seconds: float, save_seconds: float) -> None:
    least = max(1, math.ceil(save_seconds / step_seconds))
    if steps < least:
        raise ConfigError(
            f"{flag}={steps} is {steps * step_seconds:.3g} s, and a save takes {save_seconds:.3g} s: saves "
            f"would be skipped. The nearest possible is {flag}={least}"
        )


def _losses(shape: JobShape) -> Iterator[tuple[str, Kind, tuple[int, ...]]]:
    last = shape.hosts - 1
    yield "a trainer (its host stays)", Kind.PROCESS, ()
    yield "a host", Kind.HOST, (last,)
    if shape.slices > 1:
        yield "two hosts at the same place of two slices", Kind.HOST, (last - shape.hosts_per_slice, last)
        if shape.hosts_per_slice > 1:
            lost = (last - shape.hosts_per_slice - 1, last)
            yield "two hosts at different places of two slices", Kind.HOST, lost
        yield "a slice", Kind.SLICE, tuple(shape.hosts_of(shape.slices - 1))
        if shape.slices > 2:
            yield "all slices but one", Kind.SLICE, tuple(range(shape.hosts_per_slice, shape.hosts))
    elif shape.hosts > 2:
        yield "two neighbouring hosts", Kind.HOST, (0, 1)
        yield "two hosts far from each other", Kind.HOST, (0, last)
    if shape.hosts > 1:
        yield "all hosts", Kind.JOB, tuple(range(shape.hosts))


_MUCH = 0.05
"""Of the time: a loss that deserves a word."""


def _notes(plan: JobPlan) -> Iterator[str]:
    of = plan.request
    if not plan.goodput:
        yield (
            "by the closed formula there is no progress left: failures come faster than the job comes back "
            "from them. Shorten restarts and repairs, or use fewer hosts."
        )
    if plan.tiers.missed > 0.5:
        yield (
            f"{plan.tiers.missed:.0%} of the failures leave nothing on the ramdisks "
            f"({plan.recovery.survivable.describe()})"
            + (
                "; local_checkpoint_copies=2 would leave more."
                if of.protection.copies == 1 and (of.protection.spreads or not of.shape.replicated)
                else "."
            )
        )
    if (more := plan.best_goodput - plan.goodput) > _MUCH:
        yield f"the periods that are set cost {more:.0%} of the time beside the best; unset, those are chosen."
    if plan.periods.persistent % plan.periods.local and of.persistent_flag == "checkpoint_period":
        local = plan.periods.local
        multiple = -(-plan.periods.persistent // local) * local
        yield (
            f"checkpoint_period={plan.periods.persistent} is no multiple of local_checkpoint_period={local}: "
            f"its saves are snapshots of their own; the next multiple is {multiple}."
        )
    if plan.ramdisk.slots < slots_wanted(of.protection.kept, True):
        yield (
            f"with {plan.ramdisk.slots} slots local saves wait while a step is drained "
            f"({of.costs.persistent_lag:.3g} s each), and are skipped where that is too long."
        )
    if of.kept_persistent is None:
        yield "all persistent steps are kept (max_num_checkpoints_to_keep=None): the cost grows every month."
    if of.memory is None:
        yield "the memory of a host is not known (--machine or --machine-memory): nothing was checked."
