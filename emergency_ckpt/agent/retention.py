"""Retention by agents, when no trainer is left to do it: by the same rule, from what the trainer told.

Where a policy of the trainer decides, nothing is deleted here: the next trainer does it at its next commit.
"""

from __future__ import annotations

from emergency_ckpt.agent.draining import check_life
from emergency_ckpt.agent.orders import Destination
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.retention import superseded_steps
from emergency_ckpt.persistent.attempts import PersistentStep
from emergency_ckpt.persistent.store import PersistentStore, without_void


def apply_retention(store: PersistentStore, destination: Destination) -> list[StepId]:
    """Deletes committed steps that are void, or more than are kept; returns which. The newest one stays.

    Raises StaleGenerationError where the run has a later life, which sees to it itself, PersistentStoreError.
    """
    if not destination.tidies:
        return []
    check_life(store, destination)
    steps = store.steps()
    valid = without_void(steps, store.activations())
    newest = max((step.step_id for step in valid), default=None)
    numbers = [step.step_id.step for step in valid]
    given_up = set(superseded_steps(numbers, destination.max_to_keep, destination.keep_period))
    deleted: list[PersistentStep] = []
    for step in steps:
        superseded = step.step_id.step in given_up and (newest is None or step.step_id.step != newest.step)
        if step not in valid or superseded:
            deleted.append(step)
    store.delete_steps(deleted)
    return [step.step_id for step in deleted]
