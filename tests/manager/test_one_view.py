"""What can be restored, what is the newest, what is listed and what may be deleted are one and the same."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_manager as orbax_manager

from emergency_ckpt import (
    CheckpointManager,
    LocalCheckpointOptions,
    PersistentCheckpointOptions,
    StepAlreadyExistsError,
)
from emergency_ckpt.agent import draining
from emergency_ckpt.errors import EmergencyCheckpointError, PersistentStoreError
from emergency_ckpt.persistent.store import PersistentStore
from tests.manager.states import OPTIONS, Opener, Unreliable, assert_same, make_state, save_all


def seen(manager: CheckpointManager) -> tuple[int | None, list[int]]:
    return manager.latest_step(), list(manager.all_steps())


def test_a_step_whose_drain_failed_is_listed_where_it_is_the_newest_and_may_be_deleted(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 5))
    Unreliable(monkeypatch, draining, "write_part", PersistentStoreError("disk full"), times=99)
    manager.save(5, make_state(mesh, 5))
    with pytest.raises(PersistentStoreError, match="disk full"):
        save_all(manager, mesh, range(0))
    assert seen(manager) == (5, [1, 2, 4, 5])
    manager.reload()
    assert seen(manager) == (5, [1, 2, 4, 5])
    assert manager.metadata(5).commit_timestamp_nsecs is None
    assert_same(manager.restore(None).state, make_state(mesh, 5))
    assert seen(manager) == (5, [1, 2, 4, 5])
    manager.delete(5)
    assert seen(manager) == (4, [1, 2, 4])


def test_a_step_that_is_being_drained_is_listed_where_it_is_the_newest(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, commit = threading.Event(), PersistentStore.commit

    def commit_later(store: PersistentStore, attempt: Any, *written: Any) -> Any:
        assert may_end.wait(60)
        return commit(store, attempt, *written)

    manager = opened()
    save_all(manager, mesh, range(1, 5))
    monkeypatch.setattr(PersistentStore, "commit", commit_later)
    manager.save(5, make_state(mesh, 5))
    manager._engine._workers.wait_for_saves()
    assert seen(manager) == (5, [1, 2, 4, 5])
    may_end.set()
    manager.wait_until_finished()
    assert seen(manager) == (5, [1, 2, 4, 5])


@pytest.mark.parametrize("local", [True, False])
def test_a_persistent_step_that_somebody_removed_is_the_newest_only_while_a_slot_has_it(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, local: bool
) -> None:
    options = dataclasses.replace(
        OPTIONS,
        local=LocalCheckpointOptions(save_interval_steps=0),
        persistent=PersistentCheckpointOptions(save_interval_steps=1),
    )
    where = ramdisk if local else None
    state = make_state(mesh, 0)
    with CheckpointManager(where, tmp_path / "bucket", mesh, state, options=options) as manager:
        save_all(manager, mesh, range(1, 4))
        shutil.rmtree(tmp_path / "bucket/3")
        manager.reload()
        assert seen(manager) == ((3, [1, 2, 3]) if local else (2, [1, 2]))
        restored = manager.restore(None)
        assert_same(restored.state, make_state(mesh, 3 if local else 2))


def test_a_forced_save_of_a_step_that_is_there_is_orbaxs_error_and_of_any_other_old_step_none(
    opened: Opener, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    with monkeypatch.context() as failing:
        Unreliable(failing, draining, "write_part", PersistentStoreError("disk full"), times=99)
        assert manager.save(3, make_state(mesh, 3), force=True)
        assert manager.save(3, make_state(mesh, 3), force=True), "its drain has failed"
    with pytest.raises(PersistentStoreError, match="disk full"):
        manager.wait_until_finished()
    assert (tmp_path / "bucket/3/default").is_dir()
    assert manager.save(4, make_state(mesh, 4))
    assert manager.save(4, make_state(mesh, 4), force=True), "it is on the ramdisks only"
    for kind in (StepAlreadyExistsError, orbax_manager.StepAlreadyExistsError, EmergencyCheckpointError):
        for step in (3, 4):
            with pytest.raises(kind, match=f"step {step} is saved already"):
                manager.save(step, make_state(mesh, step), force=True)
    assert not manager.save(4, make_state(mesh, 4))
    assert not manager.save(2, make_state(mesh, 2), force=True), "no step is saved before a newer one"
    manager.finish(4, make_state(mesh, 4))
    assert manager.save(5, make_state(mesh, 5), force=True)
    manager.wait_until_finished()
    assert seen(manager) == (5, [3, 4, 5])
    manager.delete(5)
    assert manager.save(5, make_state(mesh, 5), force=True)


def test_without_a_persistent_tier_a_step_on_the_ramdisk_is_there(opened: Opener, mesh: Mesh) -> None:
    options = dataclasses.replace(OPTIONS, persistent=PersistentCheckpointOptions(save_interval_steps=0))
    manager = opened(options=options)
    assert manager.save(3, make_state(mesh, 3), force=True)
    with pytest.raises(StepAlreadyExistsError):
        manager.save(3, make_state(mesh, 3), force=True)
