"""What is deleted in the background stays out of the way of commits, and what fails is tried again."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import pytest

from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.errors import PersistentStoreError
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.committer import commit_stages
from emergency_ckpt.persistent.deletions import Deletions
from emergency_ckpt.persistent.object_store.file_system import FileSystemStore
from emergency_ckpt.persistent.records import Generation
from emergency_ckpt.persistent.store import PersistentStore, without_void
from tests.persistent.objects import KINDS, ObjectsInDirectory, open_store
from tests.persistent.saving import assert_same, layout_of, read_shards, save, small_state, write_parts

LIMIT = timedelta(seconds=30)


class SlowStore(FileSystemStore):
    """Objects of which those of step 20 are deleted when a test lets them, and all may refuse to be."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.begun, self.may_go_on, self.refused = threading.Event(), threading.Event(), False
        self.may_go_on.set()

    def delete_many(self, keys: Iterable[str]) -> None:
        wanted = list(keys)
        if self.refused:
            raise PersistentStoreError("no right to delete")
        if any(key.startswith("20/") for key in wanted):
            self.begun.set()
            assert self.may_go_on.wait(30)
        super().delete_many(wanted)


class Said:
    def __init__(self, store: PersistentStore, generation: Generation) -> None:
        self.told, self.warned = list[str](), list[str]()
        self.deletions = Deletions(
            store,
            lambda: generation,
            lambda _, text: self.told.append(text),
            lambda _, text: self.warned.append(text),
        )


def saved(root: Path, kind: str, *steps: int) -> tuple[PersistentStore, Generation]:
    store = open_store(root, kind)
    generation = store.mint_generation(0, None)
    for step in steps:
        save(store, Attempt(generation, step, "default"), small_state(step))
    return store, generation


def names(store: PersistentStore) -> list[str]:
    return [entry.name for entry in store.files.entries() if entry.name != "emergency_ckpt"]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_go_out_of_sight_and_then_away_and_the_pointer_follows(tmp_path: Path, kind: str) -> None:
    store, generation = saved(tmp_path, kind, 10, 20, 30)
    latest = store.latest()
    assert latest is not None
    assert latest.step_id == StepId(1, 30)
    said = Said(store, generation)
    first, second, third = store.steps()
    said.deletions.delete([(first, "old"), (third, "bad")], second)
    assert said.deletions.wait_hidden(LIMIT)
    assert store.steps() == [second]
    assert said.deletions.close(LIMIT)
    assert names(store) == ["20"]
    assert store.latest() == second
    assert sorted(said.told) == [
        f"deleted the persistent {s.step_id}: {w}" for s, w in ((first, "old"), (third, "bad"))
    ]


def test_a_commit_waits_for_what_is_deleted_in_its_directory_and_for_nothing_else(tmp_path: Path) -> None:
    slow = SlowStore(tmp_path)
    store = PersistentStore(tmp_path, files=ObjectsInDirectory(slow))
    first = store.mint_generation(0, None)
    for step in (10, 20):
        save(store, Attempt(first, step, "default"), small_state(step))
    second = store.mint_generation(1, StepId(1, 10))
    store.record_activation(Activation(2, 10))
    said = Said(store, second)
    slow.may_go_on.clear()
    void = store.steps()[1]
    said.deletions.delete([(void, "void")], None)
    assert slow.begun.wait(30)
    ended = threading.Event()

    def write_over() -> None:
        said.deletions.make_free("20")
        save(store, Attempt(second, 20, "default"), small_state(22))
        ended.set()

    slow.begun.clear()
    said.deletions.make_free("30")
    save(store, Attempt(second, 30, "default", 1), small_state(30))
    writer = threading.Thread(target=write_over)
    writer.start()
    # Another writer of this life has begun, too: what it has written stays.
    layout = layout_of(small_state())
    parts = write_parts(store, Attempt(second, 20, "default", 2), layout, small_state(22))
    assert not ended.is_set()
    slow.may_go_on.set()
    writer.join(30)
    assert ended.is_set()
    said.deletions.delete([], None)
    assert said.deletions.close(LIMIT)
    assert [s.step_id for s in without_void(store.steps(), store.activations())] == [
        StepId(1, 10),
        StepId(2, 20),
        StepId(2, 30),
    ]
    assert_same(read_shards(store.open_step(store.steps()[1])), small_state(22))
    assert len(parts) == 4


def test_a_commit_sweeps_its_own_directory_where_nobody_has_yet(tmp_path: Path) -> None:
    """The sweep of a start is held up in another step's directory meanwhile, and comes by afterwards."""
    slow = SlowStore(tmp_path)
    store = PersistentStore(tmp_path, files=ObjectsInDirectory(slow))
    first, layout = store.mint_generation(0, None), layout_of(small_state())
    for step in (10, 20, 30):
        running = commit_stages(
            store,
            attempt := Attempt(first, step, "default"),
            layout,
            write_parts(store, attempt, layout, small_state(step)),
        )
        for _ in range(7):
            next(running)
        running.close()
    store.files.write("20/metrics/metrics", b"{}")
    second = store.mint_generation(1, None)
    said = Said(store, second)
    with said.deletions._working_on("10"):  # As if it took long.
        said.deletions.sweep(second)
        said.deletions.make_free("20")
        assert not store.files.entries("20"), "also what the new step does not have"
        save(store, Attempt(second, 20, "default"), small_state(22))
    assert said.deletions.close(LIMIT)
    (step,) = store.steps()
    assert_same(read_shards(store.open_step(step)), small_state(22))
    assert names(store) == ["20"]
    assert not store.files.entries("emergency_ckpt/attempts")


def test_what_fails_is_said_and_tried_again_with_the_next_deletion_or_by_the_next_life(tmp_path: Path) -> None:
    slow = SlowStore(tmp_path)
    store = PersistentStore(tmp_path, files=ObjectsInDirectory(slow))
    generation = store.mint_generation(0, None)
    for step in (10, 20, 30):
        save(store, Attempt(generation, step, "default"), small_state(step))
    first, second, third = store.steps()
    said, slow.refused = Said(store, generation), True
    for step in (first, second):
        said.deletions.delete([(step, "old")], third)
        assert said.deletions.wait_hidden(LIMIT)
    assert store.steps() == [third]
    assert said.deletions.close(LIMIT), "what failed is not waited for"
    assert names(store) == ["10", "20", "30"]
    assert len([text for text in said.warned if "no right to delete" in text]) >= 2
    slow.refused = False
    again = Said(store, generation)
    again.deletions.delete([], third)
    assert again.deletions.close(LIMIT)
    assert names(store) == ["10", "20", "30"], "another life knows of nothing"
    following = store.mint_generation(1, None)
    sweeping = Said(store, following)
    sweeping.deletions.sweep(following)
    assert sweeping.deletions.close(LIMIT)
    assert names(store) == ["30"]


def test_a_life_that_is_not_the_newest_any_more_deletes_nothing(tmp_path: Path) -> None:
    store, generation = saved(tmp_path, "objects", 10, 20)
    store.mint_generation(1, None)
    said = Said(store, generation)
    said.deletions.delete([(store.steps()[0], "old")], None)
    assert said.deletions.close(LIMIT)
    assert len(store.steps()) == 2
    (warned,) = said.warned
    assert "another life of the run has begun" in warned
