"""The drains of an agent: asked for by the trainer of this host, or by agents of a life whose trainers died.

A slot is pinned before the asker is answered, and stays so until its share is done. Each drain has a thread of
its own, whatever becomes of whoever asked for it. What a trainer asked for is an order until it has ended: an
agent that begins after this one gets to know of it (`memory`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from typing import Literal

from emergency_ckpt.agent.counters import CountedEnding, Counters
from emergency_ckpt.agent.memory import Order
from emergency_ckpt.agent.orders import Destination, Life, Share
from emergency_ckpt.agent.slot_id import SlotId
from emergency_ckpt.agent.slots_on_disk import SlotsOnDisk
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.retrying import StoreReason, store_reason
from emergency_ckpt.errors import CorruptDataError, EmergencyCheckpointError, StaleGenerationError
from emergency_ckpt.local.pins import SlotPin, pin_slot

MOST_AT_A_TIME = 64
_KEPT = 256
_SLOT_NUMBER = re.compile(r"slot_(\d+)\.manifest")
# Attempts that take the place of one whose committer died are numbered apart from all others.
_FIRST_NEW_ORDINAL = 2**32
_log = logging.getLogger("emergency_ckpt.agent")

Ending = Literal["done", "superseded", "corrupt", "failed"]


@dataclasses.dataclass
class DrainState:
    """How far a drain is: `ending` None while it runs, `reason` why it did not end well.

    `waiting`: its part is written, and those of others are not. `cause`: why the store failed, if so. `retry`:
    the try before this one failed. `asked`: what was asked for; `order`: the same, as long as a trainer's order
    has not ended.
    """

    id: str
    what: str
    life: Life
    step: StepId
    waiting: bool = False
    ending: Ending | None = None
    nbytes: int = 0
    reason: str = ""
    cause: StoreReason = "other"
    retry: bool = False
    asked: Order | None = None
    order: Order | None = None
    give_up: str | None = None
    begun: float = dataclasses.field(default_factory=time.monotonic)


class SlotNotHereError(EmergencyCheckpointError):
    """The slot that is to be drained is not sealed here, or about to be overwritten."""


class TooManyDrainsError(EmergencyCheckpointError):
    """No more drains are taken on for now."""


class Drains:
    """All drains of one agent. Safe to use from any thread.

    `orders_changed` is called, in any thread, when there is another order, or one less.
    """

    def __init__(self, slots: SlotsOnDisk, counters: Counters | None = None) -> None:
        self._slots = slots
        self._counters = counters or Counters()
        self.orders_changed: Callable[[], None] = lambda: None
        self._left: list[Order] = []  # by an agent before this one, and not begun again
        self._changed = threading.Condition()
        self._states: dict[str, DrainState] = {}
        self._closed: str | None = None
        self._over = False
        self._newest_commit: float | None = None
        self._layouts: dict[str, Layout] = {}

    @property
    def running(self) -> int:
        """How many have not ended; those that an agent before this one left are among them."""
        with self._changed:
            return sum(state.ending is None for state in self._states.values()) + len(self._left)

    @property
    def retries(self) -> int:
        """How many that run are further tries, after one that failed."""
        with self._changed:
            return sum(state.ending is None and state.retry for state in self._states.values())

    @property
    def seconds_since_commit(self) -> float:
        """Since this agent has committed a step; not a number where it has not."""
        newest = self._newest_commit
        return math.nan if newest is None else time.monotonic() - newest

    @property
    def orders(self) -> list[Order]:
        """What trainers of this host asked for and has not ended."""
        with self._changed:
            return [*self._left, *(state.order for state in self._states.values() if state.order)]

    def recall(self, orders: Iterable[Order]) -> None:
        """What an agent before this one was asked for; `resume` begins it."""
        with self._changed:
            self._left.extend(orders)

    def resume(self, wanted: Callable[[Order], bool]) -> None:
        """Begins what an agent before this one left, as far as it is `wanted` now."""
        with self._changed:
            chosen = [order for order in self._left if wanted(order)]
        for order in chosen:
            try:
                self._begin(order, resumed=True)
            except TooManyDrainsError:
                return  # They are still there at the next look.
            except EmergencyCheckpointError as error:
                _log.warning("a drain that was asked for before this agent began is given up: %s", error)
            with self._changed:
                self._left = [left for left in self._left if left is not order]
            self.orders_changed()

    def forget_left(self, life: Life, process: int) -> None:
        """The trainer of this process sees to what an agent before this one left."""
        with self._changed:
            self._left = [o for o in self._left if (o.destination.life, o.share.position) != (life, process)]

    @property
    def writing(self) -> int:
        """How many have not ended, and do not wait for the parts of others."""
        with self._changed:
            return sum(state.ending is None and not state.waiting for state in self._states.values())

    def of_life(self, life: Life) -> list[tuple[StepId, bool]]:
        """The steps of the drains of a life that have not ended, and whether they wait for others."""
        with self._changed:
            mine = [state for state in self._states.values() if state.life == life and state.ending is None]
            return [(state.step, state.waiting) for state in mine]

    def give_up_waiting(self, life: Life, reason: str) -> None:
        """Lets all drains of a life end that wait for others."""
        with self._changed:
            for state in self._states.values():
                if state.life == life and state.waiting:
                    state.give_up = state.give_up or reason

    def begin(self, destination: Destination, share: Share, *, ordered: bool = False) -> str:
        """Pins the slot and begins; returns the id of the drain. `ordered`: by a trainer of this host.

        Asked for again, since the answer was lost, it is the same drain.

        Raises SlotNotHereError, TooManyDrainsError, CorruptDataError for a layout that is missing or damaged,
        LocalDirectoryError for files that cannot be read.
        """
        return self._begin(Order(destination, share), ordered=ordered)

    def _begin(self, order: Order, *, ordered: bool = False, resumed: bool = False) -> str:
        destination, share = order.destination, order.share
        life = destination.life
        step = StepId((share.of or life).generation, share.step)
        wanted = SlotId(life.run, step, share.layout, share.position)
        with self._changed:
            if (begun := self._begun(order)) is not None:
                return begun
            running = sum(state.ending is None for state in self._states.values())
            if self._closed is not None or running >= MOST_AT_A_TIME:
                raise TooManyDrainsError(self._closed or f"{running} drains are running here")
        # A slot of an earlier life may have been restored from others, by whatever life came after it.
        pin = self._pin(wanted, None if share.of else life.nonce)
        try:
            layout = self._layout(share.layout)
            what = f"{step} of run {life.run}, part {share.position}"
            state = DrainState(secrets.token_hex(16), what, life, step)
            state.asked, state.order = order, order if ordered or resumed else None
            state.retry = share.retry
            if resumed and share.holders == (share.position,):
                # Nobody else knows of the attempt: a new one is not in the way of what is left of it.
                share = dataclasses.replace(share, ordinal=_FIRST_NEW_ORDINAL + secrets.randbelow(2**32))
            thread = threading.Thread(
                target=self._run,
                args=(state, destination, share, pin, layout, resumed),
                name=f"emergency_ckpt drain {share.step}",
                # A store that hangs must not keep an agent that was told to leave.
                daemon=True,
            )
            with self._changed:
                if (begun := self._begun(order)) is not None:  # By who asked again in the meantime.
                    pin.close()
                    return begun
                self._states[state.id] = state
                for old in [s.id for s in self._states.values() if s.ending is not None][:-_KEPT]:
                    del self._states[old]
            if ordered:
                self.orders_changed()  # Before anybody is told that it has begun.
            thread.start()
        except BaseException:
            pin.close()
            raise
        return state.id

    def _begun(self, order: Order) -> str | None:
        """The drain that was asked for before, unless it has failed."""
        for state in self._states.values():
            if state.asked == order and state.ending in (None, "done"):
                return state.id
        return None

    def look(self, drain: str, wait_seconds: float = 0.0) -> DrainState | None:
        """How far a drain is, waiting for its end for a while; None for one that is not known."""
        with self._changed:
            state = self._states.get(drain)
            if state is not None and wait_seconds > 0:
                self._changed.wait_for(lambda: state.ending is not None or self._over, wait_seconds)
            return None if state is None else dataclasses.replace(state)

    def give_up(self, drain: str, reason: str) -> bool:
        """Lets a drain that waits for others end; False for one that is not known."""
        with self._changed:
            state = self._states.get(drain)
            if state is None:
                return False
            state.give_up = state.give_up or reason
            return True

    def wait(self, seconds: float) -> bool:
        """Waits until none runs; False when the time limit came first."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(state.ending is not None for state in self._states.values()), seconds
            )

    def close(self, reason: str) -> None:
        """Takes on nothing more, ends those that wait for others, and answers whoever waits for one.

        Orders that have not ended remain, for an agent that begins after this one.
        """
        with self._changed:
            self._closed = reason
            self._over = True
            self._changed.notify_all()
            for state in self._states.values():
                state.give_up = state.give_up or reason

    def _run(
        self,
        state: DrainState,
        destination: Destination,
        share: Share,
        pin: SlotPin,
        layout: Layout,
        resumed: bool,
    ) -> None:
        # Only agents that drain pay for the libraries of the persistent tier.
        from emergency_ckpt.agent.draining import carry_out, open_store

        _log.info("draining %s to %s%s", state.what, destination.root, ", once more" * resumed)
        ending: Ending = "failed"
        counted: CountedEnding = "failed"
        reason = ""
        try:
            with pin:
                slot = pin.open(layout)
                state.nbytes = carry_out(
                    open_store(destination),
                    destination,
                    share,
                    slot,
                    stop=lambda: state.give_up,
                    waiting=lambda waits: self._note_waiting(state, waits),
                    resumed=resumed,
                    resumable=lambda: self._over and state.order is not None,
                )
            ending, counted = "done", "committed" if share.commits else "part_written"
            if share.commits:
                self._newest_commit = time.monotonic()
        except StaleGenerationError as error:
            ending, counted, reason = "superseded", "superseded", str(error)
        except CorruptDataError as error:
            ending, counted, reason = "corrupt", "corrupt", str(error)
        except EmergencyCheckpointError as error:
            counted = "abandoned" if state.give_up is not None else "store_failed"
            reason, state.cause = str(error), store_reason(error)
            if counted == "store_failed":
                self._counters.count_store_failure(state.cause)
        except Exception as error:  # Whoever asked waits for an answer, whatever it was.
            _log.exception("draining %s failed", state.what)
            reason = f"{type(error).__name__}: {error}"
        self._counters.count_drain(counted, state.nbytes, time.monotonic() - state.begun)
        _log.info(
            "the drain of %s ended after %.2f s: %s%s",
            state.what,
            time.monotonic() - state.begun,
            ending,
            f": {reason}" if reason else "",
        )
        with self._changed:
            state.ending, state.reason = ending, reason
            left = self._over and ending == "failed"
            state.order = state.order if left else None
            self._changed.notify_all()
        if not left:
            self.orders_changed()

    def _note_waiting(self, state: DrainState, waits: bool) -> None:
        with self._changed:
            state.waiting = waits

    def _pin(self, wanted: SlotId, nonce: str | None) -> SlotPin:
        for slot in self._slots.all():
            number = _SLOT_NUMBER.fullmatch(slot.manifest.name)
            if slot.id != wanted or nonce not in (None, slot.nonce) or number is None:
                continue
            pin = pin_slot(slot.manifest.parent, int(number[1]), wanted.run, wanted.step)
            if pin is None:
                continue
            found = pin.manifest
            fits = (found.layout, found.position) == (wanted.layout, wanted.position)
            if fits and nonce in (None, found.nonce):
                return pin
            pin.close()
        raise SlotNotHereError(f"{wanted} is not sealed here, or about to be overwritten")

    def _layout(self, layout_hash: str) -> Layout:
        known = self._layouts.get(layout_hash)
        if known is not None:
            return known
        data = self._slots.layout_bytes(layout_hash)
        if data is None:
            raise CorruptDataError(f"the layout {layout_hash} is not here")
        layout = Layout.from_bytes(data)
        if layout.hash != layout_hash:
            raise CorruptDataError(f"the file of layout {layout_hash} has another content than its name says")
        with contextlib.suppress(KeyError, StopIteration):
            while len(self._layouts) >= 4:
                del self._layouts[next(iter(self._layouts))]
        self._layouts[layout_hash] = layout
        return layout
