"""Which persistent steps may go: Orbax's rules for `max_to_keep` and `keep_period`."""

from __future__ import annotations

from collections.abc import Sequence


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
