"""Steps in buckets: what is visible when, what goes, and what a mixture is taken for."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.committer import commit, commit_stages
from emergency_ckpt.persistent.files import ObjectFiles
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.object_store.conftest import Place
from tests.persistent.saving import assert_same, layout_of, read_shards, save, small_state, write_parts

# Of file systems see test_commit_crashes.
pytestmark = [pytest.mark.server, pytest.mark.parametrize("place", ["s3", "gcs"], indirect=True)]


@pytest.fixture
def store(place: Place) -> PersistentStore:
    return PersistentStore(f"{place.url}/{place.prefix}", files=ObjectFiles(place.store, place.prefix[:-1]))


def content_of(store: PersistentStore) -> dict[StepId, int]:
    """By step the seed of the state that it holds, every checksum used."""
    found: dict[StepId, int] = {}
    for step in store.steps():
        arrays = read_shards(store.open_step(step))
        found[step.step_id] = int(arrays["count"])
        assert_same(arrays, small_state(found[step.step_id]))
    return found


def test_steps_are_saved_made_void_replaced_and_deleted(store: PersistentStore) -> None:
    first = store.mint_generation(0, None)
    for step in (10, 20):
        save(store, Attempt(first, step, "default"), small_state(step))
    second = store.mint_generation(1, StepId(1, 10))
    with pytest.raises(PersistentStoreError, match="which no restore made void"):
        save(store, Attempt(second, 20, "default"), small_state(21))
    store.record_activation(Activation(2, 10))
    save(store, Attempt(second, 20, "default", 1), small_state(22))
    assert content_of(store) == {StepId(1, 10): 10, StepId(2, 20): 22}
    for step in store.steps():
        store.delete_step(step)
        store.delete_step(step)
    assert store.steps() == []
    assert not [entry for entry in store.files.entries() if entry.name.isdigit()]


def test_a_commit_that_stops_is_invisible_and_its_leftovers_go_with_the_next_life(
    store: PersistentStore,
) -> None:
    generation = store.mint_generation(0, None)
    layout = layout_of(small_state())
    for ordinal, stages in enumerate((1, 4, 6, 8)):
        attempt = Attempt(generation, 30, "default", ordinal)
        running = commit_stages(
            store, attempt, layout, write_parts(store, attempt, layout, small_state(ordinal))
        )
        for _ in range(stages):
            next(running)
        running.close()
        assert store.steps() == []
    save(store, Attempt(generation, 30, "default", 9), small_state(9))
    assert content_of(store) == {StepId(1, 30): 9}
    stopped = Attempt(generation, 40, "default", 10)
    write_parts(store, stopped, layout, small_state(10))
    store.remove_leftovers(generation)
    assert [entry.name for entry in store.files.entries("40")], "it may be in progress"
    removed = store.remove_leftovers(store.mint_generation(0, None))
    assert "40" in removed
    assert store.files.entries("40") == []
    assert content_of(store) == {StepId(1, 30): 9}


def test_of_attempts_that_race_a_whole_one_is_left(store: PersistentStore) -> None:
    generation = store.mint_generation(0, None)
    layout = layout_of(small_state())
    attempts = [Attempt(generation, 50, "default", ordinal) for ordinal in range(3)]
    parts = [write_parts(store, attempt, layout, small_state(5)) for attempt in attempts]
    begin, told = threading.Barrier(3), list[object]()

    def race(number: int) -> None:
        begin.wait(60)
        try:
            told.append(commit(store, attempts[number], layout, parts[number]))
        except PersistentStoreError as error:
            told.append(error)
            store.abandon(attempts[number])

    threads = [threading.Thread(target=race, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(not isinstance(each, PersistentStoreError) for each in told), told
    assert content_of(store) == {StepId(1, 50): 5}


def test_a_large_part_becomes_objects_that_are_put_side_by_side(store: PersistentStore, place: Place) -> None:
    """Whatever size of data files is asked for: one request is one stream."""
    arrays = {"w": np.random.default_rng(3).integers(0, 256, (6, 16 * 1024**2), np.uint8)}
    attempt = Attempt(store.mint_generation(0, None), 80, "default")
    options = WriteOptions(target_data_file_bytes=2 * 1024**3)
    save(store, attempt, arrays, layout=layout_of(arrays), options=options)
    pages = place.store.list_pages(f"{place.prefix}80/")
    sizes = [info.size / 1024**2 for page in pages for info in page.objects]
    large = sorted(round(size) for size in sizes if size > 1)
    assert large == [12, 12, 36, 36], "two writers have 48 MiB each, in chunks of 12 MiB"
    assert_same(read_shards(store.open_step(store.steps()[0])), arrays)


def test_a_mixture_of_attempts_is_damage(store: PersistentStore) -> None:
    """What a store that ignores conditions lets happen, and what a bit flip in such an object is."""
    generation = store.mint_generation(0, None)
    for step in (60, 70):
        save(store, Attempt(generation, step, "default"), small_state(step))
    root = "default/manifest.ocdbt"
    store.files.write(f"60/{root}", store.files.read(f"70/{root}"))
    with pytest.raises(CorruptDataError, match="is not of the attempt that"):
        store.open_step(store.steps()[0])
    assert_same(read_shards(store.open_step(store.steps()[1])), small_state(70))
