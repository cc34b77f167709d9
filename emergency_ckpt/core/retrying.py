"""What became of a store that failed: whether what failed is tried again, and after which pause.

Two questions, answered here and nowhere else. *Is it final?* What is damaged, taken or not to be had stays so
however often it is asked for (`_FINAL`); everything else may pass, and is tried again while somebody trains.
*How soon?* Pauses double, each drawn at random. What will not go away by itself (rights, credentials, a bucket
that is not there, a store that is full) begins slowly, and is never given up: credentials are renewed, rights
granted and quotas raised while a job trains.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from emergency_ckpt.errors import (
    ConfigError,
    CorruptDataError,
    EmergencyCheckpointError,
    PersistentStoreError,
    StaleGenerationError,
    StepOccupiedError,
    StoreBucketMissingError,
    StoreCredentialsError,
    StoreFullError,
    StorePermissionError,
    StoreThrottledError,
    StoreUnreachableError,
    StoreUnsupportedError,
    UnsupportedStateError,
)

StoreReason = Literal[
    "throttled",
    "unreachable",
    "permission",
    "credentials",
    "missing",
    "full",
    "occupied",
    "unsupported",
    "other",
]
_KINDS: dict[StoreReason, type[PersistentStoreError]] = {
    "throttled": StoreThrottledError,
    "unreachable": StoreUnreachableError,
    "permission": StorePermissionError,
    "credentials": StoreCredentialsError,
    "missing": StoreBucketMissingError,
    "full": StoreFullError,
    "occupied": StepOccupiedError,
    "unsupported": StoreUnsupportedError,
}
_LASTING = ("permission", "credentials", "missing", "full")
_FINAL: tuple[type[EmergencyCheckpointError], ...] = (
    # A later life of the run has taken over, and never gives it back.
    StaleGenerationError,
    # A slot that is lost, overwritten or damaged gives the same bytes each time, or none; so do parts that
    # contradict each other. The next step has slots of its own.
    CorruptDataError,
    # The number belongs to a step that no restore made void: only a person may delete that.
    StepOccupiedError,
    # The server lacks an operation, or the format a kind of leaf: neither learns it while this process lives.
    StoreUnsupportedError,
    UnsupportedStateError,
    # Settings and environment are those with which the process began.
    ConfigError,
)


def is_final(error: BaseException) -> bool:
    """Whether trying again cannot mend it. What is not known to be final may pass."""
    return isinstance(error, _FINAL)


def store_reason(error: BaseException) -> StoreReason:
    """In one word why the store did not do it."""
    for reason, kind in _KINDS.items():
        if isinstance(error, kind):
            return reason
    return "unsupported" if isinstance(error, UnsupportedStateError | ConfigError) else "other"


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
