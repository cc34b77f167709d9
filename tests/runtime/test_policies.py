"""Orbax's policies: those that become rules decide as Orbax does; the others are asked as Orbax asks them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint import checkpoint_managers as orbax_policies
from orbax.checkpoint import options as orbax_options
from orbax.checkpoint.checkpoint_manager import CheckpointInfo

from emergency_ckpt import LocalCheckpointOptions, PersistentCheckpointOptions
from emergency_ckpt.core.retention import SavedStep
from emergency_ckpt.core.schedule import SaveRule, default_rule
from emergency_ckpt.errors import ConfigError
from emergency_ckpt.runtime.policies import (
    AskedPolicy,
    Question,
    local_max_to_keep,
    persistent_preservation,
    ranking_of,
    tier_rule,
)

NOON = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)


def saved(step: int, seconds_before_noon: float = 0, **metrics: float) -> SavedStep:
    return SavedStep(step, NOON - datetime.timedelta(seconds=seconds_before_noon), metrics or None)


def question(step: int, *previous: SavedStep, saving: bool = False, preempted: bool = False) -> Question:
    return Question(step, NOON, previous, saving, preempted)


pure_policies = st.recursive(
    st.builds(orbax_policies.FixedIntervalPolicy, st.integers(1, 9))
    | st.builds(orbax_policies.SpecificStepsPolicy, st.frozensets(st.integers(0, 40), max_size=4))
    | st.builds(orbax_policies.SpecificStepsPolicy, st.builds(range, st.integers(0, 40), st.integers(0, 40)))
    | st.builds(orbax_policies.InitialSavePolicy)
    | st.builds(orbax_policies.PreemptionCheckpointingPolicy),
    lambda parts: st.builds(orbax_policies.AnySavePolicy, st.lists(parts, max_size=3)),
    max_leaves=4,
)


def rule_of(policy: Any) -> tuple[SaveRule | None, AskedPolicy | None]:
    return tier_rule("persistent", PersistentCheckpointOptions(save_decision_policy=policy))


def asked_of(policy: Any) -> AskedPolicy:
    rule, asked = rule_of(policy)
    assert rule == SaveRule(asked=True)
    assert asked is not None
    return asked


@given(pure_policies, st.integers(0, 40), st.booleans(), st.booleans())
def test_a_rule_decides_as_the_policy_that_it_came_from(
    policy: Any, step: int, first: bool, preempted: bool
) -> None:
    rule, asked = rule_of(policy)
    assert rule is not None
    assert asked is None, "nobody has to be asked"
    wanted = policy.should_save(
        CheckpointInfo(step, NOON, None),
        previous_steps=[] if first else [CheckpointInfo(0, NOON, None)],
        context=orbax_policies.DecisionContext(
            is_saving_in_progress=False,
            reached_preemption=preempted,
            multiprocessing_options=orbax_options.MultiprocessingOptions(),
        ),
    )
    assert (rule.reason(step, first=first, preempted=preempted) is not None) == wanted


def test_without_policies_the_interval_rules_of_orbax_hold() -> None:
    assert tier_rule("local", LocalCheckpointOptions(save_interval_steps=7)) == (default_rule(7), None)
    assert tier_rule("local", LocalCheckpointOptions(save_interval_steps=0)) == (None, None)
    with pytest.raises(ConfigError, match=r"local\.save_interval_steps is -1"):
        tier_rule("local", LocalCheckpointOptions(save_interval_steps=-1))


class EveryThird:
    """A policy of a user's, which may do anything: it keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, list[Any], Any]] = []

    def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
        self.seen.append((step, list(previous_steps), context))
        return step.step % 3 == 0


class MostlyEvery(orbax_policies.FixedIntervalPolicy):
    """A subclass of a pure policy, with a mind of its own."""

    def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
        return step.step != 4


class Lazy:
    def __contains__(self, step: int) -> bool:
        return step > 5


@pytest.mark.parametrize(
    ("policy", "saves"),
    [
        (EveryThird(), [0, 3, 6]),
        (MostlyEvery(2), [0, 1, 2, 3, 5, 6]),
        (orbax_policies.SpecificStepsPolicy(Lazy()), [6]),
        (orbax_policies.AnySavePolicy([orbax_policies.FixedIntervalPolicy(4), EveryThird()]), [0, 3, 4, 6]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_policy_that_may_do_anything_is_asked(policy: Any, saves: list[int]) -> None:
    asked = asked_of(policy)
    assert [step for step in range(7) if asked(question(step))] == saves


def test_an_asked_policy_sees_what_orbax_would_show_it() -> None:
    policy = EveryThird()
    asked_of(policy)(question(9, saved(3, 60), saved(6, 30, loss=0.5), saving=True, preempted=True))
    ((step, previous, context),) = policy.seen
    assert (step.step, step.time, step.metrics) == (9, NOON, None)
    assert [(p.step, p.metrics) for p in previous] == [(3, None), (6, {"loss": 0.5})]
    assert previous[1].time == NOON - datetime.timedelta(seconds=30)
    assert (context.is_saving_in_progress, context.reached_preemption) == (True, True)
    assert context.multiprocessing_options.primary_host == 0


def test_should_save_fn_gets_the_step_and_the_latest_one_and_obeys_a_preemption() -> None:
    seen = []

    def every_other(step: int, latest: int | None) -> bool:
        seen.append((step, latest))
        return latest is None or step - latest >= 2

    rule, asked = tier_rule("local", LocalCheckpointOptions(should_save_fn=every_other))
    assert rule == SaveRule(asked=True)
    assert asked is not None
    assert asked(question(1))
    assert not asked(question(2, saved(1)))
    assert asked(question(2, saved(1), preempted=True))
    assert asked(question(3, saved(0), saved(1)))
    assert seen == [(1, None), (2, 1), (2, 1), (3, 1)]


def test_a_save_decision_policy_stands_alone() -> None:
    options = LocalCheckpointOptions(
        save_decision_policy=orbax_policies.FixedIntervalPolicy(5),
        should_save_fn=lambda step, latest: True,
        save_interval_steps=2,
    )
    assert tier_rule("local", options) == (SaveRule(periods=(5,)), None)


def test_continuous_checkpointing_is_decided_here_without_a_word_to_other_processes() -> None:
    at_once = asked_of(orbax_policies.ContinuousCheckpointingPolicy())
    assert at_once(question(1))
    assert at_once(question(2, saved(1)))
    assert not at_once(question(2, saved(1), saving=True))
    inner = orbax_policies.ContinuousCheckpointingPolicy(minimum_interval_secs=60)
    spaced = asked_of(orbax_policies.AnySavePolicy([orbax_policies.FixedIntervalPolicy(50), inner]))
    assert spaced(question(1))
    assert not spaced(question(2, saved(0, 3600), saved(1, 59)))
    assert spaced(question(3, saved(1, 60)))
    assert spaced(question(50, saved(1, 1), saving=True))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (object(), "has no method should_save"),
        (orbax_policies.FixedIntervalPolicy(0), "an interval of at least one step"),
        (orbax_policies.AnySavePolicy([orbax_policies.FixedIntervalPolicy(-2)]), "an interval of at least one"),
    ],
)
def test_what_is_no_policy_is_refused_at_start(policy: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule_of(policy)


# Preservation.


def test_the_ramdisk_keeps_the_latest_steps_and_nothing_else() -> None:
    any_of, latest = orbax_policies.AnyPreservationPolicy, orbax_policies.LatestN
    assert local_max_to_keep(LocalCheckpointOptions()) == 1
    assert local_max_to_keep(LocalCheckpointOptions(max_to_keep=3)) == 3
    assert local_max_to_keep(LocalCheckpointOptions(preservation_policy=latest(2))) == 2
    assert local_max_to_keep(LocalCheckpointOptions(preservation_policy=any_of([latest(2), latest(4)]))) == 4
    with pytest.raises(ConfigError, match=r"local\.max_to_keep is 0"):
        local_max_to_keep(LocalCheckpointOptions(max_to_keep=0))


@pytest.mark.parametrize(
    "policy",
    [
        orbax_policies.LatestN(None),
        orbax_policies.LatestN(0),
        orbax_policies.EveryNSteps(5),
        orbax_policies.AnyPreservationPolicy([]),
        orbax_policies.AnyPreservationPolicy([orbax_policies.LatestN(2), orbax_policies.EveryNSteps(5)]),
        orbax_policies.BestN(get_metric_fn=len, n=2),
    ],
    ids=str,
)
def test_what_slots_cannot_do_is_refused_with_the_reason(policy: Any) -> None:
    with pytest.raises(ConfigError, match=r"local\.preservation_policy=.*a fixed number of slots"):
        local_max_to_keep(LocalCheckpointOptions(preservation_policy=policy))


def test_persistent_policies_see_steps_times_and_metrics() -> None:
    steps = [saved(1, 90, loss=3.0), saved(2, 60, loss=1.0), saved(3, 20), saved(4, 0, loss=2.0)]
    best = orbax_policies.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1)

    def preserved(policy: Any) -> list[int]:
        preserve = persistent_preservation(policy)
        assert preserve is not None
        return [step.step for step, keep in zip(steps, preserve(steps), strict=True) if keep]

    assert preserved(orbax_policies.LatestN(2)) == [3, 4]
    assert preserved(orbax_policies.EveryNSeconds(60)) == [1, 3]
    assert preserved(best) == [2, 3], "a step without metrics is kept, as Orbax keeps it"
    assert preserved(orbax_policies.AnyPreservationPolicy([best, orbax_policies.LatestN(1)])) == [2, 3, 4]
    assert persistent_preservation(None) is None
    with pytest.raises(ConfigError, match="has no method should_preserve"):
        persistent_preservation(object())


def test_the_ranking_is_that_of_the_best_n_among_the_policies() -> None:
    best = orbax_policies.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True)
    nested = orbax_policies.AnyPreservationPolicy(
        [orbax_policies.LatestN(1), orbax_policies.AnyPreservationPolicy([best])]
    )
    for policy in (best, nested):
        ranking = ranking_of(policy)
        assert ranking is not None
        assert ranking.lowest
        assert ranking.value({"loss": 2.5}) == 2.5
    assert ranking_of(orbax_policies.LatestN(1)) is None
    assert ranking_of(None) is None


@pytest.mark.parametrize("integer", [int, np.int64, np.uint8])
def test_numbers_of_steps_may_be_any_integers(integer: Any) -> None:
    rule, _ = rule_of(orbax_policies.FixedIntervalPolicy(integer(2)))
    assert rule == SaveRule(periods=(2,))
    latest = LocalCheckpointOptions(preservation_policy=orbax_policies.LatestN(integer(2)))
    for options in (latest, LocalCheckpointOptions(max_to_keep=integer(2))):
        assert type(local_max_to_keep(options)) is int
        assert local_max_to_keep(options) == 2
