"""The simulator agrees with the exact closed formulas, conserves time, and repeats itself for the same seed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_ckpt.core.forecast.failures import Failure, FailureModel, Kind, failure_trace
from emergency_ckpt.core.forecast.intervals import exact_wall_seconds
from emergency_ckpt.core.forecast.job_shape import JobShape, Protection
from emergency_ckpt.core.forecast.recovery import PlannedRecovery, Source
from emergency_ckpt.core.forecast.save_costs import Costs
from emergency_ckpt.core.forecast.simulated_policies import (
    OrbaxEmergency,
    PersistentOnly,
    Policy,
    ThisPackage,
    two_tiers,
)
from emergency_ckpt.core.forecast.simulation import Periods, compare, gain, interval, simulate

NEVER = math.inf
DAY = 86400.0
COSTS = Costs(
    local_blocked=0.5,
    local_lag=1.0,
    persistent_blocked=0.2,
    snapshot=2.0,
    persistent_lag=20.0,
    one_slice_lag=60.0,
    restart=120.0,
    repair_host=60.0,
    repair_slice=90.0,
    own_restore=5.0,
    peers_restore=10.0,
    persistent_restore=40.0,
)
FREE = Costs(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def all_policies(shape: JobShape) -> list[Policy]:
    return [PersistentOnly(), OrbaxEmergency(shape), ThisPackage(PlannedRecovery(shape, Protection()))]


def test_without_failures_only_saves_cost_anything() -> None:
    life = simulate(PersistentOnly(), JobShape(1, 1), COSTS, 1.0, Periods(0, 100), (), 100_000.0)
    steps = 100_000 / (1 + (COSTS.snapshot + COSTS.persistent_blocked) / 100)
    assert life.useful == pytest.approx(steps / 100_000, abs=2e-5)
    assert life.down == 0


def test_one_failure_goes_back_to_the_newest_step_that_was_usable() -> None:
    """Worked out by hand: a step per second, saves of 2.2 s every 100 steps, usable 60 s later."""
    shape, failed = JobShape(1, 1), [Failure(1050.0, Kind.PROCESS, 0)]
    life = simulate(PersistentOnly(), shape, COSTS, 1.0, Periods(0, 100), failed, 2000.0)
    # Step 1000 is saved at 1022.0, usable at 1082; at 1050 there is step 900, and training goes on at 1210.
    assert life.down * 2000 == pytest.approx(160)
    assert life.points[1:3] == ((1050.0, 1028), (1210.0, 900))
    assert life.useful * 2000 == pytest.approx(900 + (2000 - 1210) - 7 * 2.2, abs=1)


@pytest.mark.parametrize(
    ("period", "mean", "cost", "restart"), [(500, 3000.0, 20.0, 100.0), (90, 900.0, 5.0, 0.0)]
)
def test_one_tier_takes_the_time_that_dalys_exact_model_says(
    period: int, mean: float, cost: float, restart: float
) -> None:
    shape = JobShape(1, 1)
    costs = dataclasses.replace(FREE, snapshot=cost, restart=restart)
    model = FailureModel(mean / 3600, NEVER, NEVER, NEVER)
    horizon = 3000 * mean
    (found,) = compare([(PersistentOnly(), Periods(0, period))], model, shape, costs, 1.0, horizon, 12, 1)
    expected = 1 / exact_wall_seconds(1.0, period, cost, restart, mean)
    # Three times a 95 % interval, and what whole steps and the beginning and end of the run leave open.
    assert found.goodput.mean == pytest.approx(expected, abs=3 * found.goodput.half_width + 0.002)


def test_two_tiers_waste_what_the_closed_formula_says_where_failures_are_rare() -> None:
    shape = JobShape(4, 8)
    model = FailureModel(4000, 2000, 8000, 1000)
    for policy in all_policies(shape):
        tiers = two_tiers(policy, model, shape, COSTS)
        local = round(tiers.best_local) if policy.saves_locally else 0
        periods = Periods(local, round(tiers.best_persistent))
        (found,) = compare([(policy, periods)], model, shape, COSTS, 1.0, 400 * DAY, 8, 3)
        expected = tiers.waste(local or math.inf, periods.persistent)
        assert 1 - found.goodput.mean == pytest.approx(expected, rel=0.06)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31), st.floats(0.05, 5))
def test_every_second_is_accounted_for_and_progress_never_runs_ahead(
    slices: int, hosts: int, seed: int, hours: float
) -> None:
    shape = JobShape(slices, hosts)
    model = FailureModel(hours * 4, hours * 2, hours * 8, hours * 16)
    trace = failure_trace(model, shape, DAY, np.random.default_rng(seed))
    for policy in all_policies(shape):
        periods = Periods(5 if policy.saves_locally else 0, 50)
        life = simulate(policy, shape, COSTS, 1.0, periods, trace, DAY)
        parts = (life.useful, life.saving, life.rolled_back, life.down)
        assert sum(parts) == pytest.approx(1)
        assert all(-1e-9 <= part <= 1 + 1e-9 for part in parts)
        assert life.failures == len(trace)
        assert sum(life.restored.values()) <= len(trace)
        assert [t for t, _ in life.points] == sorted(t for t, _ in life.points)


def test_survivors_of_any_mix_beat_the_rule_of_whole_slices_under_the_same_failures() -> None:
    shape = JobShape(2, 16)
    model = FailureModel(NEVER, 200, NEVER, NEVER)
    costs = dataclasses.replace(COSTS, snapshot=COSTS.local_blocked)
    periods = Periods(20, 2000)
    runs = [(policy, periods) for policy in all_policies(shape)[1:]]
    orbax, ours = compare(runs, model, shape, costs, 1.0, 20 * DAY, 10, 5)
    assert gain(ours, orbax).low > 0
    # Half of the hosts are in the only slice that keeps copies for Orbax.
    assert orbax.restored(Source.PERSISTENT) > 0.4 * sum(orbax.restored(source) for source in Source)
    assert ours.restored(Source.PERSISTENT) < 0.05 * sum(ours.restored(source) for source in Source)


def test_the_same_seed_gives_the_same_lives_and_another_one_others() -> None:
    shape = JobShape(2, 2)
    arguments = ([(PersistentOnly(), Periods(0, 50))], FailureModel(9, 9, 9, 9), shape, COSTS, 1.0, DAY, 2)
    assert compare(*arguments, 7) == compare(*arguments, 7)
    assert compare(*arguments, 7) != compare(*arguments, 8)


def test_intervals_are_students() -> None:
    """By hand: mean 2, deviation 1, n = 3, t(0.975, 2) = 4.3027."""
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert interval([1.0]).half_width == math.inf


def test_a_month_of_a_job_of_100000_chips_is_simulated_with_the_real_planner() -> None:
    shape = JobShape(390, 64, 4)
    assert shape.chips == 99_840
    runs = [(policy, Periods(50 if policy.saves_locally else 0, 500)) for policy in all_policies(shape)]
    found = compare(runs, FailureModel(), shape, COSTS, 2.0, 30 * DAY, 2, 0)
    assert [each.policy for each in found] == ["persistent only", "Orbax emergency", "emergency_ckpt"]
    assert min(life.failures for each in found for life in each.lives) > 2000
    assert gain(found[2], found[0]).mean > 0
