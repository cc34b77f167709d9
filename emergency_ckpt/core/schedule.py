"""When a step is due: integer arithmetic only, the same on every process (invariant 6).

The rules are Orbax's defaults: every `period` steps, at the first step of a run that has no checkpoint yet,
and at the step of a preemption.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Due:
    """What a step is due for, and why."""

    local: bool = False
    persistent: bool = False
    reason: str = "nothing is due"

    def __bool__(self) -> bool:
        return self.local or self.persistent


@dataclasses.dataclass(frozen=True, slots=True)
class SaveSchedule:
    """Periods in steps; 0 switches a tier off."""

    local_period: int
    persistent_period: int

    def __post_init__(self) -> None:
        if self.local_period < 0 or self.persistent_period < 0:
            raise ValueError(f"periods must not be negative: {self}")

    def due(self, step: int, *, first: bool = False, preempted: bool = False, force: bool = False) -> Due:
        """What `step` is due for.

        Args:
          step: the step number.
          first: no step of this run was saved before, on any tier.
          preempted: a notice was agreed on at this step.
          force: the caller asks for a save on every tier that is on.
        """
        local_on, persistent_on = self.local_period > 0, self.persistent_period > 0
        for asked, reason in ((force, "forced"), (preempted, "preemption"), (first, "first step")):
            if asked:
                return Due(local_on, persistent_on, reason)
        local = local_on and step % self.local_period == 0
        persistent = persistent_on and step % self.persistent_period == 0
        if not (local or persistent):
            return NOTHING_DUE
        return Due(local, persistent, "period")


NOTHING_DUE = Due()
