"""When agents drain without their trainers: as late as it fits, at once where it does not, never twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.last_call import (
    ASSUMED_GRACE_SECONDS,
    FACTOR,
    MARGIN_SECONDS,
    Estimate,
    RunningDrain,
    estimate_drain,
    grace_deadline,
    last_call,
    may_be_left_to,
    waits_for,
)
from emergency_ckpt.core.lineage import StepId

SECONDS = st.floats(0, 1e5)
MOMENT = st.floats(0, 2e5)


@given(MOMENT, MOMENT, SECONDS)
def test_it_begins_as_late_as_a_drain_with_all_allowances_fits_and_else_at_once(
    now: float, deadline: float, seconds: float
) -> None:
    call = last_call(now, deadline, Estimate(seconds, "measured"))
    needed = FACTOR * seconds + MARGIN_SECONDS
    assert call.begins >= now
    if call.begins > now:
        assert call.fits
        assert abs(call.begins + needed - deadline) < 1e-6
    else:
        assert now >= deadline - needed
        assert call.fits == (now + seconds + MARGIN_SECONDS <= deadline)
        assert "begins at once" in call.reason
    # As time goes by it is never put off.
    later = last_call(now + 1, deadline, Estimate(seconds, "measured"))
    assert later.begins <= max(call.begins, now + 1)


@given(st.lists(SECONDS, min_size=1), st.integers(0, 10**12))
def test_what_was_measured_counts_and_the_slowest_of_it(measured: list[float], slot_bytes: int) -> None:
    assert estimate_drain(measured, slot_bytes).seconds == max(measured)


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_where_nothing_was_measured_larger_slots_take_longer(one: int, other: int) -> None:
    assert (estimate_drain([], one).seconds <= estimate_drain([], other).seconds) == (one <= other)


def test_a_notice_without_a_deadline_has_that_of_a_pod() -> None:
    assert grace_deadline(100.0, None) == 100.0 + ASSUMED_GRACE_SECONDS
    assert grace_deadline(100.0, 103.0) == 103.0


@given(
    st.integers(1, 5),
    st.lists(st.builds(RunningDrain, st.builds(StepId, st.just(1), st.integers(1, 5)), st.booleans())),
)
def test_only_drains_that_move_and_are_as_new_are_waited_for(step: int, running: list[RunningDrain]) -> None:
    awaited = waits_for(StepId(1, step), running)
    moving = [drain for drain in running if drain.step.step >= step and not drain.waits]
    assert (awaited is None) == (not moving)
    assert awaited is None or awaited in moving


@given(SECONDS, st.floats(-1e3, 1e5), SECONDS)
def test_another_agent_is_left_to_it_only_while_it_is_in_time(
    begins_in: float, left: float, seconds: float
) -> None:
    if may_be_left_to(begins_in, left, Estimate(seconds, "measured")):
        assert begins_in <= 1e-6 or begins_in + seconds <= left
    assert may_be_left_to(0.0, left, Estimate(seconds, "measured"))
