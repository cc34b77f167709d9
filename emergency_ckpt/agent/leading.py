"""One agent leads the others of a life: it asks what they hold, chooses a step, and has each drain its part.

Every agent drains to where its own trainer said. An agent that cannot be reached is left out for a while.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.counters import CountedFlush
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.order_client import DrainReport, LifeReport, OrderClient
from emergency_ckpt.agent.orders import Life, Registration, Share
from emergency_ckpt.core.flush import Copy, Flush, choose_flush
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import Activation, StepId, is_void
from emergency_ckpt.core.retrying import store_error
from emergency_ckpt.errors import (
    CorruptDataError,
    PeerUnavailableError,
    PersistentStoreError,
)

if TYPE_CHECKING:
    from emergency_ckpt.persistent.attempts import Attempt
    from emergency_ckpt.persistent.store import PersistentStore

Occasion = Literal["gone", "urgent"]
"""Why agents drain: the trainers are gone; or time is short, and trainers may live."""

# Attempts of flushes are numbered apart from those of trainers, and apart from each other's.
_FIRST_ORDINAL: Mapping[Occasion, int] = {"gone": 1_000_000_000, "urgent": 2_000_000_000}
_ORDINALS_PER_PROCESS = 1000
_TRIES = 8
_TIMEOUT = timedelta(seconds=5)
_ASKED_AT_ONCE = 32
_LOOK = timedelta(seconds=2)
_ASK = {"gone": _TIMEOUT, "urgent": timedelta(seconds=2)}
_LOWER_AT_ONCE = 8
_ASKED_EVERY = 1.0
_log = logging.getLogger("emergency_ckpt.agent")


@dataclasses.dataclass(frozen=True, slots=True)
class FlushResult:
    """What came of a flush, as it is counted, and in words; the steps that retention deleted afterwards."""

    ending: CountedFlush
    reason: str
    deleted: tuple[StepId, ...] = ()


class Leader:
    """The agents of one life, as seen by one of them. Of one thread; `close` ends its helpers."""

    def __init__(
        self,
        registration: Registration,
        own: Endpoint,
        dial: str,
        stopped: threading.Event,
        occasion: Occasion = "gone",
        forgiving_seconds: float = 30.0,
        waiting_seconds: float = 10.0,
    ) -> None:
        """An agent that could not be reached is asked again after `forgiving_seconds`.

        Where it may hold what is missing of a step that others hold a part of, and time is not short, it is
        asked again for about `waiting_seconds`, once.
        """
        self._registration = registration
        self._life = registration.life
        self._own = own
        self._dial = dial
        self._stopped = stopped
        self._occasion: Occasion = occasion
        self._forgiving_seconds = forgiving_seconds
        self._waiting_seconds = waiting_seconds if occasion == "gone" else 0.0
        self._waits_until: float | None = None
        self._lost: dict[Endpoint, float] = {}  # agents that could not be reached, and when
        self._left: list[Attempt] = []  # that were not committed
        self._earlier: dict[int, Life | None] = {}  # lives of the run by generation, as the store knows them
        self._next_ordinal = _FIRST_ORDINAL[occasion] + _ORDINALS_PER_PROCESS * registration.process
        self._pool = concurrent.futures.ThreadPoolExecutor(_ASKED_AT_ONCE, "emergency_ckpt flush")

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    # Asking.

    def reports(self) -> dict[Endpoint, LifeReport]:
        """What every agent that can be reached knows of the life."""
        agents = self._agents()
        found = zip(agents, self._pool.map(self.look_at, agents), strict=True)
        return {endpoint: report for endpoint, report in found if report is not None}

    def lower(self) -> Iterable[tuple[int, LifeReport]]:
        """The processes below this one whose agents can be reached, ascending, and what they know."""
        agents = enumerate(self._registration.agents[: self._registration.process])
        there = [
            (p, endpoint) for p, endpoint in agents if endpoint is not None and not self._is_lost(endpoint)
        ]
        for first in range(0, len(there), _LOWER_AT_ONCE):
            some = there[first : first + _LOWER_AT_ONCE]
            asked = list(dict.fromkeys(endpoint for _, endpoint in some))
            found = dict(zip(asked, self._pool.map(self.look_at, asked), strict=True))
            for process, endpoint in some:
                if (report := found[endpoint]) is not None:
                    yield process, report

    def look_at(self, endpoint: Endpoint) -> LifeReport | None:
        """What one agent knows; None where it cannot be reached."""
        for last in (False, True):
            try:
                report = self._orders(endpoint, _ASK[self._occasion]).look_at(self._life)
                self._lost.pop(endpoint, None)
                return report
            except PeerUnavailableError as error:
                if last:
                    self._lose(endpoint, error)
        return None

    def _ask_again(self) -> None:
        """Those that could not be reached are asked again; that they still cannot is no news."""
        self._lost = dict.fromkeys(self._lost, -math.inf)

    def _lose(self, endpoint: Endpoint, error: PeerUnavailableError) -> None:
        if endpoint not in self._lost:
            _log.warning("flush without an agent: %s", error)
        self._lost[endpoint] = time.monotonic()

    def _is_lost(self, endpoint: Endpoint) -> bool:
        lost = self._lost.get(endpoint)
        return lost is not None and time.monotonic() < lost + self._forgiving_seconds

    @property
    def lost(self) -> list[int]:
        """The processes whose agents are not there, or cannot be reached."""
        agents = enumerate(self._registration.agents)
        return [process for process, endpoint in agents if endpoint is None or self._is_lost(endpoint)]

    def _agents(self) -> list[Endpoint]:
        """Every agent of the life that can be reached, once."""
        return [
            endpoint
            for endpoint in dict.fromkeys(self._registration.agents)
            if endpoint is not None and not self._is_lost(endpoint)
        ]

    def _orders(self, endpoint: Endpoint, timeout: timedelta = _TIMEOUT) -> OrderClient:
        return OrderClient(endpoint, timeout, self._dial if endpoint == self._own else None)

    # Leading.

    def lead(
        self,
        store: PersistentStore,
        committed: StepId | None,
        activations: Collection[Activation],
        leaving: Collection[int] = (),
        busy: Callable[[StepId], str | None] = lambda _: None,
        why: str = "",
    ) -> FlushResult | None:
        """Has the newest whole step after `committed` drained, by processes that are not `leaving` if possible.

        `busy` is asked about that step before anything is begun: where it gives a reason, this returns None.
        `why` it is done goes into the log.

        Raises PersistentStoreError where the step could not be drained.
        """
        struck: set[tuple[int, StepId]] = set()
        layouts: dict[str, Layout] = {}
        for _ in range(_TRIES):
            flush, reason = self._choose(store, struck, layouts, committed, activations, leaving)
            if flush is None:
                if self._waits_until is not None and self._stopped.is_set():
                    return stands_down("the agent leaves")
                return FlushResult("nothing_left", f"nothing is left to be drained: {reason}")
            if busy(flush.step) is not None:
                return None
            _log.info("flushing %s%s", reason, f"; {why}" if why else "")
            attempt = self._fresh_attempt(store, flush.step)
            ended = self._carry_out(flush, attempt.ordinal)
            report = ended[flush.committer]
            if report.ending == "done":
                self._abandon_left(store)
                return FlushResult("committed", f"{flush.step} was committed: {reason}")
            if report.ending == "superseded":
                return stands_down(report.reason)
            self._left.append(attempt)
            bad = {(copy.process, flush.step) for copy, said in ended.items() if said.ending == "corrupt"}
            bad |= {(copy.process, flush.step) for copy, said in ended.items() if said.ending is None}
            if self._stopped.is_set() and self._occasion == "urgent":
                return stands_down(f"the agent leaves, and the drain of {flush.step} goes on without it")
            if not bad or self._stopped.is_set():
                raise store_error(report.cause, f"{flush.step} was not committed: {report.reason}")
            _log.warning("%s is tried again without processes %s", flush.step, sorted(p for p, _ in bad))
            struck |= bad
        raise PersistentStoreError(f"{_TRIES} tries came to nothing")

    def _choose(
        self,
        store: PersistentStore,
        struck: Collection[tuple[int, StepId]],
        layouts: dict[str, Layout],
        committed: StepId | None,
        activations: Collection[Activation],
        leaving: Collection[int],
    ) -> tuple[Flush | None, str]:
        """As `choose_flush`, of what agents hold and was not struck; adds to the layouts that are known.

        Where a newer step than the chosen one is not whole, agents that cannot be reached are waited for.
        """
        while True:
            copies = [c for c in self._gather(layouts, store) if (c.process, c.step) not in struck]
            flush, reason = choose_flush(copies, layouts, committed, activations, leaving)
            held = max((copy.step for copy in copies if not is_void(copy.step, activations)), default=None)
            covered = flush.step if flush else committed
            if held is None or (covered and held <= covered) or not self._wait_for_lost(held):
                return flush, reason

    def _wait_for_lost(self, step: StepId) -> bool:
        """Waits for agents that cannot be reached, which may hold what is missing of a step.

        False where there are none, or where it was waited long enough.
        """
        if not self._waiting_seconds or not any(map(self._is_lost, self._lost)):
            return False
        now = time.monotonic()
        if self._waits_until is None:
            self._waits_until = now + self._waiting_seconds
            _log.info("%s is not whole: agents that cannot be reached are asked again", step)
        if now >= self._waits_until or self._stopped.wait(_ASKED_EVERY):
            return False
        self._ask_again()
        return True

    def _abandon_left(self, store: PersistentStore) -> None:
        """After a commit: what the tries before it left, whose agents died or could not reach the store."""
        left, self._left = self._left, []
        try:
            for attempt in left:
                store.abandon(attempt)
        except (PersistentStoreError, OSError) as error:
            _log.warning("what earlier tries left stays until the next life of the run: %s", error)

    def _fresh_attempt(self, store: PersistentStore, step: StepId) -> Attempt:
        """One that no flush has begun: one whose agents died may have left its claim or parts."""
        from emergency_ckpt.persistent.attempts import Attempt
        from emergency_ckpt.persistent.records import Generation

        life = self._saved_by(step, store) or self._life
        while True:
            own = Generation(life.generation, life.nonce)
            attempt = Attempt(own, step.step, self._registration.destination.item, self._next_ordinal)
            self._next_ordinal += 1
            if not store.attempt_records(attempt).entries():
                return attempt

    def _gather(self, layouts: dict[str, Layout], store: PersistentStore) -> list[Copy]:
        """What all agents hold of this life and earlier ones; adds the layouts of that."""
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
        return copies

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
            self._lost.pop(endpoint, None)
        except PeerUnavailableError as error:
            self._lose(endpoint, error)
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
                leaving=flush.leaving,
            )
            try:
                return self._of(copy).begin_of_life(self._life, share, urgent=self._occasion == "urgent")
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
            if failed is not None or (self._stopped.is_set() and self._occasion == "gone"):
                self._give_up(committer, running[committer], failed or "the agent leaves")
            if self._stopped.is_set():  # In a hurry the others go on without this agent.
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


def stands_down(why: str) -> FlushResult:
    """Somebody else sees to it, or nobody is to."""
    return FlushResult("stood_down", f"nothing is done: {why}")
