"""What agents do together when the trainers of a life are gone: the newest step that they hold is drained.

The agent of the lowest process that is left leads: it asks all for what they hold, chooses (`core.flush`), and
asks those that hold the step for their parts; then it deletes older steps by the rule of its trainer. Every
agent drains to where its own trainer said. The step may be one of an earlier life: where the last one ended
before it saved anything, that is the newest. A later life of the run, here or in the store, ends it, and so
does everything that is done already.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import random
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.counters import CountedFlush
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.order_client import DrainReport, LifeReport, OrderClient
from emergency_ckpt.agent.orders import Life, Registration, Share
from emergency_ckpt.agent.trainers import State, Trainers
from emergency_ckpt.core.flush import Copy, Flush, choose_flush
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.retrying import Pauses, is_final, store_error, store_reason
from emergency_ckpt.errors import (
    CorruptDataError,
    PeerUnavailableError,
    PersistentStoreError,
    StaleGenerationError,
)

if TYPE_CHECKING:
    from emergency_ckpt.persistent.store import PersistentStore

# Attempts of flushes are numbered apart from those of trainers, and apart from each other's.
_FIRST_ORDINAL = 1_000_000_000
_ORDINALS_PER_PROCESS = 1000
_TRIES = 8
_TIMEOUT = timedelta(seconds=5)
_ASKED_AT_ONCE = 32
_LOOK = timedelta(seconds=2)
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


@dataclasses.dataclass(frozen=True, slots=True)
class FlushResult:
    """What came of a flush, as it is counted, and in words; the steps that retention deleted afterwards."""

    ending: CountedFlush
    reason: str
    deleted: tuple[StepId, ...] = ()


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
        self._own = own
        self._dial = dial
        self._stopped = stopped
        self._times = times
        self._quiet_since = time.monotonic()
        self._lost: dict[Endpoint, str] = {}  # agents that cannot be reached
        self._store_error: tuple[type[Exception], str] | None = None  # that was logged last
        self._earlier: dict[int, Life | None] = {}  # lives of the run by generation, as the store knows them
        self._next_ordinal = _FIRST_ORDINAL + _ORDINALS_PER_PROCESS * registration.process
        self._pool = concurrent.futures.ThreadPoolExecutor(_ASKED_AT_ONCE, "emergency_ckpt flush")

    def run(self) -> FlushResult:
        """Sees to it that the newest step is drained; says what came of it.

        Raises PersistentStoreError, PeerUnavailableError, CorruptDataError.
        """
        try:
            return self._run()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

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
                return _stands_down("a trainer has taken over")
            now = time.monotonic()
            if now > give_up:
                return _stands_down("others were not done in time")
            if self._trainers.others_than(self._life):
                if now > patience:
                    return _stands_down("a later trainer lives here")
            else:
                lower = self._lower()
                if lower == "done":
                    return _stands_down("it was done by the agent of a lower process")
                if lower is None and not self._busy(now < patience):
                    try:
                        check_life(store, destination)
                        steps, activations = store.steps(), store.activations()
                        newest = max((s.step_id for s in without_void(steps, activations)), default=None)
                        result = self._lead(store, newest, activations)
                    except StaleGenerationError as error:
                        return _stands_down(str(error))
                    except PersistentStoreError as error:
                        if is_final(error) or now > store_patience:
                            raise
                        failures += 1
                        self._wait_for_store(error, failures)
                        continue
                    return dataclasses.replace(result, deleted=self._tidy(store))
                if lower == "alive" and now > patience:
                    return _stands_down("the trainer of a lower process lives")
            self._stopped.wait(times.poll)
        return _stands_down("the agent leaves")

    def _wait_for_store(self, error: PersistentStoreError, failures: int) -> None:
        reason = store_reason(error)
        if self._store_error != (type(error), reason):
            self._store_error = type(error), reason
            _log.warning(
                "the flush waits for the persistent tier, at most %g s from its beginning: %s",
                self._times.store,
                error,
            )
        self._stopped.wait(self._times.pauses.before(failures, reason, random.random()))

    # Who leads.

    def _lower(self) -> State | None:
        """The state of the lowest process below this one whose agent may lead; None where this one leads."""
        for process in range(self._registration.process):
            endpoint = self._registration.agents[process]
            if endpoint is None or endpoint in self._lost:
                continue
            report = self._look_at(endpoint)
            state = report.processes.get(process) if report else None
            if state is not None and state != "left":
                return state
        return None

    def _busy(self, patient: bool) -> bool:
        """Whether there are drains to wait for before this agent leads, or, if it is `patient`, trainers.

        A drain that waits for a part which nobody writes waits in vain, if that is so for a while.
        """
        writing = waiting = False
        for report in self._pool.map(self._look_at, self._agents()):
            if report is not None:
                writing |= report.writing > 0 or (patient and "alive" in report.processes.values())
                waiting |= report.drains > 0
        if writing:
            self._quiet_since = time.monotonic()
        return writing or (waiting and time.monotonic() < self._quiet_since + self._times.quiet)

    def _agents(self) -> list[Endpoint]:
        """Every agent of the life that can be reached, once."""
        return [
            endpoint
            for endpoint in dict.fromkeys(self._registration.agents)
            if endpoint is not None and endpoint not in self._lost
        ]

    def _look_at(self, endpoint: Endpoint) -> LifeReport | None:
        for last in (False, True):
            try:
                return self._orders(endpoint).look_at(self._life)
            except PeerUnavailableError as error:
                if last:
                    self._lost[endpoint] = str(error)
                    _log.warning("flush without an agent: %s", error)
        return None

    def _orders(self, endpoint: Endpoint) -> OrderClient:
        return OrderClient(endpoint, _TIMEOUT, self._dial if endpoint == self._own else None)

    # Leading.

    def _lead(
        self, store: PersistentStore, committed: StepId | None, activations: Collection[Activation]
    ) -> FlushResult:
        struck: set[tuple[int, StepId]] = set()
        layouts: dict[str, Layout] = {}
        for _ in range(_TRIES):
            copies, layouts = self._gather(layouts, store)
            usable = [copy for copy in copies if (copy.process, copy.step) not in struck]
            flush, reason = choose_flush(usable, layouts, committed, activations)
            if flush is None:
                return FlushResult("nothing_left", f"nothing is left to be drained: {reason}")
            _log.info("flushing %s", reason)
            ended = self._carry_out(flush, self._fresh_ordinal(store, flush.step))
            report = ended[flush.committer]
            if report.ending == "done":
                return FlushResult("committed", f"{flush.step} was committed: {reason}")
            if report.ending == "superseded":
                return _stands_down(report.reason)
            bad = {(copy.process, flush.step) for copy, said in ended.items() if said.ending == "corrupt"}
            bad |= {(copy.process, flush.step) for copy, said in ended.items() if said.ending is None}
            if not bad or self._stopped.is_set():
                raise store_error(report.cause, f"{flush.step} was not committed: {report.reason}")
            _log.warning("%s is tried again without processes %s", flush.step, sorted(p for p, _ in bad))
            struck |= bad
        raise PersistentStoreError(f"{_TRIES} tries came to nothing")

    def _fresh_ordinal(self, store: PersistentStore, step: StepId) -> int:
        """Of an attempt that no flush has begun: one whose agents died may have left its claim or parts."""
        from emergency_ckpt.persistent.attempts import Attempt
        from emergency_ckpt.persistent.records import Generation

        life = self._saved_by(step, store) or self._life
        while True:
            ordinal = self._next_ordinal
            self._next_ordinal += 1
            own = Generation(life.generation, life.nonce)
            attempt = Attempt(own, step.step, self._registration.destination.item, ordinal)
            if not store.attempt_records(attempt).entries():
                return ordinal

    def _tidy(self, store: PersistentStore) -> tuple[StepId, ...]:
        """Retention, which no trainer is left to do. Steps that stay do no harm: a failure is logged."""
        from emergency_ckpt.agent.retention import apply_retention

        try:
            return tuple(apply_retention(store, self._registration.destination))
        except (PersistentStoreError, CorruptDataError, OSError) as error:
            _log.warning("older steps stay for now: %s", error)
            return ()

    def _gather(
        self, known: Mapping[str, Layout], store: PersistentStore
    ) -> tuple[list[Copy], dict[str, Layout]]:
        """What all agents hold of this life and earlier ones, and the layouts of that."""
        layouts = dict(known)
        process_of: dict[Endpoint, int] = {}
        for process, endpoint in enumerate(self._registration.agents):
            if endpoint is not None:
                process_of.setdefault(endpoint, process)
        copies: list[Copy] = []
        agents = self._agents()
        for endpoint, held in zip(agents, self._pool.map(self._inventory, agents), strict=True):
            for copy in held:
                if not self._saved_by(copy.step, store):
                    continue
                copies.append(dataclasses.replace(copy, process=process_of[endpoint]))
                if copy.layout not in layouts:
                    try:
                        with self._peer(endpoint) as client:
                            layouts[copy.layout] = client.layout(copy.layout)
                    except (PeerUnavailableError, CorruptDataError) as error:
                        _log.warning("the layout %s cannot be had: %s", copy.layout, error)
        return copies, layouts

    def _saved_by(self, step: StepId, store: PersistentStore) -> Life | None:
        """The life that saved a step; None where the store does not know it."""
        number = step.generation
        if number == self._life.generation:
            return self._life
        if number not in self._earlier:
            found = store.generation(number)
            life = None if found is None else Life(self._life.run, found.number, found.nonce)
            self._earlier[number] = life
            if life is None:
                _log.warning("steps of generation %d are left alone: the store has no record of it", number)
        return self._earlier[number]

    def _inventory(self, endpoint: Endpoint) -> list[Copy]:
        """The slots of one agent; its process is filled in later."""
        life = self._life
        try:
            if not self._orders(endpoint).look_at(life).processes:
                return []  # It was started anew and knows nothing of this life: it would drain nothing.
            with self._peer(endpoint) as client:
                held = client.inventory()
        except PeerUnavailableError as error:
            self._lost[endpoint] = str(error)
            return []
        return [
            Copy(0, h.id.step, h.id.layout, h.id.position, h.digest, h.missing == 0, h.extras_of)
            for h in held
            if h.id.run == life.run and _is_of(h.id.step.generation, h.nonce, life)
        ]

    def _peer(self, endpoint: Endpoint) -> PeerClient:
        return PeerClient(endpoint, _TIMEOUT, self._dial if endpoint == self._own else None)

    def _carry_out(self, flush: Flush, ordinal: int) -> dict[Copy, DrainReport]:
        """Lets all who hold the step drain their parts; how each ended. Ending None: its agent is gone."""

        def begin(copy: Copy) -> str | DrainReport:
            of = self._earlier.get(flush.step.generation)
            share = Share(
                step=flush.step.step,
                ordinal=ordinal,
                layout=flush.layout,
                position=copy.position,
                holders=flush.holders,
                commits=copy == flush.committer,
                of=of,
            )
            try:
                return self._of(copy).begin_of_life(self._life, share)
            except PeerUnavailableError as error:
                return DrainReport(None, 0, str(error))

        begun = dict(zip(flush.copies, self._pool.map(begin, flush.copies), strict=True))
        ended = {copy: said for copy, said in begun.items() if isinstance(said, DrainReport)}
        running = {copy: said for copy, said in begun.items() if isinstance(said, str)}
        deadline = time.monotonic() + 2 * self._registration.destination.timeout_seconds
        committer = flush.committer
        while running:
            for copy, report in self._looks(running):
                if report.ending is not None or report.reason:
                    ended[copy] = report
                    del running[copy]
            if committer in ended:
                # What others still write is of no use any more, or is in the step already.
                ended |= {copy: DrainReport("failed", 0, "the committer ended first") for copy in running}
                break
            failed = next((said.reason for said in ended.values() if said.ending != "done"), None)
            if time.monotonic() > deadline:
                failed = failed or "the time limit of the flush is over"
            if failed is not None or self._stopped.is_set():
                self._give_up(committer, running[committer], failed or "the agent leaves")
            if self._stopped.is_set():
                ended |= {copy: DrainReport("failed", 0, "the agent leaves") for copy in running}
                break
        return ended

    def _looks(self, running: Mapping[Copy, str]) -> Iterable[tuple[Copy, DrainReport]]:
        """One look at each, all at once; one with a reason and no ending: its agent is gone."""

        def look(item: tuple[Copy, str]) -> DrainReport:
            copy, drain = item
            try:
                return self._of(copy).look(drain, _LOOK)
            except PeerUnavailableError as error:
                return DrainReport(None, 0, str(error))

        items = tuple(running.items())
        return [(copy, said) for (copy, _), said in zip(items, self._pool.map(look, items), strict=True)]

    def _give_up(self, copy: Copy, drain: str, reason: str) -> None:
        try:
            self._of(copy).give_up(drain, reason)
        except PeerUnavailableError as error:
            _log.warning("the committer of a flush cannot be told to give up: %s", error)

    def _of(self, copy: Copy) -> OrderClient:
        endpoint = self._registration.agents[copy.process]
        assert endpoint is not None
        return self._orders(endpoint)


def _is_of(generation: int, nonce: str, life: Life) -> bool:
    """Whether a slot is of this life, or of an earlier one: those have the nonce of whoever restored them."""
    return generation < life.generation or (generation, nonce) == (life.generation, life.nonce)


def _stands_down(why: str) -> FlushResult:
    return FlushResult("stood_down", f"nothing is done: {why}")
