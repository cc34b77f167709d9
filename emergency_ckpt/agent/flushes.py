"""What is left of trainers that died: one thread for each, which sees to it that the newest step is drained.

Every thread ends when the agent leaves, and has a limit of its own in any case.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from emergency_ckpt.agent.counters import CountedFlush, Counters
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.flush import FlushSession
from emergency_ckpt.agent.orders import Registration
from emergency_ckpt.agent.trainers import Trainers
from emergency_ckpt.agent.worker import join_all
from emergency_ckpt.errors import EmergencyCheckpointError

_JOIN_SECONDS = 10.0
_log = logging.getLogger("emergency_ckpt.agent")


class Flushes:
    """The flushes of one agent. `begin` comes first, in the event loop; then trainers may die."""

    def __init__(self) -> None:
        self._counters = Counters()
        self._settled: Callable[[], None] = lambda: None
        self._stopped = threading.Event()
        self._guard = threading.Lock()
        self._threads: dict[str, threading.Thread] = {}
        self._trainers: Trainers | None = None
        self._own: tuple[Endpoint, str] | None = None

    def begin(
        self,
        trainers: Trainers,
        own: Endpoint,
        dial: str,
        counters: Counters,
        settled: Callable[[], None],
    ) -> None:
        """`own`: where this agent is reached; `dial`: its address for itself; `settled`: called after each."""
        self._trainers, self._own = trainers, (own, dial)
        self._counters, self._settled = counters, settled

    @property
    def pending(self) -> int:
        """How many trainers died whose newest step is not yet seen to."""
        with self._guard:
            return sum(thread.is_alive() for thread in self._threads.values())

    def trainer_died(self, trainer: str, registration: Registration) -> None:
        """A trainer is gone without a goodbye. Called in the event loop."""
        if self._stopped.is_set() or self._trainers is None or self._own is None:
            return
        life = registration.life
        _log.warning("the trainer of process %d of %s died", registration.process, life)
        if not registration.flush:
            self._trainers.settle(trainer)
            self._settled()
            return
        self._counters.flushes_begun.inc()
        session = FlushSession(trainer, registration, self._trainers, *self._own, self._stopped)
        thread = threading.Thread(
            target=self._run, args=(session, trainer), name="emergency_ckpt flush", daemon=True
        )
        with self._guard:
            self._threads = {name: t for name, t in self._threads.items() if t.is_alive()}
            self._threads[trainer] = thread
        thread.start()

    def stop(self) -> None:
        """Lets all end soon; drains that they began go on."""
        self._stopped.set()

    def join(self) -> None:
        """Waits for the threads, not for ever."""
        with self._guard:
            threads = list(self._threads.values())
        join_all(threads, _JOIN_SECONDS)

    def _run(self, session: FlushSession, trainer: str) -> None:
        assert self._trainers is not None
        ending: CountedFlush = "failed"
        try:
            result = session.run()
            ending = result.ending
            _log.info("flush after the end of its trainer: %s", result.reason)
            for step in result.deleted:
                _log.info("deleted the persistent %s: newer ones are kept, or a restore left it behind", step)
            self._counters.deleted_steps.inc(len(result.deleted))
        except EmergencyCheckpointError as error:
            _log.error("the newest step could not be drained after the end of its trainer: %s", error)
        except Exception:
            _log.exception("the newest step could not be drained after the end of its trainer")
        finally:
            self._counters.count_flush(ending)
            if not self._stopped.is_set():  # Otherwise it is left to an agent that begins after this one.
                self._trainers.settle(trainer)
                self._settled()
