"""What agents do together when the trainers of a life are gone: the newest step that they hold is drained.

The agent of the lowest process that is left leads (`leading`), and then deletes older steps by the rule of its
trainer. The step may be one of an earlier life: where the last one ended before it saved anything, that is the
newest. A later life of the run, here or in the store, ends it, and so does everything that is done already.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from typing import TYPE_CHECKING

from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.leading import FlushResult, Leader, stands_down
from emergency_ckpt.agent.orders import Registration
from emergency_ckpt.agent.trainers import State, Trainers
from emergency_ckpt.core.jitter import JITTER
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.retrying import Pauses, is_final, store_reason
from emergency_ckpt.core.trouble import Trouble
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError, StaleGenerationError

if TYPE_CHECKING:
    from emergency_ckpt.persistent.store import PersistentStore

_log = logging.getLogger("emergency_ckpt.agent")


@dataclasses.dataclass(frozen=True, slots=True)
class FlushTimes:
    """How long a flush waits, in seconds.

    Attributes:
      settle: before it begins: the trainer may come back at once.
      poll: between two looks.
      quiet: for parts that a drain waits for, when nobody writes one.
      patience: for trainers that live, here or elsewhere.
      store: for a store that fails; pauses: between two tries then.
    """

    settle: float = 2.0
    poll: float = 0.5
    quiet: float = 10.0
    patience: float = 180.0
    store: float = 3600.0
    pauses: Pauses = dataclasses.field(default_factory=lambda: Pauses(60.0))


class FlushSession:
    """One agent's part in the flush of one life, from the death of a trainer on. For a thread of its own."""

    def __init__(
        self,
        trainer: str,
        registration: Registration,
        trainers: Trainers,
        own: Endpoint,
        dial: str,
        stopped: threading.Event,
        times: FlushTimes = FlushTimes(),
    ) -> None:
        self._trainer = trainer
        self._registration = registration
        self._life = registration.life
        self._trainers = trainers
        self._stopped = stopped
        self._times = times
        self._quiet_since = time.monotonic()
        self._store_trouble = Trouble()
        self._leader = Leader(registration, own, dial, stopped)

    def run(self) -> FlushResult:
        """Sees to it that the newest step is drained; says what came of it.

        Raises PersistentStoreError, PeerUnavailableError, CorruptDataError.
        """
        try:
            return self._run()
        finally:
            self._leader.close()

    def _run(self) -> FlushResult:
        # Only agents that drain pay for the libraries of the persistent tier.
        from emergency_ckpt.agent.draining import check_life, open_store
        from emergency_ckpt.persistent.store import without_void

        times, destination = self._times, self._registration.destination
        store = open_store(destination)
        self._stopped.wait(times.settle)
        patience, store_patience = (time.monotonic() + seconds for seconds in (times.patience, times.store))
        give_up = patience + times.store + 2 * destination.timeout_seconds
        failures = 0
        while not self._stopped.is_set():
            if not self._trainers.is_gone(self._trainer):
                return stands_down("a trainer has taken over")
            now = time.monotonic()
            if now > give_up:
                return stands_down("others were not done in time")
            if self._trainers.others_than(self._life):
                if now > patience:
                    return stands_down("a later trainer lives here")
            else:
                lower = self._lower()
                if lower == "done":
                    return stands_down("it was done by the agent of a lower process")
                if lower is None and not self._busy(now < patience):
                    try:
                        check_life(store, destination)
                        steps, activations = store.steps(), store.activations()
                        newest = max((s.step_id for s in without_void(steps, activations)), default=None)
                        result = self._leader.lead(store, newest, activations)
                        assert result is not None  # It never waits for others.
                    except StaleGenerationError as error:
                        return stands_down(str(error))
                    except PersistentStoreError as error:
                        if is_final(error) or now > store_patience:
                            raise
                        failures += 1
                        self._wait_for_store(error, failures)
                        continue
                    return dataclasses.replace(result, deleted=self._tidy(store))
                if lower == "alive" and now > patience:
                    return stands_down("the trainer of a lower process lives")
            self._stopped.wait(times.poll)
        return stands_down("the agent leaves")

    def _wait_for_store(self, error: PersistentStoreError, failures: int) -> None:
        reason = store_reason(error)
        if self._store_trouble.is_new((type(error), reason)):
            _log.warning(
                "the flush waits for the persistent tier, at most %g s from its beginning: %s",
                self._times.store,
                error,
            )
        self._stopped.wait(self._times.pauses.before(failures, reason, JITTER.random()))

    # Who leads.

    def _lower(self) -> State | None:
        """The state of the lowest process below this one whose agent may lead; None where this one leads."""
        for process, report in self._leader.lower():
            state = report.processes.get(process)
            if state is not None and state != "left":
                return state
        return None

    def _busy(self, patient: bool) -> bool:
        """Whether there are drains to wait for before this agent leads, or, if it is `patient`, trainers.

        A drain that waits for a part which nobody writes waits in vain, if that is so for a while.
        """
        writing = waiting = False
        for report in self._leader.reports().values():
            writing |= report.writing > 0 or (patient and "alive" in report.processes.values())
            waiting |= report.drains > 0
        if writing:
            self._quiet_since = time.monotonic()
        return writing or (waiting and time.monotonic() < self._quiet_since + self._times.quiet)

    def _tidy(self, store: PersistentStore) -> tuple[StepId, ...]:
        """Retention, which no trainer is left to do. Steps that stay do no harm: a failure is logged."""
        from emergency_ckpt.agent.retention import apply_retention

        try:
            return tuple(apply_retention(store, self._registration.destination))
        except (PersistentStoreError, CorruptDataError, OSError) as error:
            _log.warning("older steps stay for now: %s", error)
            return ()
