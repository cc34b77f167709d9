"""How far a trainer is, as it tells its agent every few seconds, and what it wants its agent to make of that.

Only the trainer of this host says so (it alone knows the host's key). Everything is checked before it is used.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Collection
from typing import Any, Literal, get_args

from emergency_ckpt.core.stalls import StallLimits

MAX_PROGRESS_BYTES = 4096
Phase = Literal["training", "paused"]
"""Steps are expected to follow each other; or not now: something is being saved, restored or closed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """What a trainer tells. Raises ValueError for what cannot be.

    Attributes:
      step: the newest one that it asked about, None before the first.
      seconds: since it did, or, before the first, since training began.
      median_seconds: of recent steps; None where none is over.
      pid, pid_namespace: the trainer itself, and the inode of the namespace in which that is its number.
      last_call: whether agents drain the newest complete step without it when its host goes away.
    """

    step: int | None
    phase: Phase
    seconds: float
    median_seconds: float | None
    pid: int
    pid_namespace: int
    limits: StallLimits
    last_call: bool

    def __post_init__(self) -> None:
        for number in (self.step, self.pid, self.pid_namespace):
            if number is not None and (type(number) is not int or not 0 <= number < 2**63):
                raise ValueError(f"expected a whole number, found {number!r:.40}")
        for seconds in (self.seconds, self.median_seconds):
            if seconds is not None and (type(seconds) not in (int, float) or not 0 <= seconds < 1e12):
                raise ValueError(f"no length of time: {seconds!r:.40}")
        if self.phase not in get_args(Phase) or type(self.last_call) is not bool:
            raise ValueError(f"no progress: {self.phase!r:.40}, {self.last_call!r:.40}")

    @property
    def allows_urgent(self) -> bool:
        """Whether agents may drain without this trainer while it lives."""
        return self.last_call or self.limits.restart_seconds > 0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, raw: Any) -> Progress:
        """Raises ValueError for anything that was not made by `to_json`."""
        try:
            return cls(**{**raw, "limits": StallLimits(**raw["limits"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"no progress: {error!s:.200}") from error


@dataclasses.dataclass(frozen=True, slots=True)
class Told:
    """What a trainer said last, and when that was heard, on the monotonic clock."""

    progress: Progress
    heard: float

    @property
    def age_seconds(self) -> float:
        """How long it has said nothing."""
        return time.monotonic() - self.heard

    @property
    def step_seconds(self) -> float:
        """How long the step has taken by now, if the trainer is still at it."""
        return self.progress.seconds + self.age_seconds

    @property
    def stall_seconds(self) -> float | None:
        """How long the step has taken, where that is longer than it may; None where it is not."""
        progress = self.progress
        allowed = progress.limits.allowed_seconds(progress.median_seconds)
        seconds = self.step_seconds
        return None if progress.phase != "training" or allowed is None or seconds <= allowed else seconds


class ProgressBoard:
    """What all trainers of this host said last, by their ids. Safe to use from any thread."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._told: dict[str, Told] = {}

    def note(self, trainer: str, progress: Progress) -> None:
        with self._guard:
            self._told[trainer] = Told(progress, time.monotonic())

    def of(self, trainer: str) -> Told | None:
        with self._guard:
            return self._told.get(trainer)

    def keep_only(self, trainers: Collection[str]) -> None:
        """Forgets all others."""
        with self._guard:
            self._told = {trainer: told for trainer, told in self._told.items() if trainer in trainers}
