"""Several jobs in one directory, runs begun anew, steps trained again, records that may or may not be there."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from jax.sharding import Mesh

from emergency_ckpt import CheckpointManager, MultiprocessingOptions
from emergency_ckpt.agent import draining
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.errors import LocalDirectoryError, PeerFailedError, PersistentStoreError
from emergency_ckpt.persistent.files import LocalFiles
from tests.manager.states import OPTIONS, Opener, Unreliable, assert_same, make_state, save_all


class Gate:
    """Holds the commits of all drains until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        real = draining.commit

        def commit(*args: Any) -> Any:
            self.reached.set()
            assert self._open.wait(60)
            return real(*args)

        monkeypatch.setattr(draining, "commit", commit)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def test_a_step_that_is_trained_again_comes_back_as_it_was_trained_last(
    opened: Opener, mesh: Mesh, ramdisk: Path
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 11))
    manager.restore(5)
    for step in range(6, 11):
        manager.save(step, make_state(mesh, step + 100))
    manager.wait_until_finished()
    manager.check_for_errors()
    assert manager.latest_step() == 10
    manager = opened()
    assert_same(manager.restore(None)["state"], make_state(mesh, 110))
    manager.close()
    for manifest in ramdisk.rglob("*.manifest"):
        manifest.unlink()
    manager = opened()
    assert_same(manager.restore(10)["state"], make_state(mesh, 110))


def test_a_second_job_on_the_persistent_directory_takes_over_and_the_first_commits_nothing_more(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, gate: Gate
) -> None:
    places = [ramdisk / "first", ramdisk / "second"]
    for place in places:
        place.mkdir()

    def started(place: Path) -> CheckpointManager:
        return CheckpointManager(place, tmp_path / "bucket", mesh, make_state(mesh, 0), options=OPTIONS)

    with started(places[0]) as first:
        first.save(5, make_state(mesh, 5))
        assert gate.reached.wait(60)
        with started(places[1]) as second:
            gate.open()
            second.save(5, make_state(mesh, 105))
            second.finish(5, make_state(mesh, 105))
            first.save(10, make_state(mesh, 10))
            first.wait_until_finished()
            assert first.metrics_snapshot()["drains_superseded"] == 2
            assert second.metrics_snapshot()["drains_committed"] == 1
            assert first.latest_complete_step() == 10  # Its ramdisk goes on.
    assert [p.name for p in (tmp_path / "bucket").iterdir() if p.name.isdigit()] == ["5"]
    with started(places[1]) as third:
        assert_same(third.restore(None)["state"], make_state(mesh, 105))


def test_a_second_job_on_the_same_ramdisk_too_is_the_only_one_that_saves(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    def started() -> CheckpointManager:
        return CheckpointManager(ramdisk, tmp_path / "bucket", mesh, make_state(mesh, 0), options=OPTIONS)

    with started() as first:
        save_all(first, mesh, range(4, 5))
        with started() as second:
            assert second.restore_or_init(dict).step == 4
            with pytest.raises(LocalDirectoryError, match="taken over by a newer manager"):
                first.save(6, make_state(mesh, 6))
            assert save_all(second, mesh, range(5, 9)) == [5, 6, 8]
        assert first.latest_step() == 4
    with started() as third:
        assert_same(third.restore(None)["state"], make_state(mesh, 8))


def test_what_was_fetched_early_gives_way_to_a_newer_manager_of_the_process(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    def started() -> CheckpointManager:
        return CheckpointManager(ramdisk, tmp_path / "bucket", mesh, make_state(mesh, 0), options=OPTIONS)

    with started() as saving:
        save_all(saving, mesh, range(5, 11))
    for path in ramdisk.glob("emergency_ckpt/*/slot_*"):
        path.unlink()
    with started() as first:
        early = first._engine._restorer.early
        assert early is not None
        assert early.wait(timedelta(seconds=60))
        assert early.ready_bytes > 0
        with started() as second:
            again = second._engine._restorer.early
            assert again is not None
            assert again.wait(timedelta(seconds=60))
            assert second.restore_or_init(dict).step == 10
            assert second.metrics_snapshot()["early_bytes"] == early.ready_bytes
            assert save_all(second, mesh, range(11, 13)) == [12]


def test_a_run_name_used_again_after_the_bucket_was_wiped_takes_nothing_of_the_old_run(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    save_all(opened(), mesh, range(1, 9))
    first = opened().run_id
    shutil.rmtree(tmp_path / "bucket")
    manager = opened()
    assert manager.run_id != first
    assert manager.latest_step() is None
    assert manager.restore_or_init(lambda: "fresh").state == "fresh"
    assert save_all(manager, mesh, range(1, 5)) == [1, 2, 4]
    assert opened().restore_or_init(dict).step == 4


def test_saves_that_outrun_a_drain_find_slots_and_the_newest_step_becomes_persistent(
    opened: Opener, mesh: Mesh, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    monkeypatch.setattr(
        manager, "_settings", dataclasses.replace(manager._settings, slot_wait=timedelta(seconds=0.1))
    )
    saved = [step for step in range(1, 41) if manager.save(step, make_state(mesh, step))]
    counted = manager.metrics_snapshot()
    assert saved == [step for step in range(1, 41) if step == 1 or step % 2 == 0 or step % 5 == 0]
    assert counted["saves_skipped"] == 0
    assert counted["drains_superseded"] > 0
    gate.open()
    manager.wait_until_finished()
    manager.check_for_errors()
    assert manager.latest_complete_step() == saved[-1]
    counted = manager.metrics_snapshot()
    assert counted["saves_complete"] == len(saved)
    persistent = sorted(int(p.name) for p in (tmp_path / "bucket").iterdir() if p.name.isdigit())
    assert {1, 40} <= set(persistent) <= {1, 35, 40}, "the one that was on its way, and the newest that are due"
    assert save_all(manager, mesh, range(41, 46)) == [42, 44, 45]
    assert (tmp_path / "bucket/45").is_dir()
    assert_same(opened().restore(None)["state"], make_state(mesh, 45))


class _LosesAnswers(LocalFiles):
    """A store that does what it is asked and then reports an error."""

    left = 0

    def create(self, path: str, data: bytes) -> bool:
        done = super().create(path, data)
        if "activations" in path and type(self).left:
            type(self).left -= 1
            raise PersistentStoreError("connection reset")
        return done


def test_an_activation_that_was_recorded_although_the_store_reported_an_error_counts(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(), mesh, range(1, 11))
    manager = opened()
    monkeypatch.setattr(_LosesAnswers, "left", 1)
    store = manager._engine.job.persistent
    monkeypatch.setattr(store, "files", _LosesAnswers(store.files.locate()))
    assert_same(manager.restore(None)["state"], make_state(mesh, 10))
    assert not _LosesAnswers.left, "an answer was lost"
    assert [a.step for a in store.activations()][-1] == 10
    assert opened().restore_or_init(dict).step == 10


def test_a_restore_that_failed_after_its_activation_may_be_made_again_with_any_step(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes held the state, so the record stands; the next try is a generation of its own."""
    save_all(opened(), mesh, range(1, 11))
    manager = opened()
    store = manager._engine.job.persistent
    real = store.record_activation

    def record_and_fail(activation: Activation) -> None:
        monkeypatch.setattr(store, "record_activation", real)
        real(activation)
        raise PersistentStoreError("connection reset")

    monkeypatch.setattr(store, "record_activation", record_and_fail)
    with pytest.raises(PersistentStoreError, match="connection reset"):
        manager.restore(None)
    assert_same(manager.restore(None)["state"], make_state(mesh, 10))
    assert_same(manager.restore(1)["state"], make_state(mesh, 1))
    assert save_all(manager, mesh, range(2, 5)) == [2, 4]


def test_a_save_after_a_restore_that_failed_at_its_end_begins_a_generation_of_its_own(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(), mesh, range(1, 5))
    manager = opened()
    before = manager.generation
    Unreliable(
        monkeypatch, manager._engine.job.persistent, "record_activation", PersistentStoreError("bucket gone")
    )
    with pytest.raises(PersistentStoreError, match="bucket gone"):
        manager.restore(None)
    assert save_all(manager, mesh, range(5, 9)) == [5, 6, 8]
    assert manager.generation == before + 1
    assert opened().restore_or_init(dict).step == 8


def test_a_save_whose_outcome_was_never_learnt_keeps_no_slot_beyond_the_next_restore(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(OPTIONS, multiprocessing_options=MultiprocessingOptions(1))
    manager = opened(options=options)
    save_all(manager, mesh, range(4, 5))
    agreement = manager._engine._workers.pipeline._agreement
    Unreliable(monkeypatch, agreement, "await_outcome", PeerFailedError("service away"), times=99)
    manager.save(5, make_state(mesh, 5))
    with pytest.raises(PeerFailedError, match="service away"):
        manager.wait_until_finished()
    manager.restore(4)
    slots = manager._engine.job.local._held.table.slots
    assert not any(slot.pins for slot in slots)
    assert save_all(manager, mesh, range(5, 9)) == [5, 6, 8]
    local = manager._engine.job.local
    taken = [local.begin(StepId(manager.generation, n), timedelta(0))[0] for n in range(20, 26)]
    assert len([slot for slot in taken if slot]) == local.slot_count - 1
