"""The last calls of one agent: which hosts go away, and, for each life of a run here, a thread that sees to it.

A notice is acted upon once for each life. Every thread ends when the agent leaves, and some time after the
deadline in any case.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable

from emergency_ckpt.agent.counters import CountedLastCall, Counters
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.last_call import AFTER_SECONDS, LastCallSession
from emergency_ckpt.agent.lives import CallReport
from emergency_ckpt.agent.orders import Life, Registration
from emergency_ckpt.agent.progress import ProgressBoard, Told
from emergency_ckpt.agent.trainers import Registered, Trainers
from emergency_ckpt.agent.worker import join_all
from emergency_ckpt.core.last_call import Estimate, estimate_drain, grace_deadline
from emergency_ckpt.errors import EmergencyCheckpointError
from emergency_ckpt.preemption.notice import Notice, NoticeKey

_JOIN_SECONDS = 10.0
_MOST_NOTICES = 100
# A deadline that has passed when it is heard of may be one of another clock.
_AT_LEAST_SECONDS = 10.0
_log = logging.getLogger("emergency_ckpt.agent")


@dataclasses.dataclass
class _Standing:
    """A notice that a host goes away: when (on the monotonic clock), and whose, as far as that is known."""

    notice: Notice
    deadline: float
    heard: float = dataclasses.field(default_factory=time.monotonic)
    here: bool = False
    processes: set[int] = dataclasses.field(default_factory=set)
    lives: set[Life] = dataclasses.field(default_factory=set)  # that it was acted upon for

    def is_acted_upon(self, now: float) -> bool:
        """Whether there is time for it."""
        return now < max(self.deadline, self.heard + _AT_LEAST_SECONDS)


class LastCalls:
    """Made before the agent serves; nothing is acted upon before `begin`. Safe to use from any thread."""

    def __init__(
        self,
        trainers: Trainers,
        board: ProgressBoard,
        counters: Counters,
        largest_slot: Callable[[], int],
    ) -> None:
        """`largest_slot`: in bytes, of those that lie here."""
        self._trainers = trainers
        self._board = board
        self._counters = counters
        self._largest_slot = largest_slot
        self._stopped = threading.Event()
        self._guard = threading.Lock()
        self._standing: dict[NoticeKey, _Standing] = {}
        self._sessions: dict[Life, LastCallSession] = {}
        self._threads: dict[Life, threading.Thread] = {}
        self._own: tuple[Endpoint, str] | None = None

    def begin(self, own: Endpoint, dial: str) -> None:
        """`own`: where this agent is reached; `dial`: its address for itself."""
        self._own = (own, dial)

    @property
    def pending(self) -> int:
        """How many have not ended."""
        with self._guard:
            return sum(thread.is_alive() for thread in self._threads.values())

    @property
    def leaving(self) -> bool:
        """Whether this host goes away."""
        now = time.monotonic()
        with self._guard:
            return any(each.here and _is_standing(each, now) for each in self._standing.values())

    def report(self, life: Life) -> CallReport | None:
        """What other agents are told."""
        with self._guard:
            session = self._sessions.get(life)
        return None if session is None else session.report()

    def allows(self, life: Life) -> bool:
        """Whether a trainer of this life lets agents drain without it while it lives."""
        return bool(self._wanting(life))

    # Notices.

    def hear_here(self, notice: Notice) -> None:
        """This host goes away, or something else is said that is no affair of this."""
        self._hear(notice, here=True, process=None)

    def hear_of_other(self, notice: Notice, process: int | None) -> None:
        """The host of another process goes away, or of this one; None: it is not known which."""
        self._hear(notice, here=False, process=process)

    def _hear(self, notice: Notice, *, here: bool, process: int | None) -> None:
        if notice.kind != "terminate":
            return
        ends = grace_deadline(notice.received, notice.deadline)
        own = {each.registration.process for each in self._trainers.registered().values()}
        with self._guard:
            new = _Standing(notice, time.monotonic() + ends - time.time())
            known = self._standing.get(notice.key)
            if known is None or (not known.is_acted_upon(new.heard) and new.is_acted_upon(new.heard)):
                # What is over, and is said anew with time left, counts anew: a host may stay for long.
                self._standing.pop(notice.key, None)
                while len(self._standing) >= _MOST_NOTICES:
                    del self._standing[next(iter(self._standing))]
                self._standing[notice.key] = new
            standing = self._standing[notice.key]
            standing.here |= here or process in own
            if process is not None:
                standing.processes.add(process)
        self.look()

    def look(self) -> None:
        """Acts upon the notices that stand, for each life that has not been seen to for them."""
        if self._stopped.is_set() or self._own is None:
            return
        known = self._trainers.registered()
        self._board.keep_only(known)
        lives = {each.registration.life for each in known.values() if each.state in ("alive", "gone")}
        now = time.monotonic()
        for life in lives:
            if not any(told.progress.last_call for _, told in self._told(life)):
                continue
            with self._guard:
                new = [
                    each
                    for each in self._standing.values()
                    if life not in each.lives and each.is_acted_upon(now)
                ]
                for each in new:
                    each.lives.add(life)
            if new:
                self._arm(life, min(each.deadline for each in new), "; ".join(str(each.notice) for each in new))

    def begin_now(self, life: Life, why: str) -> threading.Thread | None:
        """Has the newest complete step drained at once; the thread that does it. None where nobody may."""
        if self._stopped.is_set() or self._own is None or not self.allows(life):
            return None
        self._arm(life, time.monotonic(), why)
        with self._guard:
            return self._threads.get(life)

    def stop(self) -> None:
        """Lets all end soon; drains that they began go on."""
        self._stopped.set()
        with self._guard:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.wake()

    def join(self) -> None:
        """Waits for the threads, not for ever."""
        with self._guard:
            threads = list(self._threads.values())
        join_all(threads, _JOIN_SECONDS)

    # For each life.

    def _wanting(self, life: Life) -> list[Registration]:
        return [each.registration for each, told in self._told(life) if told.progress.allows_urgent]

    def _told(self, life: Life) -> list[tuple[Registered, Told]]:
        known = self._trainers.registered()
        return [
            (each, told)
            for id_, each in known.items()
            if each.registration.life == life and (told := self._board.of(id_)) is not None
        ]

    def _arm(self, life: Life, deadline: float, why: str) -> None:
        wanting = self._wanting(life)
        assert self._own is not None
        with self._guard:
            running = self._threads.get(life)
            if running is not None and running.is_alive() and self._sessions[life].hurry(deadline):
                return
            if not wanting:
                return
            session = LastCallSession(
                min(wanting, key=lambda registration: registration.process),
                self._trainers,
                *self._own,
                self._stopped,
                deadline,
                self._estimate,
                lambda: self._leaving_processes(life),
            )
            self._sessions = {
                each: session for each, session in self._sessions.items() if self._threads[each].is_alive()
            }
            self._threads = {each: thread for each, thread in self._threads.items() if thread.is_alive()}
            thread = threading.Thread(
                target=self._run, args=(session, life), name="emergency_ckpt last call", daemon=True
            )
            self._sessions[life], self._threads[life] = session, thread
            self._counters.last_calls_begun.inc()
            _log.warning(
                "last call for %s: %.1f s are left (%s)", life, max(0.0, deadline - time.monotonic()), why
            )
            thread.start()

    def _run(self, session: LastCallSession, life: Life) -> None:
        ending: CountedLastCall = "failed"
        try:
            result = session.run()
            ending = result.ending
            _log.info("last call for %s: %s", life, result.reason)
        except EmergencyCheckpointError as error:
            _log.error("last call for %s: the newest step could not be drained: %s", life, error)
        except Exception:
            _log.exception("last call for %s: the newest step could not be drained", life)
        finally:
            self._counters.count_last_call(ending)

    def _estimate(self) -> Estimate:
        return estimate_drain(self._counters.recent_drain_seconds, self._largest_slot())

    def _leaving_processes(self, life: Life) -> set[int]:
        here = set(self._trainers.states(life)) if self.leaving else set[int]()
        now = time.monotonic()
        with self._guard:
            standing = [each for each in self._standing.values() if _is_standing(each, now)]
        return here.union(*(each.processes for each in standing))


def _is_standing(standing: _Standing, now: float) -> bool:
    """Whether it is to be reckoned with: also for a while after the deadline."""
    return now < standing.deadline + AFTER_SECONDS
