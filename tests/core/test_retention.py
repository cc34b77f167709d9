"""What is deleted, and what is best: the newest step stays, whatever anybody says."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.retention import best_step, given_up_steps, superseded_steps

step_lists = st.lists(st.integers(0, 100), unique=True, max_size=12).map(sorted)


@given(step_lists, st.none() | st.integers(0, 5), st.none() | st.integers(1, 7))
def test_the_newest_and_those_of_the_keep_period_stay(
    steps: list[int], max_to_keep: int | None, keep_period: int | None
) -> None:
    gone = superseded_steps(steps, max_to_keep, keep_period)
    stay = [step for step in steps if step not in gone]
    if max_to_keep is None:
        assert not gone
    else:
        assert steps[-max(1, max_to_keep) :] == stay[-max(1, max_to_keep) :]
        assert all(keep_period and step % keep_period == 0 for step in stay[: -max(1, max_to_keep)])
    assert not keep_period or all(step % keep_period for step in gone)


@given(st.data(), step_lists)
def test_what_a_policy_does_not_preserve_goes_but_for_the_newest(data: st.DataObject, steps: list[int]) -> None:
    answers = data.draw(st.lists(st.booleans(), min_size=len(steps), max_size=len(steps)))
    gone = given_up_steps(steps, answers)
    assert gone == [step for step, keep in zip(steps[:-1], answers[:-1], strict=True) if not keep]


def test_a_policy_that_answers_for_other_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"1 answers to 2 steps \[3, 4\]"):
        given_up_steps([3, 4], [True])


@given(
    st.lists(st.tuples(st.integers(0, 100), st.floats(width=16)), unique_by=lambda pair: pair[0]), st.booleans()
)
def test_the_best_step_is_the_newest_with_the_best_value(values: list[tuple[int, float]], lowest: bool) -> None:
    counted = [(step, value) for step, value in values if not math.isnan(value)]
    best = best_step(values, lowest=lowest)
    if not counted:
        assert best is None
        return
    wanted = (min if lowest else max)(value for _, value in counted)
    assert best == max(step for step, value in counted if value == wanted)
