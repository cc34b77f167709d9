"""What counts as a stall, and who is said to be behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.stalls import StallLimits, who_is_behind


@given(st.floats(0, 1e6), st.floats(1, 100), st.floats(0.001, 1e6))
def test_a_step_may_take_the_floor_or_so_many_medians_and_the_first_one_twice_the_floor(
    median: float, factor: float, floor: float
) -> None:
    limits = StallLimits(factor, floor)
    assert limits.allowed_seconds(median) == max(floor, factor * median)
    assert limits.allowed_seconds(None) == 2 * floor
    assert StallLimits(factor, 0.0).allowed_seconds(median) is None


@pytest.mark.parametrize(
    ("steps", "silent", "said"),
    [
        ({0: 7, 1: 7}, [], "all processes are at step 7"),
        ({0: 7, 1: 6, 2: 6, 3: 7}, [], "behind: processes 1, 2, at step 6, while others are at step 7"),
        ({0: 7, 1: None}, [], "behind: process 1, before its first step, while others are at step 7"),
        ({0: 7, 2: 7}, [1], "all processes that tell are at step 7; not heard of: process 1"),
        (
            {0: 7, 1: 6},
            [1],
            "behind: process 1, at step 6, while others are at step 7; not heard of: process 1",
        ),
        ({0: 3}, [], "process 0 is at step 3"),
        ({}, [0, 1], "not heard of: processes 0, 1"),
        ({}, range(20), "not heard of: processes 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"),
        ({}, [], "no process tells where it is"),
    ],
)
def test_who_is_behind_is_said_by_name(steps: dict[int, int | None], silent: list[int], said: str) -> None:
    assert who_is_behind(steps, silent) == said


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), "10", True])
def test_limits_that_cannot_be_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="no limit of a stall"):
        StallLimits(10.0, wrong)  # type: ignore[arg-type]
