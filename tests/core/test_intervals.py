"""Closed formulas: they are where the waste is least, agree with each other, and with published figures."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.forecast.failures import HOUR, FailureModel
from emergency_ckpt.core.forecast.intervals import (
    TwoTiers,
    daly,
    effective_time_ratio,
    exact_wall_seconds,
    young,
)
from emergency_ckpt.core.forecast.job_shape import JobShape
from emergency_ckpt.errors import ConfigError

NEVER = math.inf
COSTS, MEANS = st.floats(0.01, 100), st.floats(1e3, 1e7)


@given(COSTS, MEANS, st.floats(0.001, 0.999))
def test_the_best_periods_are_where_the_waste_is_least(cost: float, mean: float, missed: float) -> None:
    tiers = TwoTiers(mean, missed, cost, 2 * cost, 1.0, 2.0, 3.0, 4.0)
    local, persistent = tiers.best_local, tiers.best_persistent
    least = tiers.waste(local, persistent)
    for factor in (0.9, 1.1):
        assert tiers.waste(local * factor, persistent) > least
        assert tiers.waste(local, persistent * factor) > least


@given(COSTS, MEANS)
def test_without_a_local_tier_the_two_tier_form_is_youngs(cost: float, mean: float) -> None:
    tiers = TwoTiers(mean, 1.0, 0.0, cost)
    assert tiers.best_persistent == pytest.approx(young(cost, mean))
    assert tiers.best_local == math.inf
    assert tiers.waste(math.inf, young(cost, mean)) == pytest.approx(math.sqrt(2 * cost / mean))


@given(st.floats(0.001, 0.2), st.floats(0.5, 0.95))
def test_dalys_period_is_nearly_the_best_by_the_exact_model(ratio: float, other: float) -> None:
    mean = 1000.0
    cost = ratio * mean

    def wall(period: float) -> float:
        return exact_wall_seconds(1.0, period, cost, 0.0, mean)

    best = daly(cost, mean)
    assert wall(best) <= min(wall(best * other), wall(best / other)) * 1.0005
    assert daly(2 * mean, mean) == mean


@pytest.mark.parametrize(("gpus", "hours"), [(16_384, 1.8), (131_072, 0.23)])
def test_the_mean_times_that_meta_projects_follow_from_its_rate(gpus: int, hours: float) -> None:
    """Kokolis et al. (arXiv:2410.21680): 6.5 failures per 1,000 node-days, eight GPUs to a node."""
    model = FailureModel(NEVER, 1000 * 24 / 6.5, NEVER, NEVER)
    nodes = gpus // 8
    found = sum(model.rates(JobShape(1, min(nodes, 2048))).values()) * nodes / min(nodes, 2048)
    assert 1 / found / HOUR == pytest.approx(hours, rel=0.03)


def test_the_defaults_are_llama_3s_interruptions() -> None:
    """arXiv:2407.21783: 419 unexpected interruptions of 16,384 GPUs in 54 days."""
    model = FailureModel(slice_hours=NEVER, job_hours=NEVER)
    shape = JobShape(1, 2048, 8)
    assert 54 * 24 * HOUR / model.mean_seconds(shape) == pytest.approx(419)


def test_metas_effective_time_ratio_is_the_waste_of_one_tier() -> None:
    period, cost, restart, mean = 1800.0, 5.0, 300.0, 2e5
    tiers = TwoTiers(mean, 1.0, 0.0, cost, persistent_restart=restart)
    ratio = effective_time_ratio(period, cost, restart, 100, 1 / mean / 100)
    assert ratio == pytest.approx(1 - tiers.waste(math.inf, period), abs=1e-4)


def test_rates_that_are_none_are_refused() -> None:
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="host_hours"):
            FailureModel(host_hours=wrong)
    with pytest.raises(ConfigError, match="nothing ever fails"):
        FailureModel(NEVER, NEVER, NEVER, NEVER)
