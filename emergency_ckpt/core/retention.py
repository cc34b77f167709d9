"""Which persistent steps may go, and which one is best: Orbax's rules over what is known of the saved steps.

The newest step always stays.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class SavedStep:
    """A saved step as policies see it.

    Attributes:
      step: its number.
      time: when it was committed, or asked for where it is not committed yet; with a time zone.
      metrics: what the user saved with it; None where that was nothing.
    """

    step: int
    time: datetime.datetime
    metrics: Mapping[str, Any] | None = None


def superseded_steps(steps: Sequence[int], max_to_keep: int | None, keep_period: int | None) -> list[int]:
    """The steps to delete, ascending.

    Args:
      steps: the steps that exist, in any order.
      max_to_keep: newest steps to keep; None keeps all. The newest step always stays.
      keep_period: steps divisible by it stay and do not count.
    """
    if max_to_keep is None:
        return []
    newest_first = sorted(steps, reverse=True)
    kept = set(newest_first[: max(1, max_to_keep)])
    if keep_period:
        kept |= {step for step in steps if step % keep_period == 0}
    return sorted(step for step in steps if step not in kept)


def given_up_steps(steps: Sequence[int], preserved: Collection[Any]) -> list[int]:
    """The steps to delete, where a policy gave one answer per step (ascending): true to preserve it.

    Raises ValueError when there is not one answer per step.
    """
    if len(steps) != len(preserved):
        raise ValueError(f"{len(preserved)} answers to {len(steps)} steps {list(steps)}")
    newest = max(steps, default=None)
    return [step for step, keep in zip(steps, preserved, strict=True) if not keep and step != newest]


def best_step(values: Iterable[tuple[int, float]], *, lowest: bool) -> int | None:
    """The step with the highest (or lowest) value, the newer one where two are equal; NaN does not count."""
    counted = [(-value if lowest else value, step) for step, value in values if not math.isnan(value)]
    return max(counted)[1] if counted else None
