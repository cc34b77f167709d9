"""When what failed at the persistent store is tried again: pauses that double, each drawn at random.

What will not go away by itself (rights, credentials, a bucket that is not there, a store that is full) is tried
slowly from the beginning, but never given up: credentials are renewed, and quotas raised, while a job trains.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from emergency_ckpt.errors import (
    PersistentStoreError,
    StoreBucketMissingError,
    StoreCredentialsError,
    StoreFullError,
    StorePermissionError,
    StoreThrottledError,
    StoreUnreachableError,
)

StoreReason = Literal["throttled", "unreachable", "permission", "credentials", "missing", "full", "other"]
_KINDS: dict[StoreReason, type[PersistentStoreError]] = {
    "throttled": StoreThrottledError,
    "unreachable": StoreUnreachableError,
    "permission": StorePermissionError,
    "credentials": StoreCredentialsError,
    "missing": StoreBucketMissingError,
    "full": StoreFullError,
}
_LASTING = ("permission", "credentials", "missing", "full")


def store_reason(error: BaseException) -> StoreReason:
    """In one word why the store did not do it."""
    for reason, kind in _KINDS.items():
        if isinstance(error, kind):
            return reason
    return "other"


def store_error(reason: StoreReason, text: str) -> PersistentStoreError:
    """The error that was told elsewhere in one word and a text."""
    return _KINDS.get(reason, PersistentStoreError)(text)


def parse_reason(raw: object) -> StoreReason:
    """Raises ValueError for what is none."""
    for reason in get_args(StoreReason):
        if raw == reason:
            return reason
    raise ValueError(f"no reason of a store: {raw!r:.40}")


@dataclasses.dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds between two tries. `longest`: of the mean pauses; the first is a sixtieth, or a fifth, of it."""

    longest: float = 300.0

    def before(self, failures: int, reason: StoreReason, drawn: float) -> float:
        """The pause after so many failures in a row, the last one for `reason`; `drawn` is from 0 to 1."""
        first = self.longest / (5 if reason in _LASTING else 60)
        doubled = first * 2 ** min(failures - 1, 16)
        return min(doubled, self.longest) * (0.5 + drawn)
