"""When a step of the ramdisks is backed up: at an interval of time or of steps since the last persistent one.

Pure arithmetic. One process decides by it, because clocks differ, and the others take its word.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class LastBackup:
    """The newest step of the persistent tier: its number, and when it was chosen, by the decider's clock."""

    step: int
    time: float


@dataclasses.dataclass(frozen=True, slots=True)
class BackupRule:
    """How often there is a backup; with both intervals, whichever comes first.

    Attributes:
      steps: the first step at or beyond each multiple of this many is backed up.
      seconds: the first step when so much time has passed since the last one, or when there is none.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is not None and self.steps < 1) or (self.seconds is not None and self.seconds <= 0):
            raise ValueError(f"intervals must be positive: {self}")

    def why(self, step: int, now: float, last: LastBackup | None) -> str | None:
        """Why `step`, which is newer than the last backup, is to be backed up; None where it is not."""
        if last is not None and last.step >= step:
            last = None  # Another program's, or of a life that this one does not go on from.
        since = f"since step {last.step}" if last else "and there is no backup yet"
        if self.steps is not None and step // self.steps > (last.step // self.steps if last else 0):
            return f"a multiple of {self.steps} steps was reached {since}"
        if self.seconds is not None and (last is None or now - last.time >= self.seconds):
            return f"every {self.seconds / 60:g} minutes, {since}"
        return None
