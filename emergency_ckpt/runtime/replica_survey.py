"""Comparing replicas before a restore: who has other bytes than most, shard by shard, and in which leaves.

Where digests tell that copies differ, or do not tell, one process per version says a number per shard over the
coordination service, and process 0 plans anew with what it learned. Bounded: the newest steps, and what fits.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.replica_votes import MOST_VERSIONS, SlotOf, slot_fingerprints
from emergency_ckpt.core.replicas import Fingerprints
from emergency_ckpt.runtime.agreement import agree
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.runtime.replicas import divergence_events
from emergency_ckpt.runtime.survey import Survey

_MOST_STEPS = 3
_MOST_NUMBERS = 1 << 20  # 8 MiB in all
_MOST_LEAVES = 50
"""How many leaves of a step are named."""


def slots_to_ask(planner: Planner) -> tuple[SlotOf, ...]:
    """The slots whose fingerprints tell in what replicas differ, as far as the bounds allow. Process 0 asks."""
    found: dict[SlotOf, None] = {}
    numbers = 0
    for each in planner.differing_replicas(_MOST_STEPS):
        fresh = [slot for slot in each.asked if slot not in found]
        size = sum(_columns(planner.saved_layout(slot.layout), slot) for slot in fresh)
        if len(each.asked) <= MOST_VERSIONS and numbers + size <= _MOST_NUMBERS:
            found.update(dict.fromkeys(fresh))
            numbers += size
    return tuple(found)


def _columns(layout: Layout, slot: SlotOf) -> int:
    return len(layout.held.of_process(slot.position)) + len(layout.value_leaves)


def compare_replicas(
    job: Job, key: str, survey: Survey, again: Callable[[Mapping[SlotOf, Fingerprints]], Survey]
) -> Survey:
    """The survey in which replicas that differ have been compared. Collective where `survey.asked` has any.

    `again`: takes the survey anew, knowing the fingerprints of slots; process 0 calls it.
    """
    if not survey.asked:
        return survey
    surveyed: list[Survey] = []

    def decide(said: Sequence[Any]) -> Any:
        numbers = {
            survey.asked[int(place)]: np.frombuffer(base64.b64decode(text), np.uint64)
            for each in said
            for place, text in each.items()
        }
        taken = again(numbers)
        assert taken.planner is not None
        events = [
            event
            for step in sorted({slot.step for slot in survey.asked})
            for event in divergence_events(
                step.step, taken.planner.divergences(step)[:_MOST_LEAVES], job.topology.process_slice
            )
        ]
        surveyed.append(taken.with_divergences(tuple(events)))
        return surveyed[0].to_json()

    timeout = job.settings.coordination_timeout
    answer = agree(job.coordinator, key, lambda: _own_numbers(job, survey.asked), decide, timeout)
    return surveyed[0] if surveyed else Survey.from_json(answer)


def _own_numbers(job: Job, asked: Sequence[SlotOf]) -> dict[str, str]:
    found: dict[str, str] = {}
    for place, slot in enumerate(asked):
        slots = job.local.sealed_slots(slot.step) if slot.process == job.process else ()
        cut = slot.layout, slot.position
        sealed = next((s for s in slots if (s.manifest.layout, s.manifest.position) == cut), None)
        if sealed is None:
            continue  # Not this process's, or given up meanwhile: then these replicas are not compared.
        manifest = sealed.manifest
        numbers = slot_fingerprints(sealed.layout, slot.position, manifest.checksums, manifest.values)
        found[str(place)] = base64.b64encode(numbers.tobytes()).decode()
    return found
