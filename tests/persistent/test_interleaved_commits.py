"""Two committers of one step on an object store, the second one between any two operations of the first.

What one of them was told is committed stays, whole, at every moment, whatever the other one does after it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import PersistentStoreError
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.committer import commit
from emergency_ckpt.persistent.object_store.probe import Honoured
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.saving import assert_same, layout_of, read_shards, small_state, write_parts
from tests.persistent.weak_objects import open_weak_store

MOST = 400


class Interference:
    """Before the n-th operation the other one commits; from then on whoever asks finds a whole step."""

    def __init__(self, store: PersistentStore) -> None:
        self._store = store
        self.begin(0, Attempt(store.mint_generation(0, None), 0, "default"), [])

    def begin(self, left: int, other: Attempt, parts: list) -> None:
        self.left, self._other, self._parts = left, other, parts
        self.told: str | None = None
        self._is_there = False

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.told = outcome(self._store, self._other, self._parts)
            self._is_there = self.told == "committed"
        if self._is_there:
            seed_of(self._store, self._other, whole=False)


def outcome(store: PersistentStore, attempt: Attempt, parts: list) -> str:
    try:
        commit(store, attempt, layout_of(small_state()), parts)
    except PersistentStoreError as error:
        store.abandon(attempt)
        return "refused" if "somebody else" in str(error) or "another attempt" in str(error) else str(error)
    return "committed"


def seed_of(store: PersistentStore, attempt: Attempt, whole: bool = True) -> int:
    (step,) = [held for held in store.steps() if held.step_id == StepId(1, attempt.step)]
    reader = store.open_step(step)
    if not whole:
        return -1
    arrays = read_shards(reader)
    assert_same(arrays, small_state(int(arrays["count"])))
    return int(arrays["count"])


@pytest.mark.parametrize(("first", "second"), [(0, 1), pytest.param(1, 0, marks=pytest.mark.long)])
def test_what_was_committed_stays_whole_whoever_comes_between(ramdisk: Path, first: int, second: int) -> None:
    store = open_weak_store(ramdisk, Honoured.YES)
    interference = Interference(store)
    slow = open_weak_store(ramdisk, Honoured.YES, interference)
    generation = store.newest_generation()
    assert generation
    layout, seen = layout_of(small_state()), Counter[tuple[str, str | None, int]]()
    for number in range(1, MOST):
        attempts = [Attempt(generation, number, "default", ordinal) for ordinal in (first, second)]
        parts = [write_parts(store, attempt, layout, small_state(i)) for i, attempt in enumerate(attempts)]
        interference.begin(number, attempts[1], parts[1])
        told = outcome(slow, attempts[0], parts[0])
        if interference.left > 0:
            break
        seen[told, interference.told, seed_of(store, attempts[0])] += 1
        store.delete_step(store.steps()[0])
    else:
        pytest.fail("the commit has more operations than were tried")
    # Each may come first, be told of the other, or take the place of one that has not got far.
    assert all("committed" in (mine, theirs) for mine, theirs, _ in seen)
    assert {mine for mine, _, _ in seen} | {theirs for _, theirs, _ in seen} == {"committed", "refused"}
    store.remove_leftovers(store.mint_generation(1, None))
    assert not store.files.entries("emergency_ckpt/attempts")
