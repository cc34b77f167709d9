"""What a plan and `emergency-ckpt deploy` have in common: the shape of the job, its ramdisks, its last save.

One file may have the values of both: the plan takes the shape from it, and says what belongs into it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emergency_ckpt.config import Config
from emergency_ckpt.config.names import did_you_mean
from emergency_ckpt.core.forecast.job_plan import JobPlan
from emergency_ckpt.core.forecast.sizing import quantity
from emergency_ckpt.core.machines import MACHINES, MIB, known_machine
from emergency_ckpt.deploy.names import mebibytes
from emergency_ckpt.deploy.plan import read_words
from emergency_ckpt.deploy.values import FIELDS, MOST_SAVE_SECONDS, PREFIX, Deployment

_SAID_LATER: Mapping[str, Any] = {
    "workload": "later",
    "image": "later",
    "command": "later",
    "ramdisk_size": "1Mi",
}
"""What a deployment needs and a plan does not."""


def read_both(words: Sequence[str], environment: Mapping[str, str]) -> tuple[Config, Mapping[str, Any]]:
    """The flags of a job, and those values of its deployment that were given, checked.

    What is no value of a deployment, in a file for something else, is passed over. Raises ConfigError.
    """
    config, given, sources = read_words(words, environment)
    given = {name: value for name, value in given.items() if name in FIELDS or sources[name] == "command line"}
    checked = Deployment(sources, **{**_SAID_LATER, **given})
    if "workload" in given:
        config, _, _ = read_words(words, {**environment, "JOBSET_NAME": checked.workload})
    return config, {name: getattr(checked, name) for name in given}


def take_shape(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Sets what options leave open to what the deployment says; its TPUs, where none says anything of hosts."""
    if args.slices is None:
        args.slices = given.get("slices", 1)
    options = (args.tpu_type, args.machine, args.hosts_per_slice, args.chips_per_host)
    if all(option is None for option in options):
        args.tpu_type = given.get("tpu_type")
    if args.tpu_type is None:
        if args.hosts_per_slice is None:
            args.hosts_per_slice = given.get("hosts_per_slice")
        if args.machine is None and known_machine(instance := given.get("instance_type")):
            args.machine = instance
    if args.trainer_memory is None and given.get("memory") is not None:
        agent = given.get("agent_memory", Deployment.model_fields["agent_memory"].default)
        args.trainer_memory = f"{mebibytes(given['memory']) + mebibytes(agent)}Mi"


def deploy_values(given: Mapping[str, Any], plan: JobPlan, machine: str | None) -> Iterator[tuple[str, Any]]:
    """The values of the deployment that follow from a plan, by name; None: what was given does not count.

    `machine`: the type of the hosts as somebody named it, which may have `ml.` before it. The planned save is
    never less than what was given, or than the usual one: figures are assumed, and a drain may be under way
    when the notice comes.
    """
    of = plan.request
    yield f"{PREFIX}slices", of.shape.slices
    on_tpus = of.tpu_type is not None
    shape = {
        "tpu_type": of.tpu_type,
        "hosts_per_slice": None if on_tpus else of.shape.hosts_per_slice,
        "instance_type": None if on_tpus else machine or given.get("instance_type"),
    }
    for name, value in shape.items():
        if value is not None or name in given:
            yield f"{PREFIX}{name}", value
    yield f"{PREFIX}ramdisk_size", quantity(plan.ramdisk_mib)
    if (seconds := last_save_seconds(plan)) <= MOST_SAVE_SECONDS:
        usual = Deployment.model_fields["planned_save_seconds"].default
        yield f"{PREFIX}planned_save_seconds", max(seconds, given.get("planned_save_seconds", usual))


def last_save_seconds(plan: JobPlan) -> int:
    """From a notice until a step that is saved for it is in the persistent tier, in whole seconds.

    That is, where no drain is under way, and the hosts that go away write their part.
    """
    of = plan.request
    costs = of.costs
    return math.ceil(of.step_seconds + costs.local_blocked + costs.local_lag + costs.persistent_lag)


def deploy_notes(given: Mapping[str, Any], plan: JobPlan) -> Iterator[str]:
    """What does not go together."""
    asked, memory, instance = given.get("ramdisk_size"), plan.request.memory, given.get("instance_type")
    if asked is not None and memory is not None and mebibytes(asked) * MIB > memory.for_ramdisk:
        free = quantity(memory.for_ramdisk // MIB)
        yield f"{PREFIX}ramdisk_size={asked} is more than the {free} that are free for it on a host."
    if plan.request.tpu_type is None and instance is not None and not known_machine(instance):
        yield (
            f"{PREFIX}instance_type={instance} is not in the table of machine types."
            + did_you_mean(instance, list(MACHINES))
        )
    if asked is not None and mebibytes(asked) * MIB < plan.ramdisk.needed_bytes:
        yield (
            f"{PREFIX}ramdisk_size={asked} is less than the {quantity(plan.ramdisk_mib)} of this plan: set"
            " that, or plan with fewer --slots or a smaller --buffer."
        )
    planned = given.get("planned_save_seconds")
    seconds = last_save_seconds(plan)
    if planned is not None and planned < seconds <= MOST_SAVE_SECONDS:
        yield (
            f"{PREFIX}planned_save_seconds={planned:g} is less than the {seconds} s that a last save takes by"
            " this plan: a pod may be gone before its step is in the persistent tier."
        )
    if seconds > MOST_SAVE_SECONDS:
        yield (
            f"a last save takes {seconds} s by this plan, longer than any grace period: what survives a notice "
            "is on the ramdisks of others."
        )
