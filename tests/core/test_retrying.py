"""Pauses between tries, and what a store's errors are called."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.retrying import (
    Pauses,
    StoreReason,
    is_final,
    parse_reason,
    store_error,
    store_reason,
)
from emergency_ckpt.errors import (
    ConfigError,
    CorruptDataError,
    PersistentStoreError,
    StaleGenerationError,
    StepOccupiedError,
    StoreCredentialsExpiredError,
    StoreEncryptionError,
    StoreUnsupportedError,
    UnsupportedStateError,
)

REASONS = st.sampled_from(get_args(StoreReason))


@given(st.integers(1, 10**6), REASONS, st.floats(0, 1), st.floats(0.1, 1e4))
def test_pauses_grow_to_their_longest_and_never_beyond(
    failures: int, reason: StoreReason, drawn: float, longest: float
) -> None:
    pauses = Pauses(longest)
    pause = pauses.before(failures, reason, drawn)
    assert 0 < pause <= 1.5 * longest
    assert pause <= pauses.before(failures + 1, reason, drawn)


def test_what_lasts_is_tried_slowly_from_the_beginning() -> None:
    assert [Pauses(300).before(n, "unreachable", 0.5) for n in (1, 2, 3, 9)] == [5, 10, 20, 300]
    assert [Pauses(300).before(n, "permission", 0.5) for n in (1, 2, 3, 9)] == [60, 120, 240, 300]


@given(REASONS)
def test_a_reason_makes_an_error_of_its_own_class(reason: StoreReason) -> None:
    assert store_reason(store_error(reason, "why")) == parse_reason(reason) == reason


def test_kinds_of_errors_have_the_reason_of_what_they_are_kinds_of() -> None:
    assert store_reason(StoreCredentialsExpiredError("")) == "credentials"
    assert store_reason(StoreEncryptionError("")) == "permission"
    assert store_reason(PersistentStoreError("")) == store_reason(ValueError("")) == "other"
    with pytest.raises(ValueError, match="no reason of a store"):
        parse_reason("tired")


@pytest.mark.parametrize(
    "error",
    [
        StaleGenerationError(""),
        CorruptDataError(""),
        StepOccupiedError(""),
        StoreUnsupportedError(""),
        UnsupportedStateError(""),
        ConfigError(""),
    ],
)
def test_what_another_try_cannot_mend_is_final_and_stays_so_when_an_agent_tells_of_it(error: Exception) -> None:
    assert is_final(error)
    if not isinstance(error, StaleGenerationError | CorruptDataError):  # These have endings of their own.
        assert is_final(store_error(store_reason(error), "why"))


@given(REASONS.filter(lambda reason: reason not in ("occupied", "unsupported")))
def test_what_the_store_does_may_pass(reason: StoreReason) -> None:
    assert not is_final(store_error(reason, "why"))
    assert not is_final(OSError("why"))
