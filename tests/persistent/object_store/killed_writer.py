"""Run as a script: one life of a run, which saves a step after the other until it is killed, and tells of it.

Arguments: the persistent directory, how many steps to save, how many of the newest steps to go back behind.
It deletes and sweeps as the leading process of a job does. Each line that it prints is true when it is printed.
"""

from __future__ import annotations

import sys
from datetime import timedelta

from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.committer import commit_stages
from emergency_ckpt.persistent.deletions import Deletions
from emergency_ckpt.persistent.store import PersistentStore, without_void
from tests.persistent.saving import layout_of, small_state, write_parts

KEPT = 3


def seed_of(step: StepId) -> int:
    return 1000 * step.generation + step.step


def main(url: str, steps: int, back: int) -> None:
    store = PersistentStore(url)
    valid = [held.step_id for held in without_void(store.steps(), store.activations())]
    parent = valid[max(-len(valid), -1 - back)] if valid else None
    generation = store.mint_generation(0, parent)
    deletions = Deletions(
        store, lambda: generation, lambda step, text: None, lambda step, text: say("failed", text)
    )
    say("began", generation.number)
    deletions.sweep(generation)
    store.record_activation(Activation(generation.number, parent.step if parent else None))
    say("activated", parent.step if parent else -1)
    layout = layout_of(small_state())
    first = parent.step + 1 if parent else 1
    for ordinal, number in enumerate(range(first, first + steps)):
        deletions.make_free(store.names.name(number))
        attempt = Attempt(generation, number, "default", ordinal)
        say("writing", number)
        parts = write_parts(store, attempt, layout, small_state(seed_of(attempt.step_id)))
        say("written", number)
        for stage in commit_stages(store, attempt, layout, parts):
            say(stage.replace(" ", "_"), number)
        say("committed", number)
        held = store.steps()
        kept = without_void(held, store.activations())[-KEPT:]
        deletions.delete([(step, "newer ones are kept") for step in held if step not in kept], kept[-1])
    deletions.close(timedelta(seconds=30))
    say("ended", generation.number)


def say(what: str, number: int | str) -> None:
    print(what, number, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
