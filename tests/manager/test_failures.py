"""What fails beside the manager: stores, ramdisks, coordination, and what a user does after that."""

from __future__ import annotations

import dataclasses
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from emergency_ckpt import (
    CheckpointManager,
    LocalCheckpointOptions,
    MultiprocessingOptions,
    PersistentCheckpointOptions,
)
from emergency_ckpt.agent import draining
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import (
    EmergencyCheckpointError,
    LocalDirectoryError,
    NoRestorableStepError,
    PeerFailedError,
    PersistentStoreError,
    UnsupportedStateError,
)
from emergency_ckpt.persistent.reader import BoxRequest, StepReader
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.persistent.writer import write_part
from emergency_ckpt.runtime import hydrate, restore_attempt
from tests.manager.states import OPTIONS, Opener, Unreliable, assert_same, make_state, save_all


def test_a_store_that_fails_for_a_moment_costs_no_step(
    opened: Opener, mesh: Mesh, ramdisk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(), mesh, range(1, 7))
    for manifest in ramdisk.rglob("*.manifest"):
        manifest.unlink()
    manager = opened()
    Unreliable(monkeypatch, StepReader, "read_boxes", PersistentStoreError("time-out"))
    assert manager.restore_or_init(dict).step == 5


def test_a_store_that_fails_for_good_is_an_error_and_voids_nothing(
    opened: Opener, mesh: Mesh, ramdisk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(), mesh, range(1, 7))
    for manifest in ramdisk.rglob("*.manifest"):
        manifest.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(restore_attempt, "_READ_PAUSES_SECONDS", (0.0,))
        Unreliable(patch, StepReader, "read_boxes", PersistentStoreError("time-out"), times=99)
        manager = opened()
        with pytest.raises(PersistentStoreError, match="time-out"):
            manager.restore_or_init(dict)
    assert opened().restore_or_init(dict).step == 5


def test_finish_saves_a_restored_step_that_is_not_persistent_yet(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    save_all(opened(), mesh, range(1, 5))
    manager = opened()
    state = manager.restore_or_init(dict).state
    manager.finish(4, state)
    assert (tmp_path / "bucket/4/default").is_dir()
    manager.finish(4, state)
    assert opened().restore_or_init(dict).step == 4


def test_a_step_whose_save_failed_may_be_saved_again(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    manager = opened()
    with pytest.raises(UnsupportedStateError, match="must be JSON"):
        manager.save(4, make_state(mesh, 4), metrics={"loss": jnp.float32(1)})
    assert manager.save(4, make_state(mesh, 4), metrics={"loss": 1.0})
    manager.finish(4, make_state(mesh, 4))
    assert (tmp_path / "bucket/4/default").is_dir()


def test_finish_drains_again_what_failed_to_drain(
    opened: Opener, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    Unreliable(monkeypatch, draining, "write_part", PersistentStoreError("disk full"))
    manager.save(5, make_state(mesh, 5))
    manager.finish(5, make_state(mesh, 5))
    assert (tmp_path / "bucket/5/default").is_dir()
    with pytest.raises(PersistentStoreError, match="disk full"):
        manager.check_for_errors()


def test_what_a_failed_drain_has_written_does_not_stay(
    opened: Opener, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()

    def written_in_vain(*args: Any, **kwargs: Any) -> None:
        write_part(*args, **kwargs)
        raise PersistentStoreError("disk full")

    monkeypatch.setattr(draining, "write_part", written_in_vain)
    manager.save(5, make_state(mesh, 5))
    with pytest.raises(PersistentStoreError, match="disk full"):
        manager.wait_until_finished()
    assert [path.name for path in (tmp_path / "bucket").iterdir()] == ["emergency_ckpt"]
    monkeypatch.setattr(draining, "write_part", write_part)
    manager.wait_until_finished()  # Whoever waits need not wait for the next try.
    assert (tmp_path / "bucket/5/default").is_dir()


def test_finish_raises_when_the_last_step_is_not_persistent(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    Unreliable(monkeypatch, draining, "write_part", PersistentStoreError("disk full"), times=99)
    with pytest.raises(PersistentStoreError, match=r"last step 5 did not reach the persistent tier.*disk full"):
        manager.finish(5, make_state(mesh, 5))


def test_a_closed_manager_refuses_to_save(opened: Opener, mesh: Mesh) -> None:
    manager = opened()
    manager.close()
    with pytest.raises(EmergencyCheckpointError, match="was closed"):
        manager.save(2, make_state(mesh, 2))
    with pytest.raises(EmergencyCheckpointError, match="was closed"):
        manager.restore(None)


def test_after_the_newest_step_is_deleted_the_next_newest_is_kept(opened: Opener, mesh: Mesh) -> None:
    local = LocalCheckpointOptions(save_interval_steps=2, max_to_keep=2)
    options = dataclasses.replace(OPTIONS, local=local, persistent=PersistentCheckpointOptions(1000))
    manager = opened(options=options)
    save_all(manager, mesh, range(2, 9))
    manager.delete(8)
    assert manager.latest_step() == 6
    for step in (StepId(manager.generation, n) for n in range(20, 26)):
        manager._engine.job.local.begin(step, timedelta(0))
    manager._engine.job.local.close()
    assert opened(options=options).restore_or_init(dict).step == 6


def test_a_failed_restore_in_the_middle_of_a_run_leaves_a_working_manager(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 5))
    Unreliable(
        monkeypatch, manager._engine.job.persistent, "mint_generation", PersistentStoreError("bucket gone")
    )
    with pytest.raises(PersistentStoreError, match="bucket gone"):
        manager.restore(2)
    assert save_all(manager, mesh, range(5, 9)) == [5, 6, 8]
    assert manager.latest_complete_step() == 8


def test_an_error_of_the_coordination_stops_one_save_and_not_those_after_it(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened(options=dataclasses.replace(OPTIONS, multiprocessing_options=MultiprocessingOptions(1)))
    manager.save(2, make_state(mesh, 2))
    manager.wait_until_finished()
    agreement = manager._engine._workers.pipeline._agreement
    Unreliable(monkeypatch, agreement, "report_sealed", PeerFailedError("service away"))
    manager.save(4, make_state(mesh, 4))
    with pytest.raises(PeerFailedError, match="service away"):
        manager.wait_until_finished()
    save_all(manager, mesh, range(6, 9))
    assert manager.latest_complete_step() == 8


def test_leftovers_that_cannot_be_removed_do_not_keep_the_job_from_starting(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    Unreliable(monkeypatch, PersistentStore, "leftovers", PersistentStoreError("device busy"))
    assert opened().restore_or_init(lambda: "fresh").state == "fresh"


def test_a_run_that_lost_everything_is_not_silently_begun_from_scratch(
    opened: Opener, mesh: Mesh, ramdisk: Path
) -> None:
    options = dataclasses.replace(OPTIONS, persistent=PersistentCheckpointOptions(1000))
    manager = opened(options=options)
    save_all(manager, mesh, range(2, 7))
    manager.close()
    for path in ramdisk.rglob("slot_*.data"):
        path.write_bytes(bytes(path.stat().st_size))
    for step in Path(manager._settings.persistent_directory).glob("[0-9]*"):
        shutil.rmtree(step)
    with pytest.raises(NoRestorableStepError, match=r"was complete once.*use another run_name"):
        opened(options=options).restore_or_init(dict)


def test_a_first_save_that_was_cut_off_begins_from_scratch(opened: Opener, mesh: Mesh, ramdisk: Path) -> None:
    manager = opened()
    manager.save(1, make_state(mesh, 1))
    manager.close()
    for path in ramdisk.rglob("slot_*.data"):
        path.write_bytes(bytes(path.stat().st_size))
    for step in Path(manager._settings.persistent_directory).glob("[0-9]*"):
        shutil.rmtree(step)
    assert opened().restore_or_init(lambda: "fresh").state == "fresh"


def test_a_step_that_orbax_wrote_anew_is_not_taken_from_the_ramdisk(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    for value in (1.0, 2.0):
        state = {"w": jnp.full((4,), value)}
        with ocp.CheckpointManager(tmp_path / "bucket", item_names=("state",)) as plain:
            if 10 in plain.all_steps():
                plain.delete(10)
            plain.save(10, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
        with CheckpointManager(ramdisk, tmp_path / "bucket", mesh, state, options=OPTIONS) as manager:
            assert manager.restore(10)["state"]["w"][0] == value


def test_after_a_failed_restore_training_from_scratch_is_saved(
    opened: Opener, mesh: Mesh, ramdisk: Path
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 7))
    manager.close()
    for path in ramdisk.rglob("slot_*.data"):
        path.write_bytes(bytes(path.stat().st_size))
    for path in Path(manager._settings.persistent_directory).glob("*/default/**/d/*"):
        path.write_bytes(bytes(path.stat().st_size))
    manager = opened()
    with pytest.raises(NoRestorableStepError):
        manager.restore_or_init(dict)
    assert manager.latest_step() is None
    assert save_all(manager, mesh, range(1, 5)) == [1, 2, 4]


def test_latest_step_names_only_what_can_be_restored(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(), mesh, range(1, 5))
    manager = opened()
    manager.restore(None)
    Unreliable(monkeypatch, manager._engine.job.local, "seal", OSError("no space left"))
    manager.save(6, make_state(mesh, 6))
    with pytest.raises(LocalDirectoryError, match="no space left"):
        manager.wait_until_finished()
    assert manager.latest_step() == 4


def test_failing_retention_does_not_undo_a_commit(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    Unreliable(monkeypatch, manager._engine.job.persistent, "steps", PersistentStoreError("listing failed"))
    manager.save(5, make_state(mesh, 5))
    with pytest.raises(PersistentStoreError, match="after the commit of step 5"):
        manager.wait_until_finished()
    assert manager.metrics_snapshot()["drains_committed"] == 1


def test_metadata_is_kept_as_it_was_at_the_call(opened: Opener, mesh: Mesh) -> None:
    manager = opened()
    told = {"nested": [1]}
    manager.save(2, make_state(mesh, 2), custom_metadata=told)
    told["nested"].append(2)
    manager.wait_until_finished()
    assert manager.metadata(2).custom_metadata == {"nested": [1]}


def test_a_read_that_goes_on_after_it_failed_writes_into_no_later_save(
    opened: Opener, mesh: Mesh, ramdisk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(), mesh, range(1, 6))
    for manifest in ramdisk.rglob("*.manifest"):
        manifest.unlink()
    manager = opened()
    late: list[BoxRequest] = []

    def without_answer(_: StepReader, requests: list[BoxRequest], *args: Any) -> None:
        late.extend(requests)
        raise PersistentStoreError("no answer")

    monkeypatch.setattr(restore_attempt, "_READ_PAUSES_SECONDS", ())
    with monkeypatch.context() as patched:
        patched.setattr(StepReader, "read_boxes", without_answer)
        with pytest.raises(PersistentStoreError, match="no answer"):
            manager.restore(5)
    for step in (6, 8, 12):  # In every slot.
        assert manager.save(step, make_state(mesh, step))
        manager.wait_until_finished()
        for request in late:
            request.out.reshape(-1).view(np.uint8)[:] ^= 0xFF
        manager = opened()
        restored = manager.restore_or_init(dict)
        assert (restored.step, restored.source) == (step, "own slot")
        assert_same(restored.state, make_state(mesh, step))


def test_a_store_that_fails_while_extras_are_read_leaks_no_slot(
    opened: Opener, mesh: Mesh, ramdisk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(), mesh, range(1, 7))
    for manifest in ramdisk.rglob("*.manifest"):
        manifest.unlink()
    manager = opened()
    monkeypatch.setattr(restore_attempt, "_READ_PAUSES_SECONDS", (0.0, 0.0, 0.0))
    Unreliable(monkeypatch, StepReader, "values", PersistentStoreError("time-out"), times=3)
    assert manager.restore_or_init(dict).step == 5
    assert save_all(manager, mesh, range(6, 13)) == [6, 8, 10, 12]
    assert manager.latest_complete_step() == 12


def test_a_newer_checkpoint_of_another_program_is_never_deleted(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    state = {"params": make_state(mesh, 3).params}
    saved = ocp.args.Composite(state=ocp.args.StandardSave(state))
    with CheckpointManager(ramdisk, tmp_path / "bucket", mesh, state, options=OPTIONS) as manager:
        manager.save(10, state)
    with CheckpointManager(ramdisk, tmp_path / "bucket", mesh, state, options=OPTIONS) as manager:
        manager.restore(10)
    with ocp.CheckpointManager(tmp_path / "bucket", item_names=("state",)) as plain:
        plain.save(25, args=saved)
    with CheckpointManager(ramdisk, tmp_path / "bucket", mesh, state, options=OPTIONS) as manager:
        assert manager.restore_or_init(dict).step == 10
        manager.save(20, state)
        manager.finish(20, state)
        assert 25 in manager.all_steps()
    assert (tmp_path / "bucket/25").is_dir()


def test_a_second_try_after_a_failed_restore_does_not_begin_from_scratch(
    opened: Opener, mesh: Mesh, ramdisk: Path
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 7))
    manager.close()
    for path in [
        *ramdisk.rglob("slot_*.data"),
        *Path(manager._settings.persistent_directory).glob("*/default/**/d/*"),
    ]:
        path.write_bytes(bytes(path.stat().st_size))
    manager = opened()
    for _ in range(2):
        with pytest.raises(NoRestorableStepError):
            manager.restore_or_init(dict)


def test_a_ramdisk_that_fails_after_a_restore_does_not_fail_the_restore(
    opened: Opener, mesh: Mesh, ramdisk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(), mesh, range(1, 7))
    for manifest in ramdisk.rglob("*.manifest"):
        manifest.unlink()
    manager = opened()
    Unreliable(monkeypatch, hydrate.Hydrated, "settle", OSError("no space left"))
    assert manager.restore_or_init(dict).step == 5


def test_a_deleted_step_may_be_saved_and_drained_again(
    opened: Opener, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    Unreliable(monkeypatch, draining, "write_part", PersistentStoreError("disk full"))
    manager.save(10, make_state(mesh, 10))
    manager.delete(10)
    with pytest.raises(PersistentStoreError, match="disk full"):
        manager.wait_until_finished()
    assert manager.save(10, make_state(mesh, 10))
    manager.wait_until_finished()
    manager.check_for_errors()
    assert (tmp_path / "bucket/10/default").is_dir()


def test_a_failing_persistent_store_makes_noise_and_the_local_tier_goes_on(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 5))
    blocked = tmp_path / "bucket"
    blocked.rename(tmp_path / "elsewhere")
    blocked.write_text("not a directory")
    for step in range(5, 9):
        manager.save(step, make_state(mesh, step))
    with pytest.raises(Exception, match="step 5"):
        manager.wait_until_finished()
    assert manager.latest_complete_step() == 8
    assert manager.metrics_snapshot()["drains_failed"] in (1, 2), "by itself, and for whoever waits"
    blocked.unlink()
    (tmp_path / "elsewhere").rename(blocked)
