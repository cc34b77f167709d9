"""The drains of an agent: asked for by the trainer of this host, or by agents of a life whose trainers died.

A slot is pinned before the asker is answered, and stays so until its share is done. Each drain has a thread of
its own, whatever becomes of whoever asked for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import secrets
import threading
import time
from typing import Literal

from emergency_ckpt.agent.orders import Destination, Life, Share
from emergency_ckpt.agent.slot_id import SlotId
from emergency_ckpt.agent.slots_on_disk import SlotsOnDisk
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import CorruptDataError, EmergencyCheckpointError, StaleGenerationError
from emergency_ckpt.local.pins import SlotPin, pin_slot

MOST_AT_A_TIME = 64
_KEPT = 256
_SLOT_NUMBER = re.compile(r"slot_(\d+)\.manifest")
_log = logging.getLogger("emergency_ckpt.agent")

Ending = Literal["done", "superseded", "corrupt", "failed"]


@dataclasses.dataclass
class DrainState:
    """How far a drain is: `ending` None while it runs, `reason` why it did not end well.

    `waiting`: its part is written, and those of others are not.
    """

    id: str
    what: str
    life: Life
    waiting: bool = False
    ending: Ending | None = None
    nbytes: int = 0
    reason: str = ""
    give_up: str | None = None
    begun: float = dataclasses.field(default_factory=time.monotonic)


class SlotNotHereError(EmergencyCheckpointError):
    """The slot that is to be drained is not sealed here, or about to be overwritten."""


class TooManyDrainsError(EmergencyCheckpointError):
    """No more drains are taken on for now."""


class Drains:
    """All drains of one agent. Safe to use from any thread."""

    def __init__(self, slots: SlotsOnDisk) -> None:
        self._slots = slots
        self._changed = threading.Condition()
        self._states: dict[str, DrainState] = {}
        self._closed: str | None = None
        self._over = False
        self._layouts: dict[str, Layout] = {}

    @property
    def running(self) -> int:
        """How many have not ended."""
        with self._changed:
            return sum(state.ending is None for state in self._states.values())

    @property
    def writing(self) -> int:
        """How many have not ended, and do not wait for the parts of others."""
        with self._changed:
            return sum(state.ending is None and not state.waiting for state in self._states.values())

    def give_up_waiting(self, life: Life, reason: str) -> None:
        """Lets all drains of a life end that wait for others."""
        with self._changed:
            for state in self._states.values():
                if state.life == life and state.waiting:
                    state.give_up = state.give_up or reason

    def begin(self, destination: Destination, share: Share) -> str:
        """Pins the slot and begins; returns the id of the drain.

        Raises SlotNotHereError, TooManyDrainsError, CorruptDataError for a layout that is missing or damaged,
        LocalDirectoryError for files that cannot be read.
        """
        life = destination.life
        step = StepId(life.generation, share.step)
        wanted = SlotId(life.run, step, share.layout, share.position)
        with self._changed:
            running = sum(state.ending is None for state in self._states.values())
            if self._closed is not None or running >= MOST_AT_A_TIME:
                raise TooManyDrainsError(self._closed or f"{running} drains are running here")
        pin = self._pin(wanted, life.nonce)
        try:
            layout = self._layout(share.layout)
            state = DrainState(secrets.token_hex(16), f"{step} of run {life.run}, part {share.position}", life)
            thread = threading.Thread(
                target=self._run,
                args=(state, destination, share, pin, layout),
                name=f"emergency_ckpt drain {share.step}",
                # A store that hangs must not keep an agent that was told to leave.
                daemon=True,
            )
            with self._changed:
                self._states[state.id] = state
                for old in [s.id for s in self._states.values() if s.ending is not None][:-_KEPT]:
                    del self._states[old]
            thread.start()
        except BaseException:
            pin.close()
            raise
        return state.id

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
        """Takes on nothing more, ends those that wait for others, and answers whoever waits for one."""
        with self._changed:
            self._closed = reason
            self._over = True
            self._changed.notify_all()
            for state in self._states.values():
                state.give_up = state.give_up or reason

    def refuse(self, reason: str) -> None:
        """Takes on nothing more."""
        with self._changed:
            self._closed = reason

    def _run(
        self, state: DrainState, destination: Destination, share: Share, pin: SlotPin, layout: Layout
    ) -> None:
        # Only agents that drain pay for the libraries of the persistent tier.
        from emergency_ckpt.agent.draining import carry_out, open_store

        _log.info("draining %s to %s", state.what, destination.root)
        ending: Ending = "failed"
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
                )
            ending = "done"
        except StaleGenerationError as error:
            ending, reason = "superseded", str(error)
        except CorruptDataError as error:
            ending, reason = "corrupt", str(error)
        except EmergencyCheckpointError as error:
            reason = str(error)
        except Exception as error:  # Whoever asked waits for an answer, whatever it was.
            _log.exception("draining %s failed", state.what)
            reason = f"{type(error).__name__}: {error}"
        _log.info(
            "the drain of %s ended after %.2f s: %s%s",
            state.what,
            time.monotonic() - state.begun,
            ending,
            f": {reason}" if reason else "",
        )
        with self._changed:
            state.ending, state.reason = ending, reason
            self._changed.notify_all()

    def _note_waiting(self, state: DrainState, waits: bool) -> None:
        with self._changed:
            state.waiting = waits

    def _pin(self, wanted: SlotId, nonce: str) -> SlotPin:
        for slot in self._slots.all():
            number = _SLOT_NUMBER.fullmatch(slot.manifest.name)
            if slot.id != wanted or slot.nonce != nonce or number is None:
                continue
            pin = pin_slot(slot.manifest.parent, int(number[1]), wanted.run, wanted.step)
            if pin is None:
                continue
            found = pin.manifest
            if (found.nonce, found.layout, found.position) == (nonce, wanted.layout, wanted.position):
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
