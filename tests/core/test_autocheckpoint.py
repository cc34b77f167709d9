"""The decision at the step of a notice: what is worth most of what fits, and nothing that is worth less."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.autocheckpoint import ESTIMATE_FACTOR, Decision, Situation, decide, usable_seconds

SECONDS = st.floats(0, 10_000, allow_nan=False)
STEPS = st.one_of(st.none(), st.integers(0, 1000))


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    has_local = draw(st.booleans())
    return Situation(
        seconds_left=draw(st.one_of(st.none(), SECONDS)),
        snapshot_seconds=draw(st.one_of(st.none(), SECONDS)),
        drain_seconds=draw(st.one_of(st.none(), SECONDS)),
        has_local=has_local,
        has_persistent=draw(st.booleans()) if has_local else True,
        complete=draw(STEPS),
        persistent=draw(STEPS),
        draining=draw(STEPS),
        draining_for=draw(SECONDS),
        survives=draw(st.booleans()),
        skip_if_replicated=draw(st.booleans()),
    )


def test_a_minute_is_enough_for_a_save_and_a_drain() -> None:
    found = decide(Situation(60, snapshot_seconds=1, drain_seconds=20, complete=9, persistent=0))
    assert (found.local, found.persistent, found.drain, found.leave) == (True, True, None, True)


def test_where_only_a_drain_fits_the_newest_complete_step_goes_and_the_new_one_stays_on_the_ramdisks() -> None:
    found = decide(Situation(30, snapshot_seconds=10, drain_seconds=20, complete=9, persistent=0))
    assert (found.local, found.persistent, found.drain) == (True, False, 9)
    found = decide(Situation(30, snapshot_seconds=40, drain_seconds=20, complete=9, persistent=0))
    assert (found.local, found.persistent, found.drain) == (False, False, 9)


def test_a_drain_that_ends_in_time_is_not_disturbed_by_one_that_does_not() -> None:
    found = decide(Situation(30, snapshot_seconds=1, drain_seconds=20, complete=9, draining=8, draining_for=15))
    assert (found.local, found.persistent, found.drain) == (True, False, None)


def test_two_seconds_and_a_store_that_takes_a_minute() -> None:
    found = decide(Situation(2, snapshot_seconds=0.5, drain_seconds=60, complete=9, persistent=0))
    assert found.persistent
    assert found.leave
    assert "too late" in found.reason


def test_copies_on_other_hosts_are_enough_where_somebody_said_so() -> None:
    told = Situation(600, snapshot_seconds=1, drain_seconds=2, complete=9, survives=True)
    assert decide(told).persistent
    found = decide(dataclasses.replace(told, skip_if_replicated=True))
    assert (found.local, found.persistent, found.drain) == (True, False, None)
    assert decide(dataclasses.replace(told, skip_if_replicated=True, survives=False)).persistent


def test_a_wish_for_a_save_does_not_end_the_job() -> None:
    assert not decide(Situation(None)).leave


@given(situations())
def test_every_decision_is_possible_and_worth_something(now: Situation) -> None:
    found = decide(now)
    assert not found.local or now.has_local
    assert not found.persistent or now.has_persistent
    assert found.leave == (now.seconds_left is not None)
    assert found.drain is None or (now.has_persistent and now.has_local and found.drain == now.complete)
    assert found.drain is None or not found.persistent, "they would stand in each other's way"
    assert found.reason
    assert is_worth_something(found, now)


def is_worth_something(found: Decision, now: Situation) -> bool:
    """Something is saved, or what is there already is as new as anything that can be had in time."""
    return found.local or found.persistent or found.drain is not None or now.draining is not None


@given(situations(), SECONDS)
def test_with_more_time_a_step_that_fitted_still_does(now: Situation, more: float) -> None:
    left, snapshot, drain = now.seconds_left, now.snapshot_seconds, now.drain_seconds
    if left is None or snapshot is None or drain is None or (now.skip_if_replicated and now.survives):
        return
    if now.draining is None and ESTIMATE_FACTOR * (snapshot + drain) <= usable_seconds(left) * 0.999:
        found = decide(dataclasses.replace(now, seconds_left=left + more))
        assert found.persistent == now.has_persistent
