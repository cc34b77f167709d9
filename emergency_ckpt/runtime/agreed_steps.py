"""The steps at which all processes react to notices: the first one that none of them has passed.

Whoever hears of a notice writes a key. Every process that finds it says how far its train loop is, and holds
the loop at its next question until process 0 has named the furthest: the first question after that is answered
with yes, on every process. That works for any notice, as often as one comes, and also where not every step is
asked about. (JAX's own sync point answers once in the life of a process, and only where every step is.)

A request to the coordination service that fails is repeated, and may be done twice: whatever is written has a
name of its own.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from datetime import timedelta
from typing import Any

from emergency_ckpt.errors import CoordinationTimeoutError
from emergency_ckpt.jaxio.coordination import Coordinator
from emergency_ckpt.preemption.notice import Notice

LEADER = 0
_TOLD = "preemption"  # what all processes read
_POSITIONS = "preemption_positions"  # what process 0 reads
_NOTICES, _ROUNDS, _LEFT = "notices", "rounds", "left"
_KEPT_ROUNDS = 8
_MARGIN = timedelta(seconds=30)


@dataclasses.dataclass(frozen=True, slots=True)
class JobNotice:
    """A notice that some process of the job heard of; `process` is the one whose host it is about, if known."""

    process: int | None
    notice: Notice


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class _Position:
    """How far a train loop is: restores count before steps, since one may go back."""

    restores: int
    step: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Round:
    """What process 0 told: all react at the first question after `after`; None: nobody does."""

    number: int
    after: _Position | None
    notices: frozenset[str]
    why: str = ""


class AgreedSteps:
    """One process's part. The train loop asks, and another thread calls `look` again and again.

    Args:
      limit: how long a process may take to say how far it is.
    """

    def __init__(self, coordinator: Coordinator, limit: timedelta) -> None:
        self._coordinator = coordinator
        self._limit = limit
        self._changed = threading.Condition()
        self._position = _Position(0, -1)
        self._asked: int | None = None
        self._answer = False
        self._held: int | None = None  # the round in which this process says how far it is
        self._held_at = self._position  # what it says, and whether that is written
        self._held_is_said = False
        self._held_since = 0.0
        self._met = 0
        self._known_rounds = 0  # all up to this number are dealt with
        self._reactions: list[_Position] = []  # that are still to come
        self._closed = False
        self._left = False  # and all are told
        self._posted = 0
        self._unposted: dict[str, bytes] = {}  # by key; notices that could not be told yet
        self._notices: tuple[JobNotice, ...] = ()
        self._trouble = ""
        self._looking = threading.RLock()

    # The train loop's.

    def begin_after(self, step: int) -> None:
        """Training goes on after `step`, which was restored. All processes call it at the same point."""
        with self._changed:
            self._position = _Position(self._position.restores + 1, step)
            self._asked = None

    def may_begin_anew(self) -> None:
        """Training may go on after any step: all react at the next question, whatever its number, if at all.

        All processes call it at the same point, also those on which something failed there.
        """
        with self._changed:
            self._position = _Position(self._position.restores + 1, -1)

    def reached(self, step: int) -> bool:
        """Whether all processes react at `step`; a second question about it gets the same answer.

        Raises CoordinationTimeoutError where a notice came and process 0 does not say who is how far.
        """
        if step == self._asked:
            return self._answer
        with self._changed:
            if self._held is not None:
                self._await_verdict()
            self._position = max(self._position, _Position(self._position.restores, step))
            here = _Position(self._position.restores, step)
            due = [reaction for reaction in self._reactions if here > reaction]
            for reaction in due:
                self._reactions.remove(reaction)
            self._met += bool(due)
            self._asked, self._answer = step, bool(due)
        return self._answer

    def _await_verdict(self) -> None:
        limit = self._limit + _MARGIN
        if not self._changed.wait_for(lambda: self._held is None, limit.total_seconds()):
            raise CoordinationTimeoutError(
                f"process {self._coordinator.process_index} waited {limit.total_seconds():g} s for process "
                f"{LEADER} to say at which step all react to a notice. Look at its log"
            )

    # Of any thread.

    @property
    def process_count(self) -> int:
        return self._coordinator.process_count

    @property
    def holds(self) -> bool:
        """Whether the train loop's next question waits for process 0."""
        with self._changed:
            return self._held is not None

    @property
    def notices(self) -> tuple[JobNotice, ...]:
        """What the processes of the job heard of and told each other, as far as this one has found it."""
        return self._notices

    @property
    def met(self) -> int:
        """How many times `reached` was true: as often on all processes."""
        with self._changed:
            return self._met

    def post(self, notice: Notice, process: int | None) -> str:
        """Tells all processes of a notice that asks for a save. Returns what comes of it, in words.

        Raises PeerFailedError where the coordination service cannot be reached: the next look tells them.
        """
        value = json.dumps({"process": process, "line": notice.to_line().decode()})
        with self._changed:
            self._posted += 1
            name = f"{self._coordinator.process_index}.{self._posted}"
            self._unposted[f"{_TOLD}/{_NOTICES}/{name}"] = value.encode()
            closed = self._closed
        self._post()
        alone = self._coordinator.process_count == 1
        if alone:
            self.look()
        if closed:
            return "no step follows: the manager is being closed, in the time that is left"
        return "this process reacts at its next step" if alone else "all processes agree on a step to react at"

    def look(self) -> bool:
        """Reads what was told, and does this process's part; whether it is to look again soon.

        Raises PeerFailedError where the coordination service cannot be reached.
        """
        with self._looking:
            if self._closed:
                self.close()  # Where that could not be told, the others would wait for this process.
            self._post()
            told = self._coordinator.entries(_TOLD)
            notices = _notices_in(told)
            rounds = _rounds_in(told)
            self._notices = tuple(notices.values())
            self._hear(rounds, is_over=_LEFT in told)
            covered = frozenset[str]().union(*(found.notices for found in rounds.values()))
            unanswered = sorted(set(notices) - covered)
            if not unanswered or _LEFT in told:
                return False
            number = max(rounds, default=0) + 1
            self._say_position(number)
            return self._coordinator.process_index != LEADER or not self._lead(number, unanswered)

    def close(self) -> None:
        """This process asks about no further step, and nobody is to wait for it. Idempotent.

        Raises PeerFailedError where the coordination service cannot be reached.
        """
        with self._changed:
            self._closed = True
            if self._left:
                return
            self._release()
        self._coordinator.put(f"{_TOLD}/{_LEFT}", b"")
        self._left = True

    def _post(self) -> None:
        with self._changed:
            unposted = dict(self._unposted)
        for key, value in unposted.items():
            self._coordinator.put(key, value)
            with self._changed:
                self._unposted.pop(key, None)

    # The looking thread's.

    def _hear(self, rounds: dict[int, _Round], *, is_over: bool) -> None:
        with self._changed:
            for number in sorted(rounds):
                if number > self._known_rounds:
                    self._known_rounds = number
                    after = rounds[number].after
                    if after is not None:
                        self._reactions.append(after)
                    if why := rounds[number].why:
                        self._trouble = why
            if self._held is not None and (self._held <= self._known_rounds or is_over):
                self._release()

    def take_trouble(self) -> str:
        """Why no step could be agreed on, once; empty where there is nothing to say."""
        with self._changed:
            trouble, self._trouble = self._trouble, ""
        return trouble

    def _release(self) -> None:
        self._held = None
        self._changed.notify_all()

    def _say_position(self, number: int) -> None:
        with self._changed:
            if self._closed or number <= self._known_rounds:
                return
            if self._held is None:
                self._held, self._held_at, self._held_is_said = number, self._position, False
                self._held_since = time.monotonic()
            if self._held_is_said:
                return
            position = self._held_at
        # Where this fails it may be written all the same: the loop stays held, and the same is said again.
        said = json.dumps([position.restores, position.step])
        self._coordinator.put(f"{_POSITIONS}/{number}/{self._coordinator.process_index}", said.encode())
        with self._changed:
            self._held_is_said = True

    def _lead(self, number: int, notices: list[str]) -> bool:
        """Names the step as soon as all have said how far they are; whether they have."""
        said = self._coordinator.entries(f"{_POSITIONS}/{number}")
        missing = [p for p in range(self._coordinator.process_count) if str(p) not in said]
        verdict: dict[str, Any]
        if not missing:
            verdict = {"after": max(json.loads(value) for value in said.values()), "notices": notices}
        elif time.monotonic() < self._held_since + self._limit.total_seconds():
            return False
        else:
            why = (
                f"no step is agreed on for a notice: processes {missing[:8]} did not say how far they are "
                f"within {self._limit.total_seconds():g} s"
            )
            verdict = {"after": None, "notices": notices, "why": why}
        self._coordinator.put_once(f"{_TOLD}/{_ROUNDS}/{number}", json.dumps(verdict).encode())
        self._coordinator.delete(f"{_POSITIONS}/{number - 1}")
        self._forget(number - _KEPT_ROUNDS)
        self.look()
        return True

    def _forget(self, number: int) -> None:
        """Deletes a round that all have heard of, its notices first: without it they would open another one."""
        key = f"{_TOLD}/{_ROUNDS}/{number}"
        found = self._coordinator.try_get(key) if number > 0 else None
        if found is not None:
            for name in _round(number, found).notices:
                self._coordinator.delete(f"{_TOLD}/{_NOTICES}/{name}")
            self._coordinator.delete(key)


def _notices_in(told: dict[str, bytes]) -> dict[str, JobNotice]:
    found: dict[str, JobNotice] = {}
    for key, value in sorted(told.items()):
        kind, _, name = key.partition("/")
        if kind == _NOTICES:
            raw = json.loads(value)
            found[name] = JobNotice(raw["process"], Notice.from_line(raw["line"].encode()))
    return found


def _rounds_in(told: dict[str, bytes]) -> dict[int, _Round]:
    split = ((key.partition("/"), value) for key, value in told.items())
    return {int(name): _round(int(name), value) for (kind, _, name), value in split if kind == _ROUNDS}


def _round(number: int, value: bytes) -> _Round:
    raw = json.loads(value)
    after = None if raw["after"] is None else _Position(*raw["after"])
    return _Round(number, after, frozenset(raw["notices"]), raw.get("why", ""))
