"""The trainers of an agent, told by the requests that they hold open, and what they said of themselves.

Held requests work across containers, where pids mean nothing: a trainer that dies lets go of its request. Of
one that is not connected, because the agent began after it, a lock tells (`presence`). One that says goodbye
before has left; one that does not has died, and what it was working on is not over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from emergency_ckpt.agent.orders import Life, Registration
from emergency_ckpt.agent.presence import Condition, is_trainer_id

__all__ = ["Registered", "State", "Trainers", "is_trainer_id"]

State = Literal["alive", "gone", "left", "done"]
"""Of the trainer of a process: it lives; it died; it said goodbye; it died and what was left to do is done."""

_MOST_REGISTRATIONS = 1024


@dataclasses.dataclass
class Registered:
    """What a trainer works on, and how it is."""

    registration: Registration
    state: State


class Trainers:
    """The trainers that are attached, and since when nobody needed this agent.

    Args:
      on_death: called, in the event loop, with the registration of a trainer that died.
      condition: how a trainer is who is not attached.

    Registrations may be asked for from any thread; everything else is of one event loop.
    """

    def __init__(
        self,
        on_death: Callable[[str, Registration], None] = lambda _, __: None,
        condition: Callable[[str], Condition] = lambda _: "gone",
    ) -> None:
        self._on_death = on_death
        self._condition = condition
        self._attached: dict[str, int] = {}
        self._anonymous = 0
        self._in_use = 0
        self._idle_since = time.monotonic()
        self._guard = threading.Lock()
        self._registered: dict[str, Registered] = {}

    @property
    def count(self) -> int:
        return self._anonymous + sum(self._attached.values()) + len(self._apart())

    @property
    def apart(self) -> int:
        """How many live, as far as is known, and are not attached."""
        return len(self._apart())

    def _apart(self) -> list[str]:
        with self._guard:
            return [
                id_ for id_, r in self._registered.items() if r.state == "alive" and id_ not in self._attached
            ]

    def look(self) -> None:
        """Looks after those that are not attached: whoever of them has died is dealt with."""
        for trainer in self._apart():
            self._judge(trainer)

    def recall(self, remembered: Mapping[str, Registered]) -> None:
        """What an agent before this one knew. Those that were gone count as just having died."""
        with self._guard:
            for trainer, known in remembered.items():
                state: State = "alive" if known.state == "gone" else known.state
                self._registered.setdefault(trainer, Registered(known.registration, state))

    def registered(self) -> dict[str, Registered]:
        """What is known of all trainers, by id."""
        with self._guard:
            return {id_: dataclasses.replace(known) for id_, known in self._registered.items()}

    @contextlib.contextmanager
    def attached(self, trainer: str | None = None) -> Iterator[None]:
        """While a trainer is attached; the id is what it may register under."""
        self._arrive(trainer)
        try:
            with self.in_use():
                yield
        finally:
            self._depart(trainer)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While something is done for somebody."""
        self._in_use += 1
        try:
            yield
        finally:
            self._in_use -= 1
            self._idle_since = time.monotonic()

    def idle_seconds(self) -> float:
        """How long nobody has been attached and nobody was served; 0 while somebody is."""
        return 0.0 if self._in_use else time.monotonic() - self._idle_since

    # What they said of themselves.

    def register(self, trainer: str, registration: Registration) -> bool:
        """Notes what a trainer works on, in place of what it said before; False where it is not attached."""
        if trainer not in self._attached:
            return False
        with self._guard:
            # Whoever had this place in an earlier life of the run is history.
            run, process = registration.life.run, registration.process
            for other, known in list(self._registered.items()):
                told = known.registration
                replaced = (told.life.run, told.process) == (run, process) and known.state != "alive"
                if replaced or (len(self._registered) >= _MOST_REGISTRATIONS and known.state != "alive"):
                    del self._registered[other]
            self._registered[trainer] = Registered(registration, "alive")
        return True

    def knows(self, trainer: str) -> bool:
        """Whether a trainer is attached."""
        return trainer in self._attached

    def lives(self, trainer: str) -> bool:
        """Whether a trainer lives, as far as its lock tells, and is expected to. From any thread."""
        with self._guard:
            known = self._registered.get(trainer)
        return known is not None and known.state == "alive" and self._condition(trainer) == "alive"

    def leave(self, trainer: str) -> None:
        """A trainer says goodbye: nothing is left to do for it."""
        self._note(trainer, "left")

    def settle(self, trainer: str) -> None:
        """What a trainer that died has left was done, or cannot be done."""
        self._note(trainer, "done")

    def find(self, life: Life) -> Registration | None:
        """What a trainer of this life said; several of one life say the same, but for their process."""
        with self._guard:
            return next(
                (r.registration for r in self._registered.values() if r.registration.life == life), None
            )

    def states(self, life: Life) -> dict[int, State]:
        """By process, the state of the trainers of this life that this agent knows."""
        with self._guard:
            known = [r for r in self._registered.values() if r.registration.life == life]
            return {each.registration.process: each.state for each in known}

    def others_than(self, life: Life) -> bool:
        """Whether a trainer is attached that is none of this life: a later one begins."""
        with self._guard:
            own = [id_ for id_, r in self._registered.items() if r.registration.life == life]
        return any(id_ not in own for id_ in tuple(self._attached))

    def is_gone(self, trainer: str) -> bool:
        """Whether this trainer died and is still missing."""
        with self._guard:
            known = self._registered.get(trainer)
            return known is not None and known.state == "gone"

    @property
    def over(self) -> bool:
        """Whether all trainers that registered have said goodbye, and their jobs had no other processes."""
        with self._guard:
            known = list(self._registered.values())
        alone = all(len(each.registration.agents) == 1 for each in known)
        return bool(known) and alone and not self.count and all(each.state == "left" for each in known)

    def _arrive(self, trainer: str | None) -> None:
        if trainer is None:
            self._anonymous += 1
            return
        self._attached[trainer] = self._attached.get(trainer, 0) + 1
        with self._guard:
            known = self._registered.get(trainer)
            if known is not None and known.state == "gone":
                known.state = "alive"  # Only its connection was lost.

    def _depart(self, trainer: str | None) -> None:
        if trainer is None:
            self._anonymous -= 1
            return
        self._attached[trainer] -= 1
        if self._attached[trainer]:
            return
        del self._attached[trainer]
        self._judge(trainer)

    def _judge(self, trainer: str) -> None:
        """Deals with one that is not attached. Of one that lives only the connection was lost, for now."""
        condition = self._condition(trainer)
        with self._guard:
            known = self._registered.get(trainer)
            if known is None or known.state != "alive" or condition == "alive":
                return
            known.state = condition
        if condition == "gone":
            self._on_death(trainer, known.registration)

    def _note(self, trainer: str, state: State) -> None:
        with self._guard:
            known = self._registered.get(trainer)
            if known is not None and not (state == "done" and known.state != "gone"):
                known.state = state
