"""The steps that wait to be drained, and their slots: who goes next, and who makes way for whom.

Ascending by step. A slot is pinned for as long as its step waits with it. A step that has let go of it is
drained if it is still there at its turn, and otherwise a newer one that is complete on the ramdisk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import LocalDirectoryError
from emergency_ckpt.local.store import LocalStore
from emergency_ckpt.telemetry.events import DrainEvent
from emergency_ckpt.telemetry.log import CheckpointLogger


@dataclasses.dataclass(eq=False)
class Waiting:
    """A step and the slot that is pinned for it; None where it has none.

    `overtaken`: some process has no slot of it any more, and a newer step to drain instead.
    """

    step: StepId
    slot: int | None
    overtaken: bool = False


class DrainQueue:
    """Not thread-safe: the worker calls it with its lock."""

    def __init__(self, local: LocalStore, log: CheckpointLogger) -> None:
        self._local = local
        self._log = log
        self._waiting: list[Waiting] = []
        self._over: StepId | None = None  # up to here nothing is to be drained any more

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __contains__(self, step: StepId) -> bool:
        return any(waiting.step == step for waiting in self._waiting)

    @property
    def oldest(self) -> StepId | None:
        return self._waiting[0].step if self._waiting else None

    @property
    def newest(self) -> StepId | None:
        return self._waiting[-1].step if self._waiting else None

    @property
    def has_something(self) -> bool:
        """Whether there is more to take than a step that was overtaken by one which is not known here yet."""
        if not self._waiting or not self._waiting[0].overtaken:
            return bool(self._waiting)
        return any(newer > self._waiting[0].step for newer in self._local.complete_steps())

    def add(self, waiting: Waiting) -> None:
        """Puts a step in its place; its slot is pinned."""
        self._waiting = sorted([*self._waiting, waiting], key=lambda each: each.step)

    def take(self) -> Waiting:
        """The step that waited longest, or a newer one where its slot was needed meanwhile."""
        oldest = self._waiting.pop(0)
        if oldest.slot is None and not oldest.overtaken:
            oldest.slot = self.pin(oldest.step)
        return oldest if oldest.slot is not None else self._newer(oldest) or oldest

    def _newer(self, lost: Waiting) -> Waiting | None:
        for newer in reversed(self._local.complete_steps()):
            if newer > lost.step and (slot := self.pin(newer)) is not None:
                older = [w for w in self._waiting if w.step < newer]
                self._give_up([lost, *older], f"its slot was needed, {newer} goes in its place")
                for same in [w for w in self._waiting if w.step == newer]:
                    self._remove([same])
                return Waiting(newer, slot)
        return None

    def take_step(self, step: StepId) -> Waiting | None:
        """This one, if it waits; older ones make way."""
        self._give_up([w for w in self._waiting if w.step < step], f"{step} goes in its place")
        return self._waiting.pop(0) if self.oldest == step else None

    def keep_newest(self, reason: str) -> None:
        self._give_up(self._waiting[:-1], reason)

    def give_up(self, reason: str, wanted: Callable[[StepId], bool] = lambda _: True) -> None:
        """These steps are not drained; all of them, unless `wanted` says which."""
        self._give_up([w for w in self._waiting if wanted(w.step)], reason)

    def end_until(self, step: StepId) -> None:
        """Nothing up to `step` has to be drained any more: it is there, or what it needs is not."""
        self._over = step if self._over is None else max(self._over, step)
        self._remove([w for w in self._waiting if w.step <= step])

    def is_over(self, step: StepId) -> bool:
        """Whether that is so for a step of which this process is told only now."""
        return self._over is not None and step <= self._over

    def begin_anew(self) -> None:
        """All processes know of all steps by now: whatever they are told from here on is to be drained."""
        self._over = None

    def let_go_oldest(self) -> bool:
        """The oldest goes on waiting without a slot; says whether it had one."""
        if not self._waiting or self._waiting[0].slot is None:
            return False
        self._let_go(self._waiting[0])
        return True

    def pin(self, step: StepId) -> int | None:
        """The slot of a step, pinned; None where it is not here."""
        try:
            slot = self._local.pin(step)
        except LocalDirectoryError as error:
            self._log.error("drain", step.step, str(error))
            return None
        return slot.index if slot else None

    def unpin(self, slot: int | None) -> None:
        if slot is not None:
            self._local.unpin(slot)

    def _give_up(self, given_up: Iterable[Waiting], reason: str) -> None:
        listed = list(given_up)
        self._remove(listed)
        for step in (waiting.step for waiting in listed if not waiting.overtaken):
            said = f"{step} is given up: {reason}"
            self._log.emit(DrainEvent(step=step.step, bytes=0, seconds=0.0, result="superseded", reason=said))

    def _remove(self, removed: list[Waiting]) -> None:
        self._waiting = [w for w in self._waiting if w not in removed]
        for each in removed:
            self._let_go(each)

    def _let_go(self, waiting: Waiting) -> None:
        slot, waiting.slot = waiting.slot, None
        self.unpin(slot)
