"""Several things that may fail, none of which keeps the others from being done."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def failures_of(*calls: Callable[[], None]) -> list[Exception]:
    """Makes all calls; what they raise."""
    failures: list[Exception] = []
    for call in calls:
        try:
            call()
        except Exception as error:
            failures.append(error)
    return failures


def raise_together(errors: Sequence[Exception]) -> None:
    """Raises the first error, with the others as its notes."""
    if errors:
        for other in errors[1:]:
            errors[0].add_note(f"and: {other}")
        raise errors[0]
