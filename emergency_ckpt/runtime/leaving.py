"""What a job does at the step at which all processes react to notices, and when it is to leave.

Process 0 looks at the time that is left and decides (`core.autocheckpoint`); all hear it at the same call, so
that they save the same, and leave after the same step. Nothing here waits for longer than the hosts have.
"""

from __future__ import annotations

import dataclasses
import time
from datetime import timedelta
from typing import Any

from emergency_ckpt.core.autocheckpoint import Decision, Situation, decide, usable_seconds
from emergency_ckpt.core.copies import covers
from emergency_ckpt.core.last_call import grace_deadline
from emergency_ckpt.core.schedule import Due
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.runtime.agreed_steps import AgreedSteps, JobNotice
from emergency_ckpt.runtime.engine import Engine
from emergency_ckpt.telemetry.leaving_events import DecisionEvent, LeavingEvent
from emergency_ckpt.telemetry.metrics import Metric

_LOOK = timedelta(seconds=1)
_NAMED = 4


@dataclasses.dataclass
class _Reaction:
    """What all processes do at `step`.

    Attributes:
      until: when the first host goes away, by this process's clock; None where none does.
      since: when it was decided. waited: whether what was decided on was waited for.
    """

    step: int
    decision: Decision
    until: float | None
    since: float
    waited: bool = False


class Leaving:
    """One process's part. All of its methods but `remaining` are called by the train loop, on all processes."""

    def __init__(self, engine: Engine, steps: AgreedSteps) -> None:
        self._engine = engine
        self._steps = steps
        self._settings = engine.job.settings
        self._step: int | None = None  # at which all react, from when it is reached until it is decided on
        self._met = 0  # how many such steps there were; after a restore one may have the number of another one
        self._reaction: _Reaction | None = None
        self._reacted: set[Notice] = set()  # process 0: to these
        self._ends = False
        self._ends_until: float | None = None

    def reached(self, step: int) -> bool:
        """Whether all processes react at `step`. Raises CoordinationTimeoutError."""
        reached = self._steps.reached(step)
        if reached and self._met != self._steps.met:
            self._step, self._met = step, self._steps.met
        return reached

    def narrowed(self, due: Due) -> Due:
        """What is left of what this step, at which all react, is due for."""
        decision = self._react().decision
        return Due(due.local and decision.local, due.persistent and decision.persistent, due.reason)

    @property
    def leaves(self) -> bool:
        """Whether the job is to leave; waits for nothing that is to be saved before."""
        if self._step is None and self._reaction is None:
            return False
        return self._react().decision.leave

    def should_exit(self) -> bool:
        """Whether the job is to leave now: waits until what was decided on is durable, or the time is over."""
        if not self.leaves:
            return False
        reaction = self._react()
        if not reaction.waited:
            reaction.waited = True
            self._await_durable(reaction)
        return True

    def remaining(self) -> timedelta | None:
        """How long this process may still take; None where nothing limits it."""
        reaction = self._reaction
        until = reaction.until if reaction is not None and reaction.decision.leave else None
        if self._ends:
            known = [] if self._ends_until is None else [self._ends_until]
            self._ends_until = min([*known, *self._standing()], default=None)
            until = min((each for each in (until, self._ends_until) if each is not None), default=None)
        return None if until is None else timedelta(seconds=usable_seconds(max(until - time.monotonic(), 0.0)))

    def begin_to_end(self) -> None:
        """No step follows: what is heard of from now on, or still stands, limits what is being waited for."""
        self._ends = True

    def _standing(self) -> list[float]:
        """When hosts go away, by this process's monotonic clock, as far as that is still to come."""
        now, grace = time.time(), self._settings.preemption_grace.total_seconds()
        standing = [each.notice for each in self._steps.notices if each.notice.kind == "terminate"]
        ends = [grace_deadline(each.received, each.deadline, grace) for each in standing if each.stands(now)]
        return [time.monotonic() + end - now for end in ends]

    def _react(self) -> _Reaction:
        if self._step is None:
            assert self._reaction is not None
            return self._reaction
        step = self._step
        left, raw, leaving = self._engine.tell_all("leaving", lambda: self._decide(step))
        self._step = None  # Where that fails it is asked for again: all fail alike.
        decision = Decision(**raw)
        now = time.monotonic()
        self._reaction = _Reaction(step, decision, None if left is None else now + left, now)
        self._engine.spare(step, tuple(leaving))
        if decision.drain is not None:
            self._engine.drain_complete(decision.drain, self.remaining() or timedelta(0))
        return self._reaction

    # Process 0.

    def _decide(self, step: int) -> list[Any]:
        """The seconds that are left, None where nobody goes away, the decision, and whose hosts go away."""
        now = time.time()
        told = [
            each
            for each in self._steps.notices
            if each.notice.kind == "terminate" and (each.notice not in self._reacted or each.notice.stands(now))
        ]
        self._reacted |= {each.notice for each in self._steps.notices}
        grace = self._settings.preemption_grace.total_seconds()
        ends = [grace_deadline(each.notice.received, each.notice.deadline, grace) for each in told]
        left = max(min(ends) - now, 0.0) if ends else None
        decision = decide(self._situation(left, told))
        who = "; ".join(sorted({str(each.notice) for each in told})[:_NAMED])
        self._engine.job.log.emit(
            DecisionEvent(
                step=step,
                seconds_left=left,
                local=decision.local,
                persistent=decision.persistent,
                drains=decision.drain,
                leaves=decision.leave,
                reason=f"{decision.reason} ({who})" if who else decision.reason,
            )
        )
        going = sorted({each.process for each in told if each.process is not None})
        return [left, dataclasses.asdict(decision), going]

    def _situation(self, left: float | None, told: list[JobNotice]) -> Situation:
        engine, settings = self._engine, self._settings
        seconds = engine.job.log.metrics.snapshot()
        complete, persistent = engine.newest_on_ramdisks, engine.newest_persistent
        underway = engine.underway
        going = {each.process for each in told}
        return Situation(
            seconds_left=left,
            snapshot_seconds=seconds.get(Metric.RECENT_SAVE_SECONDS.value.name),
            drain_seconds=seconds.get(Metric.RECENT_DRAIN_SECONDS.value.name),
            has_local=settings.schedule.local is not None,
            has_persistent=settings.schedule.persistent is not None,
            complete=None if complete is None else complete.step,
            persistent=None if persistent is None else persistent.step,
            draining=None if underway is None else underway[0].step,
            draining_for=0.0 if underway is None else underway[1],
            survives=None not in going and covers(engine.job.layout, {p for p in going if p is not None}),
            skip_if_replicated=settings.skip_if_replicated,
        )

    # Every process.

    def _await_durable(self, reaction: _Reaction) -> None:
        remaining, done = self.remaining(), False
        while not done and (remaining is None or remaining):
            look = _LOOK if remaining is None else min(remaining, _LOOK)
            until = time.monotonic() + look.total_seconds()
            if not (done := self._engine.wait_a_while(look)):
                time.sleep(max(until - time.monotonic(), 0.0))  # What failed at once is tried once a look.
            remaining = self.remaining()
        if self._engine.job.leads:
            persistent, complete = self._engine.newest_persistent, self._engine.newest_on_ramdisks
            self._engine.job.log.emit(
                LeavingEvent(
                    step=reaction.step,
                    persistent_step=None if persistent is None else persistent.step,
                    ramdisk_step=None if complete is None else complete.step,
                    in_time=done,
                    seconds=time.monotonic() - reaction.since,
                )
            )
