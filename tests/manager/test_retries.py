"""What a user sees of a drain that failed and is tried again: what ends and holds the tries, what is told."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import Mesh
from orbax import checkpoint as ocp

from emergency_ckpt import CheckpointManager
from emergency_ckpt.agent import draining
from emergency_ckpt.core.retrying import Pauses
from emergency_ckpt.errors import CoordinationTimeoutError, PeerFailedError, PersistentStoreError
from emergency_ckpt.runtime.decisions import ToldDecisions
from emergency_ckpt.runtime.workers import Workers
from tests.manager.states import Opener, Unreliable, assert_same, make_state, save_all


@contextlib.contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as failing:
        Unreliable(failing, draining, "write_part", PersistentStoreError("disk full"), times=999)
        yield


def fail(manager: CheckpointManager, mesh: Mesh, step: int) -> None:
    manager.save(step, make_state(mesh, step))
    with pytest.raises(PersistentStoreError, match=rf"step {step} .* disk full\. It is tried again"):
        manager.wait_until_finished()


def committed(tmp_path: Path) -> list[int]:
    return sorted(int(path.name) for path in (tmp_path / "bucket").iterdir() if path.name.isdigit())


@pytest.fixture
def manager(opened: Opener) -> CheckpointManager:
    """One whose pauses are longer than any test."""
    manager = opened()
    worker = manager._engine._workers.drain
    assert worker is not None
    schedule = worker._schedule
    schedule._job = dataclasses.replace(schedule._job, pauses=Pauses(6e4))
    return manager


def test_a_failure_is_told_once_and_that_it_is_made_good_is_in_the_metrics(
    manager: CheckpointManager, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full_disk(monkeypatch):
        fail(manager, mesh, 5)
        manager.check_for_errors()
        counted = manager.metrics_snapshot()
        assert counted["drains_failed"] >= 1
        assert counted["drains_committed"] == 0
    manager.wait_until_finished()
    counted = manager.metrics_snapshot()
    assert (counted["drains_committed"], counted["last_committed_step"]) == (1, 5)
    assert committed(tmp_path) == [5]


def test_calls_that_all_make_hold_the_next_try_and_do_not_end_it(
    manager: CheckpointManager, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(manager, mesh, range(2, 5))
    with full_disk(monkeypatch):
        fail(manager, mesh, 5)
        manager.reload()
        part = {"step": make_state(mesh, 0).step}
        how = {"step": ocp.ArrayRestoreArgs(sharding=part["step"].sharding)}
        wanted = ocp.args.PyTreeRestore(part, how, partial_restore=True)
        restored = manager.restore(None, ocp.args.Composite(state=wanted))
        assert int(jax.device_get(restored.state["step"])) == 5
        manager.delete(4)
        manager.check_for_errors()  # It was told, and nobody asked for it anew.
        assert manager.latest_step() == 5
    assert committed(tmp_path) == [2]
    manager.wait_until_finished()
    assert committed(tmp_path) == [2, 5]


def test_a_step_that_is_deleted_is_not_tried_again(
    manager: CheckpointManager, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full_disk(monkeypatch):
        fail(manager, mesh, 5)
        manager.delete(5)
    manager.wait_until_finished()
    assert committed(tmp_path) == []
    assert manager.metrics_snapshot()["drains_superseded"] == 1
    assert manager.save(5, make_state(mesh, 5))
    manager.wait_until_finished()
    assert committed(tmp_path) == [5]


def test_the_last_step_is_not_there_because_it_was_before_it_was_deleted(
    manager: CheckpointManager, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(manager, mesh, range(2, 6))
    manager.delete(5)
    with full_disk(monkeypatch), pytest.raises(PersistentStoreError, match="disk full"):
        manager.finish(5, make_state(mesh, 5))
    assert committed(tmp_path) == [2]
    manager.finish(5, make_state(mesh, 5))
    assert committed(tmp_path) == [2, 5]


def test_a_restore_ends_the_tries_and_the_next_step_that_is_due_is_drained(
    manager: CheckpointManager, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full_disk(monkeypatch):
        fail(manager, mesh, 5)
        assert_same(manager.restore(None).state, make_state(mesh, 5))
        assert manager.latest_step() == 5
    manager.wait_until_finished()
    assert committed(tmp_path) == []
    save_all(manager, mesh, range(6, 11))
    assert committed(tmp_path) == [6, 10], "the persistent tier has none yet, so that the first one is due"


def test_keys_of_before_that_cannot_be_deleted_put_process_0_out_of_step_with_nobody(
    manager: CheckpointManager, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = manager._engine
    save_all(manager, mesh, range(2, 6))
    Unreliable(monkeypatch, ToldDecisions, "forget_generation", PeerFailedError("lost"))
    assert_same(manager.restore(None).state, make_state(mesh, 5))
    assert manager.generation == 2
    for _ in range(2):
        assert engine.persistent_numbers() == [2, 5]
    Unreliable(monkeypatch, type(engine.job.coordinator), "delete", PeerFailedError("lost"))
    assert engine.persistent_numbers() == [2, 5]


def test_who_waits_in_vain_is_told_what_is_being_drained(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    worker = manager._engine._workers.drain
    assert worker is not None
    worker.hold(timedelta(seconds=10))
    manager.save(5, make_state(mesh, 5))
    settings = dataclasses.replace(manager._engine.job.settings, drain_timeout=timedelta(seconds=-29.9))
    with monkeypatch.context() as hasty:
        hasty.setattr(manager._engine._workers, "_settings", settings)
        with pytest.raises(CoordinationTimeoutError, match=r"after 0 s: step 5 \(generation 1\) waits"):
            manager.wait_until_finished()
    worker.release()


def test_who_closes_without_having_waited_to_the_end_says_no_goodbye_to_the_agent(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager: Any = opened()
    save_all(manager, mesh, range(2, 6))
    peers, said = manager._engine.job.peers, []
    with monkeypatch.context() as failing:
        Unreliable(failing, Workers, "wait", CoordinationTimeoutError("drains were still running"))
        failing.setattr(peers, "close", lambda *, is_done, limit: said.append(is_done))
        with pytest.raises(CoordinationTimeoutError):
            manager.close()
    assert said == [False]


def test_closing_in_an_outage_ends_after_one_more_try(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: Any = opened()
    with full_disk(monkeypatch):
        fail(first, mesh, 5)
        before = first.metrics_snapshot()["drains_failed"]
        with pytest.raises(PersistentStoreError, match=r"step 5 .* disk full"):
            first.close()
        assert first.metrics_snapshot()["drains_failed"] == before + 1
    assert opened().restore_or_init(dict).step == 5
