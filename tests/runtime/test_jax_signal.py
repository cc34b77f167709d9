"""What becomes of the key that JAX writes for a signal."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from emergency_ckpt.runtime.jax_signal import JaxSignal

GRACE_SECONDS = 30.0


def of_jax(moment: float) -> str:
    # With nanoseconds and a zone, as XLA writes it.
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+", "123+")


def test_a_signal_that_jax_heard_is_one_notice_for_each_manager_as_long_as_it_stands() -> None:
    now = time.time()
    said: str | None = None
    notices = JaxSignal(GRACE_SECONDS, lambda: said)
    assert notices.look() is None
    said = of_jax(now)
    found = notices.look()
    assert found is not None
    assert (found.source, found.kind) == ("signal", "terminate")
    assert found.received == pytest.approx(now, abs=1e-5)
    # JAX looks at the signal once a second.
    assert found.deadline == pytest.approx(now + GRACE_SECONDS - 1, abs=1e-5)
    assert notices.look() is None

    assert JaxSignal(GRACE_SECONDS, lambda: said).look() is not None, "a later manager of this process"
    assert JaxSignal(0.0, lambda: said).look() is None


def test_a_time_that_cannot_be_read_is_a_notice_all_the_same() -> None:
    before = time.time()
    found = JaxSignal(GRACE_SECONDS, lambda: "noon").look()
    assert found is not None
    assert found.received >= before
    assert found.detail.endswith("at noon")
