"""Comparing replicas before a restore: who has other bytes than most, shard by shard, and in which leaves.

Digests tell that copies differ; only then does one process per version say a number per shard, over the
coordination service, and process 0 plans anew with what it learned. Bounded: the newest steps, and what fits.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.replica_votes import (
    MOST_VERSIONS,
    DifferingReplicas,
    Outvoted,
    SlotOf,
    slot_fingerprints,
    vote,
)
from emergency_ckpt.core.replicas import Divergence, Fingerprints
from emergency_ckpt.runtime.agreement import agree
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.runtime.replicas import divergence_events
from emergency_ckpt.runtime.survey import Survey

_MOST_STEPS = 3
_MOST_NUMBERS = 1 << 20  # 8 MiB in all
_MOST_LEAVES = 50
"""How many leaves of a step are named."""


def compared_replicas(planner: Planner) -> tuple[DifferingReplicas, ...]:
    """The replicas that are worth a comparison, as far as the bounds allow. Process 0 asks."""
    found: list[DifferingReplicas] = []
    numbers = 0
    for each in planner.differing_replicas(_MOST_STEPS):
        slot = each.asked[0]
        layout = planner.saved_layout(slot.layout)
        size = len(layout.held.of_process(slot.position)) + len(layout.value_leaves)
        numbers += size * len(each.asked)
        if numbers > _MOST_NUMBERS:
            break
        if len(each.asked) <= MOST_VERSIONS:
            found.append(each)
    return tuple(found)


def compare_replicas(
    job: Job, key: str, survey: Survey, again: Callable[[Mapping[SlotOf, Outvoted]], Survey]
) -> Survey:
    """The survey in which replicas that differ have been compared. Collective where `survey.asked` has any.

    `again`: takes the survey anew, knowing what was outvoted; process 0 calls it.
    """
    if not survey.asked:
        return survey
    surveyed: list[Survey] = []

    def decide(said: Sequence[Any]) -> Any:
        assert survey.planner is not None
        numbers = {
            survey.asked[int(place)]: np.frombuffer(base64.b64decode(text), np.uint64)
            for each in said
            for place, text in each.items()
        }
        outvoted, divergences = _voted(survey.planner, numbers, job.topology.process_slice)
        taken = again(outvoted)
        events = [
            event
            for step, found in sorted(divergences.items())
            for event in divergence_events(step.step, found[:_MOST_LEAVES], job.topology.process_slice)
        ]
        surveyed.append(taken.with_divergences(tuple(events)))
        return surveyed[0].to_json()

    timeout = job.settings.coordination_timeout
    answer = agree(job.coordinator, key, lambda: _own_numbers(job, survey.asked), decide, timeout)
    return surveyed[0] if surveyed else Survey.from_json(answer)


def _own_numbers(job: Job, asked: Sequence[SlotOf]) -> dict[str, str]:
    found: dict[str, str] = {}
    for place, slot in enumerate(asked):
        sealed = job.local.sealed(slot.step) if slot.process == job.process else None
        if sealed is None or (sealed.manifest.layout, sealed.manifest.position) != (slot.layout, slot.position):
            continue  # Not this process's, or given up meanwhile: then these replicas are not compared.
        manifest = sealed.manifest
        numbers = slot_fingerprints(sealed.layout, slot.position, manifest.checksums, manifest.values)
        found[str(place)] = base64.b64encode(numbers.tobytes()).decode()
    return found


def _voted(
    planner: Planner, numbers: Mapping[SlotOf, Fingerprints], process_slice: Sequence[int]
) -> tuple[dict[SlotOf, Outvoted], dict[StepId, list[Divergence]]]:
    outvoted: dict[SlotOf, Outvoted] = {}
    divergences: dict[StepId, list[Divergence]] = {}
    for each in compared_replicas(planner):
        if not numbers.keys() >= set(each.asked):
            continue
        layouts: dict[str, Layout] = {
            replica.slot.layout: planner.saved_layout(replica.slot.layout) for replica in each.replicas
        }
        found = vote(each, layouts, numbers, process_slice)
        outvoted |= found.outvoted
        divergences.setdefault(each.step, []).extend(found.divergences)
    return outvoted, divergences
