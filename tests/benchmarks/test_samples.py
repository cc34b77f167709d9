"""What is made of the samples: the slowest process counts, and ratios are taken round by round."""

from __future__ import annotations

from benchmarks.samples import Samples, Spread, slowest


def samples(**measurements: list[float]) -> Samples:
    return Samples({"someone": measurements})


def test_the_value_of_a_round_is_that_of_its_slowest_process():
    job = slowest([samples(save=[1.0, 5.0]), samples(save=[2.0, 4.0])])
    assert job.of("someone", "save") == [2.0, 5.0]


def test_what_was_not_measured_is_empty():
    assert samples().of("someone", "save") == []
    assert samples().of("nobody", "save") == []
    assert Spread.of([]) is None


def test_a_ratio_is_not_changed_by_a_round_that_was_slow_for_all():
    spread = Spread.of_ratios([10.0, 100.0, 12.0], [1.0, 10.0, 1.0])
    assert spread == Spread(median=10.0, low=10.0, high=12.0)


def test_rounds_that_noise_made_negative_have_no_ratio():
    assert Spread.of_ratios([1.0, 2.0], [-0.5, 0.5]) == Spread(4.0, 4.0, 4.0)
    assert Spread.of_ratios([1.0], [0.0]) is None
