"""A job of one process that never joined `jax.distributed` hears of notices as well."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jax.sharding import Mesh

from emergency_ckpt import CheckpointManager, Config
from emergency_ckpt.agent import draining
from emergency_ckpt.errors import LocalDirectoryError, NoRestorableStepError, StorePermissionError
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.runtime import leaving
from tests.manager.states import Unreliable, make_state


def make_config(tmp_path: Path, ramdisk: Path, **flags: Any) -> Config:
    """Of a job of one process without an agent, which is to hear of notices."""
    return Config(
        run_name="job",
        base_output_directory=str(tmp_path / "bucket"),
        enable_checkpointing=True,
        enable_emergency_checkpoint=True,
        local_checkpoint_directory=str(ramdisk),
        checkpoint_agent="off",
        enable_autocheckpoint=True,
        **flags,
    )


def test_without_agents_a_process_watches_by_itself_and_reacts_at_one_step(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    notice = tmp_path / "notice"
    config = make_config(
        tmp_path,
        ramdisk,
        local_checkpoint_period=1000,
        checkpoint_period=1000,
        preemption_sources="gce-preempted,aws",
        preemption_notice_file=str(notice),
    )
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        assert manager.save(1, make_state(mesh, 1)), "the first step"
        assert not manager.reached_preemption(1)
        notice.write_text('{"kind": "migrate"}')
        wait_for(manager, 1)
        assert not manager.save(2, make_state(mesh, 2)), "a host that is only moved"
        notice.write_text('{"seconds": 30, "detail": "drained by an operator"}')
        wait_for(manager, 2)
        assert manager.save(3, make_state(mesh, 3))
        assert manager.reached_preemption(3)
        assert not manager.reached_preemption(4), "once for one notice"
        manager.wait_until_finished()
        assert {1, 3} >= set(manager.all_steps()) >= {3}
        heard = manager.notices[1]
        assert (heard.source, heard.kind, heard.detail) == ("file", "terminate", "drained by an operator")
        assert heard.deadline is not None


def test_the_step_of_a_notice_finds_a_slot_although_steps_that_wait_for_a_drain_that_hangs_have_all(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notice, may_end, commit = tmp_path / "notice", threading.Event(), draining.commit

    def commit_later(*args: Any) -> Any:
        assert may_end.wait(60)
        return commit(*args)

    monkeypatch.setattr(draining, "commit", commit_later)
    config = make_config(
        tmp_path,
        ramdisk,
        local_checkpoint_period=1,
        local_checkpoint_slot_wait_seconds=0.01,
        checkpoint_period=1,
        preemption_notice_file=str(notice),
    )
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        slots = manager._engine.job.local.slot_count
        for step in range(1, slots + 1):
            assert manager.save(step, make_state(mesh, step))
            manager._engine._workers.wait_for_saves()
        assert manager._engine.job.local._held.table.unsettled() == slots, "all are pinned"
        notice.write_text('{"seconds": 30}')
        wait_for(manager, 1)
        assert manager.save(slots + 1, make_state(mesh, slots + 1))
        assert manager.reached_preemption(slots + 1)
        manager._engine._workers.wait_for_saves()
        assert manager.latest_complete_step() == slots + 1
        may_end.set()
    assert (tmp_path / f"bucket/job/checkpoints/{slots + 1}/default").is_dir()


def end_by_delete(manager: CheckpointManager, *roots: Path) -> None:
    manager.delete(100)


def end_by_reload(manager: CheckpointManager, *roots: Path) -> None:
    damage(*roots)
    manager.reload()


def end_by_restore(manager: CheckpointManager, *roots: Path) -> None:
    damage(*roots)
    with pytest.raises(NoRestorableStepError):
        manager.restore(None)


def damage(*roots: Path) -> None:
    """Of all steps, under a running job; the files stay the same ones."""
    for path in (path for root in roots for path in root.rglob("*")):
        if path.is_file() and ("slot" in path.name or path.parent.name == "d"):
            with open(path, "r+b") as file:
                file.seek(path.stat().st_size // 2)
                file.write(b"\xff" * 40)


@pytest.mark.parametrize("end", [end_by_delete, end_by_reload, end_by_restore])
def test_a_job_that_begins_anew_as_its_steps_are_gone_reacts_at_its_next_step(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, end: Callable[..., None]
) -> None:
    config = make_config(tmp_path, ramdisk, local_checkpoint_period=1000, checkpoint_period=1000)
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        assert manager.save(100, make_state(mesh, 100))
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        end(manager, ramdisk, tmp_path)
        manager._notices.hear(Notice("file", "terminate", time.time(), time.time() + 60))
        assert manager.reached_preemption(1)
        assert not manager.reached_preemption(2)


class HangingStore:
    """No commit goes on before `goes_on`; `ended` is set when one has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.goes_on, self.ended = threading.Event(), threading.Event(), threading.Event()
        commit = draining.commit

        def commit_later(*args: Any) -> Any:
            self.begun.set()
            try:
                assert self.goes_on.wait(60)
                return commit(*args)
            finally:
                self.ended.set()

        monkeypatch.setattr(draining, "commit", commit_later)

    def let_go(self) -> None:
        self.goes_on.set()
        for thread in threading.enumerate():
            if thread.name == "emergency_ckpt drain":
                thread.join(60)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_where_the_store_hangs_the_job_leaves_in_time_also_with_synchronous_saves(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    store = HangingStore(monkeypatch)
    config = make_config(
        tmp_path,
        ramdisk,
        local_checkpoint_period=1000,
        checkpoint_period=1000,
        async_checkpointing=asynchronous,
    )
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        manager._notices.hear(Notice("file", "terminate", time.time(), time.time() + 4))
        assert manager.save(1, make_state(mesh, 1))
        assert manager.should_exit
    assert store.begun.is_set()
    assert not store.ended.is_set()
    store.let_go()


def test_a_notice_that_comes_while_the_manager_is_closed_limits_what_that_waits_for(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HangingStore(monkeypatch)
    config = make_config(
        tmp_path, ramdisk, local_checkpoint_period=1000, checkpoint_period=1000, preemption_grace_seconds=3.0
    )
    before = signal.getsignal(signal.SIGTERM)
    heard_by: list[Any] = []

    def send_signal() -> None:
        assert store.begun.wait(60)
        while not manager._engine._closed:
            time.sleep(0.02)
        heard_by.append(signal.getsignal(signal.SIGTERM))
        if heard_by[0] is not before:
            os.kill(os.getpid(), signal.SIGTERM)

    manager = CheckpointManager.from_config(config, mesh, make_state(mesh, 0))
    assert manager.save(1, make_state(mesh, 1))
    sender = threading.Thread(target=send_signal)
    sender.start()
    manager.close()
    sender.join(60)
    assert heard_by[0] is not before, "it is a notice as long as something is waited for"
    assert signal.getsignal(signal.SIGTERM) is before
    assert [notice.source for notice in manager.notices] == ["signal"]
    assert not store.ended.is_set()
    store.let_go()


def wait_for(manager: CheckpointManager, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(manager.notices) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_that_is_alone_hears_signals_itself(mesh: Mesh, ramdisk: Path, tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        ramdisk,
        local_checkpoint_period=1000,
        checkpoint_period=1000,
        preemption_signals="SIGTERM,SIGUSR1",
        preemption_grace_seconds=120.0,
    )
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        assert manager.save(1, make_state(mesh, 1)), "the first step"
        signal.raise_signal(signal.SIGUSR1)
        wait_for(manager, 1)
        assert manager.save(2, make_state(mesh, 2))
        assert manager.reached_preemption(2)
        assert not manager.reached_preemption(3)
        signal.raise_signal(signal.SIGTERM)
        wait_for(manager, 2)
        assert manager.save(4, make_state(mesh, 4))
        assert manager.reached_preemption(4)
        save, terminate = manager.notices
        assert [(notice.source, notice.kind) for notice in (save, terminate)] == [
            ("signal", "save"),
            ("signal", "terminate"),
        ]
        assert terminate.deadline == terminate.received + 120.0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before

    # A manager that cannot start leaves nothing behind either.
    failing = config.model_copy(update={"local_checkpoint_directory": str(tmp_path / "none")})
    with pytest.raises(LocalDirectoryError):
        CheckpointManager.from_config(failing, mesh, make_state(mesh, 0))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("emergency_ckpt")]


def test_a_store_that_refuses_at_once_is_not_asked_without_a_pause_while_the_job_leaves(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Unreliable(monkeypatch, draining, "write_part", StorePermissionError("no"), times=10**9)
    config = make_config(tmp_path, ramdisk, local_checkpoint_period=1, checkpoint_period=1)
    manager = CheckpointManager.from_config(config, mesh, make_state(mesh, 0))
    manager._notices.hear(Notice("file", "terminate", time.time(), time.time() + 6))
    assert manager.save(1, make_state(mesh, 1))
    assert manager.should_exit
    assert 1 <= manager.metrics_snapshot()["drains_failed"] <= 10
    with pytest.raises(StorePermissionError):
        manager.close()


def test_a_decision_that_failed_is_made_when_the_step_is_saved_again(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, ramdisk, local_checkpoint_period=1000, checkpoint_period=1000)
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        manager._notices.hear(Notice("file", "terminate", time.time(), time.time() + 60))
        Unreliable(monkeypatch, leaving, "decide", ArithmeticError("no"))
        with pytest.raises(ArithmeticError):
            manager.save(1, make_state(mesh, 1))
        assert manager.save(1, make_state(mesh, 1))
        assert manager.should_exit
