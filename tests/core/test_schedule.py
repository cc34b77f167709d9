"""When a step is due: each part of a rule by itself, tiers that do not influence each other, and what wins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.schedule import NOTHING_DUE, Due, SaveRule, SaveSchedule, default_rule

numbers = st.integers(0, 50)
rules = st.builds(
    SaveRule,
    periods=st.lists(st.integers(1, 9), max_size=2).map(tuple),
    steps=st.lists(st.frozensets(numbers, max_size=4), max_size=2).map(tuple),
    first=st.booleans(),
    preemption=st.booleans(),
)
tiers = st.none() | rules


@given(rules, rules, numbers, st.booleans(), st.booleans())
def test_either_of_two_rules_makes_a_step_due(
    one: SaveRule, other: SaveRule, step: int, first: bool, preempted: bool
) -> None:
    reasons = [rule.reason(step, first=first, preempted=preempted) for rule in (one, other, one | other)]
    assert (reasons[2] is not None) == (reasons[0] is not None or reasons[1] is not None)


@given(tiers, tiers, numbers, st.booleans(), st.booleans(), st.booleans())
def test_each_tier_follows_its_own_rule(
    local: SaveRule | None,
    persistent: SaveRule | None,
    step: int,
    local_first: bool,
    persistent_first: bool,
    preempted: bool,
) -> None:
    due = SaveSchedule(local, persistent).due(
        step, local_first=local_first, persistent_first=persistent_first, preempted=preempted
    )
    wanted = [
        rule is not None and rule.reason(step, first=first, preempted=preempted) is not None
        for rule, first in ((local, local_first), (persistent, persistent_first))
    ]
    assert [due.local, due.persistent] == wanted


@given(tiers, tiers, numbers)
def test_force_saves_on_every_tier_that_is_on(
    local: SaveRule | None, persistent: SaveRule | None, step: int
) -> None:
    due = SaveSchedule(local, persistent).due(step, force=True)
    assert (due.local, due.persistent) == (local is not None, persistent is not None)
    assert due.is_urgent


def test_periods_alone_save_the_first_step_and_at_a_preemption_as_well() -> None:
    schedule = SaveSchedule.of_periods(2, 10)
    first = schedule.due(1, local_first=True, persistent_first=True)
    assert first == Due(True, True, "first step")
    assert schedule.due(3, persistent_first=True) == Due(False, True, "first step")
    assert schedule.due(3) is NOTHING_DUE
    assert schedule.due(4) == Due(True, False, "period")
    assert schedule.due(20) == Due(True, True, "period")
    preempted = schedule.due(20, preempted=True)
    assert preempted == Due(True, True, "preemption")
    assert preempted.is_urgent
    assert SaveSchedule.of_periods(0, 3).due(3) == Due(False, True, "period")


def test_a_tier_that_asks_does_what_it_is_told_and_the_other_does_not() -> None:
    schedule = SaveSchedule(SaveRule(periods=(2,)), SaveRule(asked=True))
    assert schedule.asks
    told = Due(False, True, "policy")
    assert schedule.due(3, told=told) == Due(False, True, "policy")
    assert schedule.due(4, told=told) == Due(True, True, "period")
    assert not schedule.due(3, told=Due(True, False, "policy")), "the local tier has a rule of its own"
    assert not schedule.due(3, preempted=True, persistent_first=True)
    assert not SaveSchedule.of_periods(1, 1).asks


@pytest.mark.parametrize("period", [-1, -100])
def test_a_negative_period_is_refused(period: int) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        default_rule(period)
    with pytest.raises(ValueError, match="must be positive"):
        SaveRule(periods=(period,))
