"""One agent's part in a last call: the newest complete step is drained before a host goes away.

The trainers may live, or hang; they are not asked, and their drains are never disturbed. It begins as late as
it fits (`core.last_call`), and only where nobody has drained that step, or is about to. Of all agents that have
such a call the one of the lowest process leads. One that fails lets others go first, and tries again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import Literal

from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.leading import FlushResult, Leader, stands_down
from emergency_ckpt.agent.lives import CallReport
from emergency_ckpt.agent.orders import Registration
from emergency_ckpt.agent.trainers import Trainers
from emergency_ckpt.core.jitter import JITTER
from emergency_ckpt.core.last_call import (
    Estimate,
    LastCall,
    RunningDrain,
    last_call,
    may_be_left_to,
    waits_for,
)
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.retrying import is_final
from emergency_ckpt.errors import EmergencyCheckpointError, PersistentStoreError, StaleGenerationError

_POLL_SECONDS = 0.5
# A drain that waits for a part which nobody writes waits in vain, if that is so for a while.
_QUIET_SECONDS = 10.0
_LEAST_QUIET_SECONDS = 1.0
_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 8.0
# The host may live longer than was said.
AFTER_SECONDS = 60.0
_log = logging.getLogger("emergency_ckpt.agent")


class LastCallSession:
    """The last call of one life. `run` is for a thread of its own; everything else for any.

    Args:
      registration: of the trainer of the lowest process here. deadline: on the monotonic clock.
      estimate: how long a drain takes, as far as is known here.
      leaving: the processes whose hosts go away, as far as is known here.
    """

    def __init__(
        self,
        registration: Registration,
        trainers: Trainers,
        own: Endpoint,
        dial: str,
        stopped: threading.Event,
        deadline: float,
        estimate: Callable[[], Estimate],
        leaving: Callable[[], Collection[int]],
    ) -> None:
        self._registration = registration
        self._trainers = trainers
        self._stopped = stopped
        self._estimate = estimate
        self._leaving = leaving
        self._leader = Leader(registration, own, dial, stopped, "urgent")
        self._own = own
        self._changed = threading.Event()
        self._guard = threading.Lock()
        self._deadline = deadline  # the earliest one
        self._until = deadline  # the latest one: so long what fails is tried again, and some time more
        self._next: float | None = None  # the deadline of a notice that came while this agent was leading
        self._armed = time.monotonic()
        self._begins = self._armed
        self._ended = self._armed
        self._state: Literal["armed", "leading", "aside", "done", "over"] = "armed"
        self._failures, self._is_last_try = 0, False
        self._failure: EmergencyCheckpointError | None = None  # the latest one, of what is tried again
        self._moved = self._armed  # when a drain of the newest step, or a newer one, was last seen to write
        self._said = ""

    def report(self) -> CallReport | None:
        """What other agents are told; None where nothing is to be expected of this one, for now or for good."""
        now = time.monotonic()
        match self._state:
            case "armed":
                return CallReport("armed", max(0.0, self._begins - now))
            case "leading":
                return CallReport("leading", 0.0)
            case "done":
                return CallReport("done", now - self._ended)
            case _:
                return None

    def hurry(self, deadline: float) -> bool:
        """There is less time than was said before, or not; False where this has ended.

        What is being drained by now is not all: there may be a newer step, of which another call is made.
        """
        with self._guard:
            if self._state in ("done", "over"):
                return False
            self._until = max(self._until, deadline)
            if self._state == "leading":
                self._next = deadline if self._next is None else min(self._next, deadline)
            else:
                self._deadline = min(self._deadline, deadline)
        self._changed.set()
        return True

    def wake(self) -> None:
        """The agent leaves."""
        self._changed.set()

    def run(self) -> FlushResult:
        """Sees to it that the newest step is persistent in time; says what came of it.

        Raises PersistentStoreError, PeerUnavailableError, CorruptDataError.
        """
        ended = False
        try:
            while True:
                try:
                    result = self._run()
                    done, came = result.ending in ("committed", "nothing_left"), result.reason
                except Exception as error:  # Whatever it is, a notice that came meanwhile is met.
                    result, done, came = error, False, f"the newest step could not be drained: {error}"
                if ended := self._ends(done=done):
                    if isinstance(result, FlushResult):
                        return result
                    raise result
                _log.info("last call for %s: %s, and another one follows", self._registration.life, came)
        finally:
            if not ended:
                self._state = "over"
            self._leader.close()

    def _ends(self, *, done: bool) -> bool:
        """Whether this is all: a notice that came while this agent was leading is met in any case."""
        with self._guard:
            self._ended = time.monotonic()
            if self._next is None or self._stopped.is_set():
                self._state = "done" if done else "over"
                return True
            self._armed, self._deadline, self._next, self._state = self._ended, self._next, None, "armed"
            self._failures, self._failure, self._is_last_try = 0, None, False
            return False

    def _run(self) -> FlushResult:
        # These take a moment, which is there now.
        import emergency_ckpt.agent.draining  # noqa: F401

        while not self._stopped.is_set():
            now = time.monotonic()
            if (why := self._needless()) is not None:
                return stands_down(why)
            if now > self._until + AFTER_SECONDS:
                if self._failure is None:
                    return stands_down(f"the deadline passed {AFTER_SECONDS:g} s ago")
                if self._is_last_try:
                    raise self._failure
                # What failed may have stood still all the time, and the store goes on now.
                self._is_last_try = True
            estimate = self._estimate()
            call = last_call(now, self._deadline, estimate)
            self._begins = call.begins
            if call.begins > now:
                self._say(f"the newest complete step is drained in {call.begins - now:.1f} s", call.reason)
                self._wait(min(_POLL_SECONDS, call.begins - now))
                continue
            turn = self._turn(now, estimate)
            if isinstance(turn, FlushResult):
                return turn
            if turn == "mine" and (result := self._drain(call)) is not None:
                return result
            if turn != "mine":
                self._yield()
            self._wait(_POLL_SECONDS)
        return stands_down("the agent leaves")

    def _needless(self) -> str | None:
        life = self._registration.life
        if self._trainers.others_than(life):
            return "a later trainer lives here"
        states = self._trainers.states(life).values()
        if not any(state in ("alive", "gone") for state in states):
            return "the trainers of this host have said goodbye, or what they left is done"
        return None

    def _turn(self, now: float, estimate: Estimate) -> FlushResult | Literal["mine", "others"]:
        """Whose turn it is; what came of it where another agent has done it.

        One that has lower ones to ask is not seen to lead by them meanwhile: of several that begin at once the
        lowest finds nobody in its way, however long each of them asks.
        """
        for process, report in self._leader.lower():
            call = report.call
            if call is None:
                continue
            if call.state == "done" and call.seconds < now - self._armed:
                return stands_down(f"it was done by the agent of process {process}")
            in_time = call.state == "armed" and may_be_left_to(call.seconds, self._deadline - now, estimate)
            if call.state == "leading" or in_time:
                return "others"
        self._state = "leading"  # Before the others are asked: of two that lead one at least sees it.
        for endpoint, report in self._leader.reports().items():
            # One of a higher process that has begun before, or for which this one began too late: if it sees
            # this one as well, both let go, and the lower one comes first.
            if endpoint != self._own and report.call is not None and report.call.state == "leading":
                return "others"
        return "mine"

    def _drain(self, call: LastCall) -> FlushResult | None:
        """Leads; None where it is to be tried again."""
        from emergency_ckpt.agent.draining import check_life, open_store
        from emergency_ckpt.persistent.store import without_void

        destination = self._registration.destination
        try:
            store = open_store(destination)
            check_life(store, destination)
            steps, activations = store.steps(), store.activations()
        except StaleGenerationError as error:
            return stands_down(str(error))
        except PersistentStoreError as error:
            return self._fails("the persistent tier does not answer, and is asked again", error)
        newest = max((step.step_id for step in without_void(steps, activations)), default=None)
        leaving = set(self._leaving())
        for report in self._leader.reports().values():
            if report.leaving:
                leaving.update(report.processes)
        why = f"without the trainers, {call.reason}"
        if leaving and leaving != set(range(len(self._registration.agents))):
            why += f"; what is elsewhere, too, is not written by process {', '.join(map(str, sorted(leaving)))}"
        try:
            return self._leader.lead(store, newest, activations, leaving, self._busy, why)
        except EmergencyCheckpointError as error:
            if is_final(error):
                raise
            return self._fails("the newest step was not drained, which is tried again", error)

    def _fails(self, what: str, error: EmergencyCheckpointError) -> None:
        """Waits a while, in which others may lead whose store answers, before it is tried again."""
        self._failures, self._failure = self._failures + 1, error
        self._say(what, str(error))
        self._state = "aside"
        longest = min(_PAUSE_SECONDS * 2 ** min(self._failures - 1, 10), _LONGEST_PAUSE_SECONDS)
        self._wait(longest * (0.5 + JITTER.random()))
        self._yield()

    def _busy(self, step: StepId) -> str | None:
        """Why `step` need not be drained for now: a drain of it, or of a newer one, that still moves."""
        now = time.monotonic()
        running = [drain for report in self._leader.reports().values() for drain in report.running]
        if any(each >= step and not waits for each, waits in running):
            self._moved = now
        quiet = max(_LEAST_QUIET_SECONDS, min(_QUIET_SECONDS, (self._deadline - now) / 4))
        in_vain = now > self._moved + quiet
        awaited = waits_for(step, [RunningDrain(each, waits and in_vain) for each, waits in running])
        if awaited is None:
            return None
        self._say(f"{step} is left to the drain that is running", f"it is of {awaited.step}")
        return "it is drained already"

    def _yield(self) -> None:
        """Another agent comes first."""
        with self._guard:
            self._state = "armed"
            if self._next is not None:
                self._deadline, self._next = min(self._deadline, self._next), None

    def _say(self, what: str, why: str) -> None:
        if self._said != what:
            # Of the time that is left each look says something else.
            if self._said.partition(" in ")[0] != what.partition(" in ")[0]:
                _log.info("last call for %s: %s: %s", self._registration.life, what, why)
            self._said = what

    def _wait(self, seconds: float) -> None:
        self._changed.wait(seconds)
        self._changed.clear()
