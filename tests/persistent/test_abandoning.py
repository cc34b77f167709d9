"""Attempts that somebody gives up, or sweeps up as leftovers, while their committers are at work.

Either comes between any two operations of the other, and is overtaken in turn before any of its own: a step
that is listed is whole, and what was told to be committed is listed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.persistent.attempts import Attempt, PersistentStep
from emergency_ckpt.persistent.committer import commit
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.objects import KINDS
from tests.persistent.paced import Paced, open_paced_store
from tests.persistent.saving import assert_same, layout_of, read_shards, small_state, write_parts

LAYOUT = layout_of(small_state())


def abandon(store: PersistentStore, attempt: Attempt) -> None:
    store.abandon(attempt)


def sweep(store: PersistentStore, attempt: Attempt) -> None:
    """By the next life of the run."""
    newest = store.newest_generation()
    assert newest
    store.remove_leftovers(store.mint_generation(newest.number, None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("take_away", [abandon, sweep])
@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.long)])
def test_what_is_taken_away_while_it_is_committed_is_a_whole_step_or_none(
    ramdisk: Path, kind: str, take_away: Callable[[PersistentStore, Attempt], None], stride: int
) -> None:
    store = open_paced_store(ramdisk, kind, lambda: None)
    committer, other = Paced(ramdisk, kind), Paced(ramdisk, kind)
    seen = Counter[bool]()
    number = 0
    for first in itertools.count(1):
        is_over = False
        for second in itertools.count(1 + first % stride, stride):
            number += 1
            generation = store.mint_generation(0, None)
            attempt = Attempt(generation, number, "default")
            parts = write_parts(store, attempt, LAYOUT, small_state(number % 100))
            is_over = not committer.start(lambda s, a=attempt, p=parts: commit(s, a, LAYOUT, p), first)
            is_last = not other.start(lambda s, a=attempt: take_away(s, a), second)
            told = committer.finish()
            assert other.finish() is None
            seen[whole_step(store, attempt, number % 100, told)] += 1
            if is_last or is_over:
                break
        if is_over:
            break
    assert min(seen[True], seen[False]) > 5


def whole_step(store: PersistentStore, attempt: Attempt, seed: int, told: object) -> bool:
    """Whether the attempt is a step."""
    held = {step.step_id: step for step in store.steps()}.get(StepId(attempt.step_id.generation, attempt.step))
    if held is not None:
        assert_same(read_shards(store.open_step(held)), small_state(seed))
        store.delete_step(held)
    if isinstance(told, PersistentStep):
        assert told == held
    return held is not None
