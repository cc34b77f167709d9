"""Watches whether the trainers of this host get on: of a step that takes far too long is told who is behind.

Where the trainer wants it, it is ended some time later, once the newest complete step is persistent, so that
the job restarts. A process is signalled only where its number means the same here as there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import select
import signal
import threading
import time
from typing import Any

from emergency_ckpt.agent.counters import Counters
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.last_calls import LastCalls
from emergency_ckpt.agent.leading import Leader
from emergency_ckpt.agent.orders import Registration
from emergency_ckpt.agent.progress import ProgressBoard, Told
from emergency_ckpt.agent.trainers import Trainers
from emergency_ckpt.core.stalls import who_is_behind

_LOOK_SECONDS = 1.0
# A trainer tells every two seconds, also while it hangs. One that does not is stopped, or keeps the GIL.
_SILENT_SECONDS = 10.0
_TERM_SECONDS = 10.0
_KILL_SECONDS = 10.0
_JOIN_SECONDS = 10.0
_log = logging.getLogger("emergency_ckpt.agent")


@dataclasses.dataclass
class _Stall:
    """One that goes on: of which step, since when (as far as is told of), and who is behind."""

    step: int | None
    process: int
    seconds: float
    behind: str = ""
    ending: threading.Thread | None = None


class Stalls:
    """The watch of one agent, in a thread of its own, from `begin` to `stop`."""

    def __init__(self, trainers: Trainers, board: ProgressBoard, calls: LastCalls, counters: Counters) -> None:
        self._trainers = trainers
        self._board = board
        self._calls = calls
        self._counters = counters
        self._stopped = threading.Event()
        self._guard = threading.Lock()
        self._stalls: dict[str, _Stall] = {}
        self._own: tuple[Endpoint, str] | None = None
        self._thread = threading.Thread(target=self._watch, name="emergency_ckpt stalls", daemon=True)

    def begin(self, own: Endpoint, dial: str) -> None:
        """`own`: where this agent is reached; `dial`: its address for itself."""
        self._own = (own, dial)
        self._thread.start()

    def stop(self) -> None:
        """Ends soon; no trainer is ended any more."""
        self._stopped.set()

    def join(self) -> None:
        """Waits for the threads, not for ever."""
        threads = [stall.ending for stall in self._stalls.values() if stall.ending is not None]
        for thread in (self._thread, *threads):
            if thread.ident is not None:
                thread.join(_JOIN_SECONDS)

    def told(self) -> list[dict[str, Any]]:
        """Those that go on, for `GET /v1/status`."""
        with self._guard:
            return [
                {
                    "process": stall.process,
                    "step": stall.step,
                    "seconds": round(stall.seconds, 1),
                    "behind": stall.behind,
                }
                for stall in self._stalls.values()
            ]

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            try:
                self._look()
            except Exception:
                _log.exception("the trainers could not be looked at")

    def _look(self) -> None:
        known = self._trainers.registered()
        for trainer, each in known.items():
            told = self._board.of(trainer)
            seconds = told.stall_seconds if told is not None and each.state == "alive" else None
            with self._guard:
                stall = self._stalls.get(trainer)
            if told is None or seconds is None:
                self._over(trainer, stall, each.state == "alive")
                continue
            if stall is None or stall.step != told.progress.step:
                stall = _Stall(told.progress.step, each.registration.process, seconds)
                stall.behind = self._who_is_behind(each.registration)
                with self._guard:
                    self._stalls[trainer] = stall
                self._tell(stall, told, each.registration)
            stall.seconds = seconds
            limits = told.progress.limits
            allowed = limits.allowed_seconds(told.progress.median_seconds) or 0.0
            if limits.restart_seconds and seconds > allowed + limits.restart_seconds and stall.ending is None:
                stall.ending = threading.Thread(
                    target=self._end,
                    args=(trainer, each.registration, told),
                    name="emergency_ckpt restart",
                    daemon=True,
                )
                stall.ending.start()
        for trainer in [trainer for trainer in self._stalls if trainer not in known]:
            self._over(trainer, self._stalls[trainer], lives=False)

    def _over(self, trainer: str, stall: _Stall | None, lives: bool) -> None:
        if stall is None or (stall.ending is not None and stall.ending.is_alive()):
            return
        with self._guard:
            del self._stalls[trainer]
        if lives:
            _log.warning("process %d goes on, after %.1f s at one step", stall.process, stall.seconds)

    def _tell(self, stall: _Stall, told: Told, registration: Registration) -> None:
        self._counters.stalls.inc()
        median = told.progress.median_seconds
        usual = "it is the first one" if median is None else f"recent ones took {median:.3g} s"
        _log.warning(
            "process %d of %s hangs: %.1f s have passed since %s, and %s; %s",
            stall.process,
            registration.life,
            stall.seconds,
            "training began" if stall.step is None else f"step {stall.step}",
            usual,
            stall.behind,
        )

    def _who_is_behind(self, registration: Registration) -> str:
        """Asks all agents of the life."""
        assert self._own is not None
        leader = Leader(registration, *self._own, self._stopped, "urgent")
        steps: dict[int, int | None] = {}
        silent: set[int] = set(range(len(registration.agents)))
        try:
            for report in leader.reports().values():
                for process, (step, age) in report.progress.items():
                    steps[process] = step
                    if age <= _SILENT_SECONDS:
                        silent.discard(process)
        finally:
            leader.close()
        return who_is_behind(steps, silent)

    # Ending it.

    def _end(self, trainer: str, registration: Registration, told: Told) -> None:
        """Sees to it that the newest step is persistent, and ends the trainer, if it still hangs."""
        process, life = registration.process, registration.life
        _log.warning(
            "process %d has hung for too long, and is ended once the newest step is persistent", process
        )
        call = self._calls.begin_now(life, f"process {process} hangs")
        until = time.monotonic() + 2 * registration.destination.timeout_seconds
        while call is not None and call.is_alive() and time.monotonic() < until:
            if self._stopped.wait(0.1):
                return
        now = self._board.of(trainer)
        if now is None or now.progress.step != told.progress.step or now.stall_seconds is None:
            _log.warning("process %d goes on, and is left alone", process)
            return
        if (why := _not_ours(told)) is not None:
            _log.error("process %d is not ended: %s", process, why)
            return
        try:
            handle = os.pidfd_open(told.progress.pid)
        except OSError as error:
            _log.error("process %d is not ended: %s", process, error.strerror)
            return
        try:
            # The number is that of the trainer as long as it lives; it was alive when the handle was there.
            if not self._trainers.lives(trainer) or self._stopped.is_set():
                return
            self._counters.ended_trainers.inc()
            for number, seconds in ((signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
                _log.warning(
                    "process %d (pid %d) gets %s, so that the job restarts",
                    process,
                    told.progress.pid,
                    number.name,
                )
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, number)
                if select.select([handle], [], [], seconds)[0]:
                    return
            _log.error("process %d (pid %d) does not end, SIGKILL included", process, told.progress.pid)
        except OSError as error:
            _log.error("process %d is not ended: %s", process, error.strerror)
        finally:
            os.close(handle)


def _not_ours(told: Told) -> str | None:
    """Why the number of its process means nothing here; None where it does."""
    try:
        own = os.stat("/proc/self/ns/pid").st_ino
    except OSError as error:
        return f"the namespace of processes is not known here ({error.strerror})"
    if own != told.progress.pid_namespace:
        return "it is in another namespace of processes (another container) than its agent; end it there"
    return None
