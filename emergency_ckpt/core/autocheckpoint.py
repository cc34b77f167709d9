"""What a job does when it was told that hosts of it go away: a pure function of the time and of what is saved.

Process 0 decides and the others hear it. Nothing here touches a clock or a file.
"""

from __future__ import annotations

import dataclasses

# Of the time that is left this much is kept for the end of the processes, and estimates count for more than
# they were, because hosts that go away are busy.
MARGIN_SECONDS = 2.0
MARGIN_SHARE = 0.1
ESTIMATE_FACTOR = 1.2


@dataclasses.dataclass(frozen=True, slots=True)
class Situation:
    """What is known at the step at which all processes react.

    Attributes:
      seconds_left: until the first host goes away; None: nobody goes away, somebody asks for a save.
      snapshot_seconds: from the call of a save until all ramdisks have it, as measured; None: not measured.
      drain_seconds: from the beginning of a drain to its commit, as measured; None: not measured.
      has_local, has_persistent: which tiers there are.
      complete: the newest step that all ramdisks have. persistent: the newest one that is committed.
      draining: the step that is being drained, or waits for it. draining_for: since when, in seconds.
      survives: whether a step on the ramdisks is whole without those of the hosts that go away.
      skip_if_replicated: whether that is enough.
    """

    seconds_left: float | None
    snapshot_seconds: float | None = None
    drain_seconds: float | None = None
    has_local: bool = True
    has_persistent: bool = True
    complete: int | None = None
    persistent: int | None = None
    draining: int | None = None
    draining_for: float = 0.0
    survives: bool = False
    skip_if_replicated: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What all processes do at this step.

    Attributes:
      local, persistent: the tiers to which the step may go.
      drain: an older complete step that goes to the persistent tier from the ramdisks; None: none.
      leave: whether the job ends then, so that it is started again.
      reason: why, for the log.
    """

    local: bool
    persistent: bool
    drain: int | None
    leave: bool
    reason: str


def usable_seconds(seconds_left: float) -> float:
    """What can be counted on of the time that is left."""
    return max(seconds_left - max(MARGIN_SECONDS, MARGIN_SHARE * seconds_left), 0.0)


def decide(now: Situation) -> Decision:
    """What is worth most of what can be had in the time that is left.

    In this order: this step in the persistent tier; an older complete one there, and this one on the ramdisks
    of the hosts that stay; where nothing can be there in time this step is saved and sent all the same, since
    deadlines move and the agents of other hosts go on.
    """
    if now.seconds_left is None:
        return _decision(now, now.has_local, now.has_persistent, None, "somebody asked for it", leave=False)
    left = usable_seconds(now.seconds_left)
    time = f"{now.seconds_left:.1f} s are left"
    if now.skip_if_replicated and now.survives and now.has_local:
        why = "what the hosts that stay have is whole (autocheckpoint_skip_if_replicated)"
        return _decision(now, True, False, None, f"{time}, {why}")
    if not now.has_persistent:
        return _decision(now, True, False, None, f"{time}, and there is no persistent tier")
    snapshot = _estimate(now.snapshot_seconds) if now.has_local else 0.0
    drain = _estimate(now.drain_seconds)
    if snapshot is None or drain is None:
        unknown = "a drain" if drain is None else "a save"
        return _decision(now, True, True, None, f"{time}; how long {unknown} takes is not known yet")
    ahead = _remaining(now, drain)
    whole = snapshot + ahead + drain
    estimate = f"{time}, a save takes {snapshot:.1f} s, a drain {drain:.1f} s"
    if now.draining is not None:
        estimate += f", and that of step {now.draining} goes on for {ahead:.1f} s"
    if whole <= left:
        return _decision(now, True, True, None, estimate)
    saves = now.has_local and snapshot <= left
    if now.draining is not None and ahead <= left:
        return _decision(now, saves, False, None, f"{estimate}: step {now.draining} gets there in time")
    if now.has_local and now.complete is not None and now.draining is None:
        if now.persistent is not None and now.persistent >= now.complete:
            if saves:
                return _decision(now, True, False, None, f"{estimate}: step {now.persistent} is there already")
        elif drain <= left:
            return _decision(
                now, saves, False, now.complete, f"{estimate}: only what is saved gets there in time"
            )
    return _decision(now, True, True, None, f"{estimate}: it may come too late and is tried all the same")


def _decision(
    now: Situation, local: bool, persistent: bool, drain: int | None, reason: str, *, leave: bool = True
) -> Decision:
    return Decision(local and now.has_local, persistent and now.has_persistent, drain, leave, reason)


def _estimate(measured: float | None) -> float | None:
    return None if measured is None else measured * ESTIMATE_FACTOR


def _remaining(now: Situation, drain: float) -> float:
    """How long the drain that is on its way is going to take; one that is late may be stuck."""
    if now.draining is None:
        return 0.0
    return drain - now.draining_for if now.draining_for < drain else drain
