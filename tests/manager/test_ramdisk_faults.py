"""What a user sees when the ramdisk fails, when a bucket was wiped, when the clock jumps."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from jax.sharding import Mesh

from emergency_ckpt import CheckpointManager, LocalCheckpointOptions, PersistentCheckpointOptions
from emergency_ckpt.agent import draining
from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from emergency_ckpt.errors import EmergencyCheckpointError, LocalDirectoryError, PersistentStoreError
from tests.manager.states import OPTIONS, Opener, Unreliable, assert_same, make_state, save_all

LOCAL_ONLY = dataclasses.replace(
    OPTIONS,
    local=LocalCheckpointOptions(save_interval_steps=1, max_to_keep=1),
    persistent=PersistentCheckpointOptions(1000),
)
_NOBODY = 65534


@contextlib.contextmanager
def unwritable(directory: Path) -> Iterator[None]:
    """Nothing can be made or removed in `directory`, not even by a test that root runs."""
    root = os.geteuid() == 0
    if root:
        for path in (directory.parents[1], directory.parent, directory, *directory.iterdir()):
            os.chown(path, _NOBODY, _NOBODY)
        os.seteuid(_NOBODY)
    directory.chmod(0o500)
    try:
        yield
    finally:
        directory.chmod(0o700)
        if root:
            os.seteuid(0)


def test_a_directory_that_becomes_unwritable_costs_saves_and_nothing_else(
    opened: Opener, mesh: Mesh, ramdisk: Path
) -> None:
    manager = opened(options=LOCAL_ONLY)
    assert save_all(manager, mesh, range(1, 5)) == [1, 2, 3, 4]
    states = {step: make_state(mesh, step) for step in range(5, 8)}
    with unwritable(ramdisk / "emergency_ckpt/0"):
        for step in (5, 6):
            assert not manager.save(step, states[step])
            with pytest.raises(LocalDirectoryError, match=r"cannot remove the manifest .*Permission denied"):
                manager.wait_until_finished()
        assert manager.latest_complete_step() == 4
        manager.check_for_errors()
    assert manager.save(7, states[7])
    manager.wait_until_finished()
    manager.check_for_errors()
    assert opened(options=LOCAL_ONLY).restore_or_init(dict).step == 7


def test_the_directory_is_emptied_and_the_job_goes_on(opened: Opener, mesh: Mesh, ramdisk: Path) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 7))
    remove_tree(ramdisk / "emergency_ckpt")
    assert save_all(manager, mesh, range(7, 9)) == [8]
    restored = opened().restore_or_init(dict)
    assert (restored.step, restored.source) == (8, "own slot")
    assert_same(restored.state, make_state(mesh, 8))


def test_after_the_directory_was_emptied_an_earlier_step_comes_from_the_persistent_tier(
    opened: Opener, mesh: Mesh, ramdisk: Path
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 9))
    remove_tree(ramdisk / "emergency_ckpt")
    manager.reload()
    assert manager.latest_step() == 5
    assert_same(manager.restore(None)["state"], make_state(mesh, 5))
    assert save_all(manager, mesh, range(6, 9)) == [6, 8]


def test_a_wiped_bucket_under_the_same_run_name_is_pointed_out(
    opened: Opener, mesh: Mesh, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_all(opened(), mesh, range(1, 9))
    shutil.rmtree(tmp_path / "bucket")
    caplog.clear()
    manager = opened()
    assert "its persistent directory may have been emptied or replaced" in caplog.text
    assert manager.restore_or_init(lambda: make_state(mesh, 0)).step is None
    assert save_all(manager, mesh, range(1, 9)) == [1, 2, 4, 5, 6, 8]


def test_a_clock_that_jumps_back_and_forth_changes_nothing(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, real_ns = time.time, time.time_ns
    year = 365 * 24 * 3600
    for life, jump in enumerate((0, -20 * year, +20 * year, -30 * year)):
        monkeypatch.setattr(time, "time", lambda by=jump: real() + by)
        monkeypatch.setattr(time, "time_ns", lambda by=jump: real_ns() + by * 10**9)
        manager = opened()
        restored = manager.restore_or_init(lambda: make_state(mesh, 0))
        assert restored.step == (6 * life or None)
        assert 6 * life + 6 in save_all(manager, mesh, range(6 * life + 1, 6 * life + 7))
        assert manager.latest_step() == 6 * life + 6


def test_a_directory_that_is_a_file_or_not_writable_at_start_says_so(
    opened: Opener, mesh: Mesh, ramdisk: Path
) -> None:
    (ramdisk / "emergency_ckpt").write_text("in the way")
    with pytest.raises(EmergencyCheckpointError, match=f"cannot write below .*{ramdisk}"):
        opened()
    (ramdisk / "emergency_ckpt").unlink()
    assert save_all(opened(), mesh, range(1, 3))


def spoil(manager: CheckpointManager, step: int) -> None:
    """Flips one bit of one shard of a step on the ramdisk."""
    local = manager._engine.job.local
    slot = next(local.sealed(held) for held in local.sealed_steps(False) if held.step == step)
    assert slot is not None
    entry = next(e for e in slot.layout.slot_entries(0) if slot.layout.shards[e.shard].leaf == "params.w")
    slot.data[entry.offset] ^= 4


def test_damage_found_while_the_job_runs_costs_its_step_and_no_older_one(opened: Opener, mesh: Mesh) -> None:
    local = LocalCheckpointOptions(save_interval_steps=1, max_to_keep=2)
    manager = opened(options=dataclasses.replace(LOCAL_ONLY, local=local))
    save_all(manager, mesh, range(1, 6))
    spoil(manager, 5)
    manager.reload()
    assert manager.latest_step() == 4
    assert [step.step for step in manager._engine.job.local.complete_steps()][-2:] == [3, 4]
    assert save_all(manager, mesh, range(6, 8)) == [6, 7]
    assert manager.restore_or_init(dict).step == 7


def test_a_slot_that_lacks_shards_gets_these_from_elsewhere_and_is_whole_again(
    opened: Opener, mesh: Mesh, ramdisk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 6))
    spoil(manager, 5)
    manager = opened()
    restored = manager.restore_or_init(dict)
    assert (restored.step, restored.source) == (5, "own slot, persistent")
    assert_same(restored.state, make_state(mesh, 5))
    assert "shards of step 5 (generation 1) in slot " in caplog.text
    assert manager.last_restore is not None
    assert manager.last_restore.reason == "step 5: process 0 reads 1 shard from the persistent tier"
    assert [source.shards for source in manager.last_restore.sources][1:] == [1]
    (holding,) = [h for h in manager._engine.job.local.verify() if h.step.step == 5]
    assert holding.missing == ()
    restored = opened().restore_or_init(dict)
    assert (restored.step, restored.source) == (5, "own slot")


def test_a_slot_that_lacks_a_shard_which_is_to_be_drained_fails_its_drain_by_name(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    Unreliable(monkeypatch, draining, "write_part", PersistentStoreError("disk full"))
    manager.save(5, make_state(mesh, 5))
    with pytest.raises(PersistentStoreError, match="disk full"):
        manager.wait_until_finished()
    spoil(manager, 5)
    assert [len(h.missing) for h in manager._engine.job.local.verify()] == [1]
    with pytest.raises(PersistentStoreError, match=r"shard params\.w\[.*\] of step 5 .* is missing in slot"):
        manager.finish(5, make_state(mesh, 5))
    assert save_all(manager, mesh, range(6, 11)) == [6, 8, 10]


def test_a_step_that_was_lost_cannot_be_drained_again_and_later_ones_are_drained(
    opened: Opener, mesh: Mesh, ramdisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    with monkeypatch.context() as failing:
        Unreliable(failing, draining, "write_part", PersistentStoreError("disk full"), times=99)
        with pytest.raises(PersistentStoreError, match="disk full"):
            manager.finish(5, make_state(mesh, 5))  # Nothing waits for its next try afterwards.
    remove_tree(ramdisk / "emergency_ckpt")
    assert manager._engine.job.local.verify() == ()
    with pytest.raises(PersistentStoreError, match=r"step 5 .* is not on this ramdisk any more"):
        manager.finish(5, make_state(mesh, 5))
    assert save_all(manager, mesh, range(6, 11)) == [6, 8, 10]
    assert (tmp_path / "bucket/10/default").is_dir()


def test_a_step_that_waits_for_its_next_try_is_drained_although_its_files_are_gone(
    opened: Opener, mesh: Mesh, ramdisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    with monkeypatch.context() as failing:
        Unreliable(failing, draining, "write_part", PersistentStoreError("disk full"), times=99)
        manager.save(5, make_state(mesh, 5))
        with pytest.raises(PersistentStoreError, match="disk full"):
            manager.wait_until_finished()
    remove_tree(ramdisk / "emergency_ckpt")
    assert manager._engine.job.local.verify() == ()
    manager.wait_until_finished()
    manager.close()
    remove_tree(ramdisk / "emergency_ckpt")
    assert_same(opened().restore(None).state, make_state(mesh, 5))


def test_a_process_that_cannot_read_its_step_takes_part_in_its_drain_and_says_so(
    opened: Opener, mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    """Else the others would wait for it: the attempt fails on all of them."""
    manager = opened(options=LOCAL_ONLY)
    assert save_all(manager, mesh, range(1, 3)) == [1, 2]
    newer = CheckpointManager(ramdisk, tmp_path / "elsewhere", mesh, make_state(mesh, 0), options=LOCAL_ONLY)
    manager._engine.drain_complete(2, timedelta(seconds=20))
    with pytest.raises(EmergencyCheckpointError, match="not on this ramdisk any more"):
        manager.wait_until_finished()
    newer.close()
