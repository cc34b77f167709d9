"""When a step takes far longer than those before it, and who is behind: pure arithmetic.

Nothing is known before the first step is over: compilation has twice the floor. Whether one is
expected at all is not known here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

_MOST_NAMED = 8


@dataclasses.dataclass(frozen=True, slots=True)
class StallLimits:
    """What counts as a stall, and what becomes of it. Raises ValueError for what cannot be.

    Attributes:
      factor: times the median of recent steps.
      floor_seconds: nothing shorter is a stall; 0: nothing is.
      restart_seconds: after so much more the trainer is ended, so that the job restarts; 0: never.
    """

    factor: float = 10.0
    floor_seconds: float = 300.0
    restart_seconds: float = 0.0

    def __post_init__(self) -> None:
        for value in (self.factor, self.floor_seconds, self.restart_seconds):
            if type(value) not in (int, float) or not 0 <= value < 1e9:
                raise ValueError(f"no limit of a stall: {value!r:.40}")

    def allowed_seconds(self, median_seconds: float | None) -> float | None:
        """How long a step may take; `median_seconds` None: it is the first one. None: as long as it likes."""
        if not self.floor_seconds:
            return None
        if median_seconds is None:
            return 2 * self.floor_seconds
        return max(self.floor_seconds, self.factor * median_seconds)


def who_is_behind(steps: Mapping[int, int | None], silent: Collection[int]) -> str:
    """In words, from the steps that the processes asked about last (None: none yet).

    `silent`: those of which nothing is known, or nothing new.
    """
    heard = {process: -1 if step is None else step for process, step in steps.items()}
    notes: list[str] = []
    if heard:
        lowest, highest = min(heard.values()), max(heard.values())
        behind = [process for process, step in heard.items() if step == lowest]
        if lowest == highest:
            everyone = "all processes that tell are" if silent else "all processes are"
            notes.append(
                f"{everyone} {_at(lowest)}" if len(heard) > 1 else f"process {behind[0]} is {_at(lowest)}"
            )
        else:
            notes.append(f"behind: {_named(behind)}, {_at(lowest)}, while others are {_at(highest)}")
    if silent:
        notes.append(f"not heard of: {_named(silent)}")
    return "; ".join(notes) or "no process tells where it is"


def _at(step: int) -> str:
    return "before its first step" if step < 0 else f"at step {step}"


def _named(processes: Collection[int]) -> str:
    named = ", ".join(str(process) for process in sorted(processes)[:_MOST_NAMED])
    more = f" and {len(processes) - _MOST_NAMED} more" if len(processes) > _MOST_NAMED else ""
    return f"process{'es' if len(processes) > 1 else ''} {named}{more}"
