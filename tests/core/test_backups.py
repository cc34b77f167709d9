"""The schedule of backups: each multiple once, by the first step that is there; time since the last one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.backups import BackupRule, LastBackup

STEPS = st.lists(st.integers(0, 300), unique=True, max_size=60).map(sorted)


@given(steps=STEPS, interval=st.integers(1, 50), fails=st.sets(st.integers(0, 300)))
def test_by_steps_each_multiple_is_backed_up_once_by_the_first_step_at_or_beyond_it(
    steps: list[int], interval: int, fails: set[int]
) -> None:
    rule, last, chosen = BackupRule(steps=interval), None, []
    for step in steps:
        if (
            rule.why(step, 0.0, last) and step not in fails
        ):  # A backup that fails leaves the last one as it was.
            chosen.append(step)
            last = LastBackup(step, 0.0)
    good = [step for step in steps if step not in fails]
    multiples = range(interval, 301, interval)
    firsts = {next(s for s in good if s >= m) for m in multiples if good and good[-1] >= m}
    assert chosen == sorted(firsts)


@given(times=st.lists(st.floats(0, 1000), max_size=40).map(sorted), interval=st.floats(0.5, 200))
def test_by_time_no_two_are_nearer_than_the_interval_and_none_is_later_than_the_next_step(
    times: list[float], interval: float
) -> None:
    rule, last, chosen = BackupRule(seconds=interval), None, []
    for step, now in enumerate(times):
        if rule.why(step, now, last):
            chosen.append(step)
            last = LastBackup(step, now)
    assert chosen[:1] == ([0] if times else [])  # With no backup there is nothing to wait for.
    for one, other in itertools.pairwise(chosen):
        assert times[other] - times[one] >= interval
        assert all(times[between] - times[one] < interval for between in range(one + 1, other))


@given(step=st.integers(1, 300), now=st.floats(0, 1e6), interval=st.integers(1, 50), seconds=st.floats(1, 1e5))
def test_with_both_intervals_it_is_whichever_comes_first(
    step: int, now: float, interval: int, seconds: float
) -> None:
    last = LastBackup(step - 1, 0.0)
    either = [BackupRule(steps=interval).why(step, now, last), BackupRule(seconds=seconds).why(step, now, last)]
    assert bool(BackupRule(interval, seconds).why(step, now, last)) == any(either)


def test_a_persistent_step_that_is_not_older_does_not_count() -> None:
    """Another program's step of a high number must not end the backups until training gets there."""
    assert BackupRule(steps=10).why(20, 0.0, LastBackup(5000, 0.0))
    assert not BackupRule(steps=10).why(9, 0.0, LastBackup(5000, 0.0))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"seconds": 0.0}, {"seconds": -1.0}])
def test_intervals_are_positive(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        BackupRule(**wrong)  # pyright: ignore[reportArgumentType]
