"""Backups: which complete steps of the ramdisks are drained because their time has come.

Process 0 decides while it seals a step, and says so before it counts its seal: whoever learns that the step is
complete finds the word there, so that nobody waits and all processes drain the same steps. What process 0 knows
of commits it knows from its own drains; the store is not asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from emergency_ckpt.agent.drain_worker import DrainWorker
from emergency_ckpt.core.backups import BackupRule, LastBackup
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.jaxio.coordination import Coordinator

_KEY = "backup"


class Backups:
    """The backups of one generation. `choose` and `chosen` are called by the thread that ends saves."""

    def __init__(
        self,
        rule: BackupRule,
        coordinator: Coordinator,
        drain: DrainWorker,
        tell: Callable[[int, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tell` hears of each step that is chosen here, and why."""
        self._rule = rule
        self._coordinator = coordinator
        self._drain = drain
        self._tell = tell
        self._clock = clock
        self._last: LastBackup | None = None
        self._chosen: dict[StepId, float] = {}  # on their way to the persistent tier, and since when

    def go_on_after(self, step: int | None, age_seconds: float) -> None:
        """The newest persistent step when this generation began, and how old it was then."""
        self._last = None if step is None else LastBackup(step, self._clock() - age_seconds)

    def choose(self, prefix: str, step: StepId, is_persistent: bool) -> None:
        """Called by process 0 for each step that it has sealed, before its seal counts; `prefix` of its keys.

        While a drain is on its way there is no other one. A step whose drain failed gives way to a newer one:
        a store that failed gets the newest step as soon as it takes one again.
        """
        now = self._clock()
        if is_persistent:
            self._chosen[step] = now
            return
        if self._drain.busy and not self._drain.retries:
            return
        self._learn(now)
        if why := self._rule.why(step.step, now, self._last):
            self._chosen[step] = now
            self._coordinator.put(f"{prefix}/{_KEY}", b"1")
            self._tell(step.step, why)

    def chosen(self, prefix: str) -> bool:
        """Whether process 0 has chosen the step, which is complete."""
        return self._coordinator.try_get(f"{prefix}/{_KEY}") is not None

    def _learn(self, now: float) -> None:
        """Nothing is on its way: what was chosen is committed by now, or has failed."""
        committed = self._drain.newest_committed
        if committed is not None and (self._last is None or committed.step > self._last.step):
            self._last = LastBackup(committed.step, self._chosen.get(committed, now))
        self._chosen.clear()
