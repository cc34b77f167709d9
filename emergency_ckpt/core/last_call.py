"""When agents drain the newest complete step without their trainers, before their host goes away.

As late as it fits, so that the trainers may come first with a newer step; at once where it does not fit any
more. All moments are seconds on one clock, whichever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from emergency_ckpt.core.lineage import StepId

FACTOR = 2.0
"""How many times the longest of the drains that were measured is allowed for."""
MARGIN_SECONDS = 5.0
"""What agents need to ask each other, beside the drain itself; some of them may not answer any more."""
ASSUMED_GRACE_SECONDS = 30.0
"""From a notice without a deadline to the end of the host: Kubernetes' grace period."""
ASSUMED_BYTES_PER_SECOND = 50e6
ASSUMED_SECONDS = 4.0
"""What a drain takes where none was measured: this, and each byte of the slot at that speed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """How long a drain takes, and how that is known."""

    seconds: float
    why: str


@dataclasses.dataclass(frozen=True, slots=True)
class LastCall:
    """When the drain begins, and whether it is over before the deadline, if all goes as expected."""

    begins: float
    fits: bool
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class RunningDrain:
    """A drain of one process. `waits`: its part is written, and it has been waiting for others for too long."""

    step: StepId
    waits: bool


def estimate_drain(measured_seconds: Sequence[float], slot_bytes: int) -> Estimate:
    """From the drains that were measured, which were of the same state; else from the size of a slot."""
    if measured_seconds:
        return Estimate(max(measured_seconds), f"the longest of {len(measured_seconds)} took that")
    seconds = ASSUMED_SECONDS + slot_bytes / ASSUMED_BYTES_PER_SECOND
    return Estimate(seconds, f"assumed for {slot_bytes} bytes, since none was measured here")


def grace_deadline(received: float, deadline: float | None, grace: float = ASSUMED_GRACE_SECONDS) -> float:
    """When the host goes away, as far as a notice tells: `grace` seconds after one without a deadline."""
    return received + grace if deadline is None else deadline


def last_call(now: float, deadline: float, estimate: Estimate) -> LastCall:
    """When to begin. Never before `now`."""
    needed = FACTOR * estimate.seconds + MARGIN_SECONDS
    latest = deadline - needed
    said = f"a drain takes about {estimate.seconds:.1f} s ({estimate.why})"
    left = deadline - now
    if latest > now:
        return LastCall(latest, True, f"{left:.1f} s are left, {needed:.1f} s are allowed for it: {said}")
    fits = now + estimate.seconds + MARGIN_SECONDS <= deadline
    how = "so that it begins at once" if fits else "so that it may not be over in time, and begins at once"
    return LastCall(now, fits, f"{left:.1f} s are left, {how}: {said}")


def waits_for(step: StepId, running: Collection[RunningDrain]) -> RunningDrain | None:
    """A drain of this step or a newer one that is expected to come to its end; None where there is none.

    It is enough that one process of it still writes, or has not waited for long.
    """
    awaited = [drain for drain in running if drain.step >= step and not drain.waits]
    return max(awaited, key=lambda drain: drain.step, default=None)


def may_be_left_to(begins_in: float, seconds_left: float, estimate: Estimate) -> bool:
    """Whether another agent, which begins in so many seconds, is still in time."""
    return begins_in + estimate.seconds + MARGIN_SECONDS <= max(seconds_left, estimate.seconds + MARGIN_SECONDS)
