"""Steps that were deleted on purpose are not missed at the next start; steps that were lost are."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from jax.sharding import Mesh

from emergency_ckpt import LocalCheckpointOptions, PersistentCheckpointOptions
from emergency_ckpt.errors import NoRestorableStepError
from tests.manager.states import OPTIONS, Opener, make_state, save_all

LOCAL_ONLY = dataclasses.replace(
    OPTIONS,
    local=LocalCheckpointOptions(save_interval_steps=2, max_to_keep=2),
    persistent=PersistentCheckpointOptions(1000),
)


def lose_data(ramdisk: Path, bucket: Path) -> None:
    """The manifests stay, with what they promise; no slot verifies any more, and no step is in the bucket."""
    for path in bucket.glob("[0-9]*"):
        shutil.rmtree(path)
    for path in ramdisk.rglob("slot_*.data"):
        path.write_bytes(b"\xff" * path.stat().st_size)


def test_a_run_whose_steps_were_all_deleted_starts_again(opened: Opener, mesh: Mesh, ramdisk: Path) -> None:
    save_all(opened(options=LOCAL_ONLY), mesh, range(2, 7))
    manager = opened(options=LOCAL_ONLY)
    manager.restore(4)
    save_all(manager, mesh, range(8, 9))  # 6 is void now; its manifest still promises step 4.
    for step in manager.all_steps():
        manager.delete(step)
    assert manager.restore_or_init(lambda: make_state(mesh, 0)).step is None, "in the same manager"
    assert list(ramdisk.rglob("slot_*.manifest")), "a manifest that promises something is left"
    manager = opened(options=LOCAL_ONLY)
    assert manager.restore_or_init(lambda: make_state(mesh, 0)).step is None
    assert save_all(manager, mesh, range(1, 5)) == [1, 2, 4]
    assert opened(options=LOCAL_ONLY).restore_or_init(lambda: make_state(mesh, 0)).step == 4


def test_what_a_deletion_left_is_missed_when_it_is_lost(
    opened: Opener, mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    manager = opened(options=LOCAL_ONLY)
    save_all(manager, mesh, range(4, 7))
    manager.delete(6)
    manager.close()
    lose_data(ramdisk, tmp_path / "bucket")
    with pytest.raises(NoRestorableStepError, match=r"step 4 \(generation 1\) was complete once"):
        opened(options=LOCAL_ONLY).restore_or_init(lambda: make_state(mesh, 0))


def test_a_step_that_was_saved_again_after_its_deletion_is_missed_when_it_is_lost(
    opened: Opener, mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    manager = opened(options=LOCAL_ONLY)
    save_all(manager, mesh, range(8, 9))
    manager.delete(8)
    save_all(manager, mesh, range(8, 9))
    save_all(manager, mesh, range(10, 11))
    manager.close()
    lose_data(ramdisk, tmp_path / "bucket")
    with pytest.raises(NoRestorableStepError, match=r"step 8 \(generation 1\) was complete once"):
        opened(options=LOCAL_ONLY).restore_or_init(lambda: make_state(mesh, 0))


def test_a_damaged_record_of_deletions_errs_on_the_safe_side(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    save_all(opened(options=LOCAL_ONLY), mesh, range(2, 7))
    manager = opened(options=LOCAL_ONLY)
    manager.restore(4)
    save_all(manager, mesh, range(8, 9))
    for step in manager.all_steps():
        manager.delete(step)
    record = tmp_path / "bucket/emergency_ckpt/deletion.json"
    record.write_bytes(record.read_bytes()[:-3])
    with pytest.raises(NoRestorableStepError, match="was complete once"):
        opened(options=LOCAL_ONLY).restore_or_init(lambda: make_state(mesh, 0))


def lose_everything(ramdisk: Path, bucket: Path) -> None:
    """Of the run nothing is left but its records in the persistent root."""
    for place in (ramdisk, bucket):
        for path in place.iterdir():
            if path != bucket / "emergency_ckpt":
                shutil.rmtree(path)


def test_a_run_that_went_on_once_is_not_begun_from_scratch_when_only_its_records_are_left(
    opened: Opener, mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    save_all(opened(), mesh, range(1, 13))
    manager = opened()
    assert manager.restore_or_init(lambda: make_state(mesh, 0)).step == 12
    manager.close()
    lose_everything(ramdisk, tmp_path / "bucket")
    for _ in range(2):
        manager = opened()
        with pytest.raises(NoRestorableStepError, match=r"step 12 \(generation 1\) was complete once"):
            manager.restore_or_init(lambda: make_state(mesh, 0))
    manager.close()
    shutil.rmtree(tmp_path / "bucket")
    assert opened().restore_or_init(lambda: make_state(mesh, 0)).step is None, "as the error says"


def test_a_step_that_was_restored_by_its_number_is_missed_as_well(
    opened: Opener, mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    save_all(opened(), mesh, range(1, 13))
    manager = opened()
    manager.restore(5)
    manager.save(6, make_state(mesh, 6))  # The run goes on from step 5.
    manager.close()
    lose_everything(ramdisk, tmp_path / "bucket")
    with pytest.raises(NoRestorableStepError, match=r"step 5 .* was complete once"):
        opened().restore_or_init(lambda: make_state(mesh, 0))


def test_a_life_that_ended_before_its_restore_keeps_the_promise(
    opened: Opener, mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    save_all(opened(), mesh, range(1, 13))
    opened().close()
    lose_everything(ramdisk, tmp_path / "bucket")
    with pytest.raises(NoRestorableStepError, match=r"step 12 \(generation 1\) was complete once"):
        opened().restore_or_init(lambda: make_state(mesh, 0))


def test_deletions_on_purpose_settle_what_the_records_say(
    opened: Opener, mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    save_all(opened(), mesh, range(1, 13))
    manager = opened()
    manager.restore(10)
    save_all(manager, mesh, range(11, 17))
    manager = opened()
    for step in manager.all_steps():
        manager.delete(step)
    manager.close()
    lose_everything(ramdisk, tmp_path / "bucket")
    for _ in range(2):
        assert opened().restore_or_init(lambda: make_state(mesh, 0)).step is None
