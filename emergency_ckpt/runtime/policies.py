"""Orbax's policies in our terms: which of them are pure rules, and how the others are asked.

A policy that is a pure function of the step and of facts that all processes share becomes a `SaveRule`, which
costs integer arithmetic. Every other one is asked in process 0 only, so that no two processes ever differ.
"""

from __future__ import annotations

import dataclasses
import datetime
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers as orbax_policies
from orbax.checkpoint import options as orbax_options
from orbax.checkpoint.checkpoint_manager import CheckpointInfo

from emergency_ckpt.core.retention import SavedStep
from emergency_ckpt.core.schedule import SaveRule, default_rule
from emergency_ckpt.errors import ConfigError

# Containers whose content is the same on all processes of a program; another one might compute its answer.
_PLAIN_CONTAINERS = (set, frozenset, range, tuple, list)

ShouldSaveFn = Callable[[int, int | None], bool]
Preservation = Callable[[Sequence[SavedStep]], Collection[Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What process 0 knows when a tier's policy is asked about a step.

    Attributes:
      step: the step. now: the time, with a time zone.
      previous: the tier's saved steps that are still there, and those on their way, ascending.
      saving: whether a save of this tier is in progress.
      preempted: a notice was agreed on at this step.
    """

    step: int
    now: datetime.datetime
    previous: Sequence[SavedStep]
    saving: bool
    preempted: bool


AskedPolicy = Callable[[Question], bool]


def tier_rule(tier: str, options: Any) -> tuple[SaveRule | None, AskedPolicy | None]:
    """When a tier saves, by its Orbax options, and whom to ask where the rule says so.

    As in Orbax a `save_decision_policy` stands alone, `should_save_fn` and `save_interval_steps` obey a
    preemption, and intervals save the first step as well. Raises ConfigError for what is neither.
    """
    policy, function = options.save_decision_policy, options.should_save_fn
    if policy is not None:
        rule = _pure_rule(f"{tier}.save_decision_policy", policy)
        return (rule, None) if rule else (SaveRule(asked=True), lambda question: _decide(policy, question))
    if function is not None:
        return SaveRule(asked=True), lambda question: _call(function, question)
    period = options.save_interval_steps
    if period is None or period < 0:
        raise ConfigError(
            f"{tier}.save_interval_steps is {period!r}; expected a number of steps, 0 for no saves"
        )
    return default_rule(period), None


def _pure_rule(name: str, policy: Any) -> SaveRule | None:
    """The rule that says what `policy` says; None where it has to be asked."""
    if not callable(getattr(policy, "should_save", None)):
        raise ConfigError(f"{name}: {policy!r} has no method should_save; give a policy of Orbax's")
    if _decides_like(policy, orbax_policies.FixedIntervalPolicy):
        interval = _count(policy.interval)
        if interval is None:
            raise ConfigError(f"{name}: {policy!r} needs an interval of at least one step")
        return SaveRule(periods=(interval,))
    if _decides_like(policy, orbax_policies.SpecificStepsPolicy):
        return SaveRule(steps=(policy.steps,)) if type(policy.steps) in _PLAIN_CONTAINERS else None
    if _decides_like(policy, orbax_policies.InitialSavePolicy):
        return SaveRule(first=True)
    if _decides_like(policy, orbax_policies.PreemptionCheckpointingPolicy):
        return SaveRule(preemption=True)
    if not _decides_like(policy, orbax_policies.AnySavePolicy):
        return None
    rule = SaveRule()
    pure = [_pure_rule(name, part) for part in policy.policies]
    for part in pure:
        if part is None:
            return None
        rule = rule | part
    return rule


def _count(number: Any) -> int | None:
    """A number of steps as a plain int, numpy's integers included; None for anything but 1 or more."""
    try:
        count = int(operator.index(number))
    except TypeError:
        return None
    return count if count > 0 else None


def _decides_like(policy: Any, kind: type) -> bool:
    """Whether `policy` decides with the very code of `kind`: a subclass may have its own."""
    return getattr(policy.should_save, "__func__", None) is kind.__dict__["should_save"]


def _call(function: ShouldSaveFn, question: Question) -> bool:
    latest = question.previous[-1].step if question.previous else None
    return bool(function(question.step, latest)) or question.preempted


def _decide(policy: Any, question: Question) -> bool:
    """What the policy says. Those of Orbax's that would talk to other processes are answered here."""
    if _decides_like(policy, orbax_policies.AnySavePolicy):
        return any(_decide(part, question) for part in policy.policies)
    if _decides_like(policy, orbax_policies.ContinuousCheckpointingPolicy):
        return _decide_continuously(policy.minimum_interval_secs, question)
    context = orbax_policies.DecisionContext(
        is_saving_in_progress=question.saving,
        reached_preemption=question.preempted,
        multiprocessing_options=orbax_options.MultiprocessingOptions(),
    )
    asked = _info(SavedStep(question.step, question.now))
    previous = [_info(saved) for saved in question.previous]
    return bool(policy.should_save(asked, previous_steps=previous, context=context))


def _decide_continuously(minimum_seconds: float | None, question: Question) -> bool:
    """Orbax's rule: as often as possible, but no two saves at once and none too soon after the other."""
    if question.saving:
        return False
    if minimum_seconds is None or not question.previous:
        return True
    passed = question.now - question.previous[-1].time
    return passed >= datetime.timedelta(seconds=minimum_seconds)


# Preservation.


def local_max_to_keep(options: Any) -> int:
    """How many steps the ramdisk keeps. Raises ConfigError for what a fixed number of slots cannot do."""
    if options.preservation_policy is not None:
        return _slots_of(options.preservation_policy)
    kept = 1 if options.max_to_keep is None else _count(options.max_to_keep)
    if kept is None:
        raise ConfigError(
            f"local.max_to_keep is {options.max_to_keep!r}; expected 1 at least: the newest step is always kept"
        )
    return kept


def _slots_of(policy: Any) -> int:
    if _preserves_like(policy, orbax_policies.AnyPreservationPolicy) and policy.policies:
        return max(_slots_of(part) for part in policy.policies)
    if _preserves_like(policy, orbax_policies.LatestN) and (kept := _count(policy.n)):
        return kept
    raise ConfigError(
        f"local.preservation_policy={policy!r} is not supported: a ramdisk has a fixed number of slots, so "
        "that only LatestN(n) with n of at least 1 can be kept there. Use local.max_to_keep, and give other "
        "policies to the persistent tier."
    )


def persistent_preservation(policy: Any) -> Preservation | None:
    """Asks the persistent tier's policy which steps to preserve; one process calls it, with steps ascending."""
    if policy is None:
        return None
    if not callable(getattr(policy, "should_preserve", None)):
        raise ConfigError(
            f"persistent.preservation_policy: {policy!r} has no method should_preserve; give one of Orbax's"
        )

    def preserve(steps: Sequence[SavedStep]) -> Collection[Any]:
        context = orbax_policies.PreservationContext()
        return policy.should_preserve([_info(saved) for saved in steps], context=context)

    return preserve


@dataclasses.dataclass(frozen=True, slots=True)
class Ranking:
    """How steps are compared: by a value that is found in their metrics.

    Attributes:
      value: of the metrics of a step; raises KeyError where they lack it.
      lowest: whether the lowest value is best.
    """

    value: Callable[[Mapping[str, Any]], float]
    lowest: bool


def ranking_of(policy: Any) -> Ranking | None:
    """How the first `BestN` in a preservation policy ranks steps; None where there is none."""
    if isinstance(policy, orbax_policies.BestN):
        return Ranking(policy.get_metric_fn, policy.reverse)
    if isinstance(policy, orbax_policies.AnyPreservationPolicy):
        found = (ranking_of(part) for part in policy.policies)
        return next((ranking for ranking in found if ranking is not None), None)
    return None


def _preserves_like(policy: Any, kind: type) -> bool:
    method = getattr(policy, "should_preserve", None)
    return getattr(method, "__func__", None) is kind.__dict__["should_preserve"]


def _info(saved: SavedStep) -> CheckpointInfo:
    """A step as Orbax's own manager shows it to policies."""
    metrics = None if saved.metrics is None else dict(saved.metrics)
    return CheckpointInfo(step=saved.step, time=saved.time, metrics=metrics)
