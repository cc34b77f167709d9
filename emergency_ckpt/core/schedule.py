"""When a step is due: integer arithmetic only, the same on every process (invariant 6).

A tier's rule is a pure function of the step number and of facts that all processes share. What no such rule can
say (time, state, a function of the user's) is asked of process 0, step by step, by `runtime.decisions`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container


@dataclasses.dataclass(frozen=True, slots=True)
class Due:
    """What a step is due for, and why."""

    local: bool = False
    persistent: bool = False
    reason: str = "nothing is due"

    def __bool__(self) -> bool:
        return self.local or self.persistent

    @property
    def is_urgent(self) -> bool:
        """Whether somebody asked for this very step: that it is not saved must not go unsaid."""
        return self.reason in (_FORCED, _PREEMPTION)

    @property
    def before_end(self) -> bool:
        """Whether the step is saved because the job ends: there is nothing else to wait for."""
        return self.reason == _PREEMPTION


_FORCED, _PREEMPTION, _FIRST, _PERIOD = "forced", "preemption", "first step", "period"
NOTHING_DUE = Due()


@dataclasses.dataclass(frozen=True, slots=True)
class SaveRule:
    """When one tier saves: at a step for which any of this holds.

    Attributes:
      periods: the step is divisible by one of them.
      steps: the step is in one of these containers.
      first: the tier holds no step of the run yet.
      preemption: a notice was agreed on at this step.
      asked: process 0 decides; nothing above counts.
    """

    periods: tuple[int, ...] = ()
    steps: tuple[Container[int], ...] = ()
    first: bool = False
    preemption: bool = False
    asked: bool = False

    def __post_init__(self) -> None:
        if any(period < 1 for period in self.periods):
            raise ValueError(f"periods must be positive: {self.periods}")

    def __or__(self, other: SaveRule) -> SaveRule:
        """The rule by which a step is due where it is by either of the two."""
        return SaveRule(
            self.periods + other.periods,
            self.steps + other.steps,
            self.first or other.first,
            self.preemption or other.preemption,
            self.asked or other.asked,
        )

    def reason(self, step: int, *, first: bool, preempted: bool) -> str | None:
        """Why `step` is due; None where it is not."""
        if preempted and self.preemption:
            return _PREEMPTION
        if first and self.first:
            return _FIRST
        for period in self.periods:
            if step % period == 0:
                return _PERIOD
        for steps in self.steps:
            if step in steps:
                return "chosen step"
        return None


def default_rule(period: int) -> SaveRule | None:
    """Orbax's rule without policies: every `period` steps, the first step, a preemption. 0: no saves."""
    if period < 0:
        raise ValueError(f"a period must not be negative: {period}")
    return SaveRule(periods=(period,), first=True, preemption=True) if period else None


@dataclasses.dataclass(frozen=True, slots=True)
class SaveSchedule:
    """The rules of both tiers; None switches a tier off."""

    local: SaveRule | None
    persistent: SaveRule | None

    @classmethod
    def of_periods(cls, local_period: int, persistent_period: int) -> SaveSchedule:
        """Orbax's default rules; a period of 0 switches a tier off."""
        return cls(default_rule(local_period), default_rule(persistent_period))

    @property
    def asks(self) -> bool:
        """Whether there is a tier for which process 0 decides."""
        return any(rule is not None and rule.asked for rule in (self.local, self.persistent))

    def due(
        self,
        step: int,
        *,
        local_first: bool = False,
        persistent_first: bool = False,
        preempted: bool = False,
        force: bool = False,
        told: Due = NOTHING_DUE,
    ) -> Due:
        """What `step` is due for.

        Args:
          step: the step number.
          local_first, persistent_first: that tier holds no step of this run, and none was asked for.
          preempted: a notice was agreed on at this step.
          force: the caller asks for a save on every tier that is on.
          told: what process 0 decided, for the tiers that ask it.
        """
        local, persistent = self.local, self.persistent
        if force:
            return Due(local is not None, persistent is not None, _FORCED)
        why_local = why_persistent = None
        if local is not None:
            if not local.asked:
                why_local = local.reason(step, first=local_first, preempted=preempted)
            elif told.local:
                why_local = told.reason
        if persistent is not None:
            if not persistent.asked:
                why_persistent = persistent.reason(step, first=persistent_first, preempted=preempted)
            elif told.persistent:
                why_persistent = told.reason
        if why_local is None and why_persistent is None:
            return NOTHING_DUE
        why = _PREEMPTION if _PREEMPTION in (why_local, why_persistent) else why_local or why_persistent or ""
        return Due(why_local is not None, why_persistent is not None, why)
