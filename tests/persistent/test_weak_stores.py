"""Commits on stores without conditional puts: a reader gets a whole step or none, and never a mixture."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import PersistentStoreError
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.committer import commit
from emergency_ckpt.persistent.object_store.probe import Honoured
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.saving import assert_same, layout_of, read_shards, save, small_state, write_parts
from tests.persistent.weak_objects import open_weak_store

MOST = 400


class Died(BaseException):
    """The process is gone: nothing in it tidies up."""


class Countdown:
    """Calls `happen` once, before the n-th operation."""

    def __init__(self) -> None:
        self.left, self.happen = 0, lambda: None

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.happen()


def die() -> None:
    raise Died


def _ignore(_: Any) -> None:
    pass


def seed_of(store: PersistentStore, step: StepId) -> int | None:
    """Of which state a step is, every checksum used; None where there is none. Raises CorruptDataError."""
    held = {found.step_id: found for found in store.steps()}.get(step)
    if held is None:
        return None
    arrays = read_shards(store.open_step(held))
    assert_same(arrays, small_state(int(arrays["count"])))
    return int(arrays["count"])


def test_a_committer_that_dies_before_any_operation_leaves_a_whole_step_or_none(ramdisk: Path) -> None:
    countdown = Countdown()
    dying = open_weak_store(ramdisk, Honoured.IGNORED, countdown)
    store = open_weak_store(ramdisk, Honoured.IGNORED)
    layout, committed, number = layout_of(small_state()), list[bool](), 0
    for number in range(1, MOST, 3):
        generation = store.mint_generation(0, None)
        store.remove_leftovers(generation)
        attempt = Attempt(generation, number, "default")
        parts = write_parts(dying, attempt, layout, small_state(number))
        countdown.left, countdown.happen = number, die
        with contextlib.suppress(Died):
            commit(dying, attempt, layout, parts)
        countdown.happen = lambda: None
        seed = seed_of(store, StepId(generation.number, number))
        assert seed in (None, number)
        committed.append(seed is not None)
        if countdown.left > 0:
            break
        if seed is None:  # Another attempt of the same life gets through.
            save(store, Attempt(generation, number, "default", 1), small_state(number + 1))
            assert seed_of(store, StepId(generation.number, number)) in (number, number + 1)
        store.delete_step(store.steps()[0])
    assert 20 < len(committed) < MOST // 3 - 1
    assert committed == sorted(committed)
    assert committed[-1]
    store.remove_leftovers(store.mint_generation(0, None))
    assert [entry.name for entry in store.files.entries() if entry.name.isdigit()] == [str(number)]
    assert not store.files.entries("emergency_ckpt/attempts")


def test_a_committer_that_comes_between_any_two_operations_of_another_leaves_no_mixture(ramdisk: Path) -> None:
    countdown = Countdown()
    slow = open_weak_store(ramdisk, Honoured.IGNORED, countdown)
    store = open_weak_store(ramdisk, Honoured.IGNORED)
    generation = store.mint_generation(0, None)
    layout, outcomes = layout_of(small_state()), set[tuple[str, str]]()
    for number in range(1, MOST):
        attempts = [Attempt(generation, number, "default", ordinal) for ordinal in range(2)]
        parts = [write_parts(store, attempt, layout, small_state(i)) for i, attempt in enumerate(attempts)]
        countdown.left = number
        countdown.happen = lambda a=attempts[1], p=parts[1]: _ignore(commit(store, a, layout, p))
        try:
            commit(slow, attempts[0], layout, parts[0])
            told = "committed"
        except PersistentStoreError:
            told = "told of the other"
        if countdown.left > 0:
            break
        step = StepId(generation.number, number)
        found = {0: "its own", 1: "the other", None: "none"}[seed_of(store, step)]
        outcomes.add((told, found))
        if found == "none":  # As the drain does that was told.
            save(store, Attempt(generation, number, "default", 2), small_state(7))
            assert seed_of(store, step) == 7
        store.delete_step(store.steps()[0])
    else:
        pytest.fail("the commit has more operations than were tried")
    assert outcomes == {
        ("committed", "its own"),
        ("committed", "the other"),
        ("told of the other", "the other"),
        ("told of the other", "none"),
    }
