"""The events of a preemption: a notice was heard, what follows from it was decided, the job leaves."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from emergency_ckpt.telemetry.events import Event, Severity


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoticeEvent(Event):
    """A process heard that its host goes away, or that somebody wants a save.

    Attributes:
      source: who said so. kind: what is going to happen (`preemption.notice.Kind`).
      deadline: when, in seconds since 1970; None where that is not known.
      said: all of it in words. follows: what comes of it.
    """

    operation: ClassVar[str] = "preemption"
    source: str
    kind: str
    deadline: float | None
    said: str
    follows: str

    @property
    def severity(self) -> Severity:
        return "warning"

    def describe(self) -> str:
        return f"notice from {self.said}; {self.follows}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecisionEvent(Event):
    """What all processes do at the step at which they react.

    Attributes:
      seconds_left: until the first host goes away; None where none does.
      local, persistent: the tiers that get the step. drains: an older step that goes to the persistent tier.
      leaves: whether the job ends then. reason: why, and because of which notices.
    """

    operation: ClassVar[str] = "preemption"
    step: int
    seconds_left: float | None
    local: bool
    persistent: bool
    drains: int | None
    leaves: bool
    reason: str

    @property
    def severity(self) -> Severity:
        return "warning"

    def describe(self) -> str:
        if self.persistent:
            what = "this step is saved and goes to the persistent tier"
        elif self.local:
            what = "this step is saved on the ramdisks only"
        else:
            what = "this step is not saved"
        if self.drains is not None:
            what += f", step {self.drains} goes to the persistent tier from them"
        return f"{what}: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeavingEvent(Event):
    """The program is told to end.

    Attributes:
      persistent_step, ramdisk_step: the newest ones that are there.
      in_time: whether everything that was decided on has ended.
      seconds: since it was decided.
    """

    operation: ClassVar[str] = "preemption"
    step: int
    persistent_step: int | None
    ramdisk_step: int | None
    in_time: bool
    seconds: float

    @property
    def severity(self) -> Severity:
        return "warning"

    def describe(self) -> str:
        there = (
            f"{_named(self.persistent_step)} is in the persistent tier, {_named(self.ramdisk_step)} is "
            "complete on the ramdisks"
        )
        if self.in_time:
            return f"the job leaves after {self.seconds:.1f} s: {there}"
        return (
            f"the time is over after {self.seconds:.1f} s, and the job leaves: {there}; agents go on with what "
            "is not done"
        )


def _named(step: int | None) -> str:
    return "no step" if step is None else f"step {step}"
