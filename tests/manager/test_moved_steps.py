"""Step directories under another name, or of another run: a name alone is not believed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from jax.sharding import Mesh

from emergency_ckpt import CheckpointManager
from emergency_ckpt.errors import CorruptDataError, NoRestorableStepError
from tests.manager.states import OPTIONS, assert_same, make_state, save_all

Opened = Callable[[], CheckpointManager]


@pytest.fixture(scope="module")
def intact(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A persistent directory with steps 5 and 10, of one life."""
    bucket = tmp_path_factory.mktemp("intact") / "bucket"
    with CheckpointManager(None, bucket, mesh, make_state(mesh, 0), options=OPTIONS) as manager:
        save_all(manager, mesh, range(5, 11))
    return bucket


@pytest.fixture(scope="module")
def other(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of another run, with step 20 of its third life; its states are those of steps + 100."""
    bucket = tmp_path_factory.mktemp("other") / "bucket"
    for _ in range(2):
        with CheckpointManager(None, bucket, mesh, make_state(mesh, 0), options=OPTIONS):
            pass
    with CheckpointManager(None, bucket, mesh, make_state(mesh, 0), options=OPTIONS) as manager:
        manager.save(20, make_state(mesh, 120))
        manager.wait_until_finished()
        manager.check_for_errors()
    assert list((bucket / "20").glob("emergency_ckpt.3.*.json"))
    return bucket


@pytest.fixture
def bucket(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "bucket"))


@pytest.fixture
def opened(bucket: Path, mesh: Mesh) -> Opened:
    return lambda: CheckpointManager(None, bucket, mesh, make_state(mesh, 0), options=OPTIONS)


def test_a_renamed_step_is_not_taken_for_the_one_that_its_directory_says(
    bucket: Path, opened: Opened, mesh: Mesh
) -> None:
    (bucket / "10").rename(bucket / "99")
    with opened() as manager:
        for call in (manager.metadata, manager.metrics):
            with pytest.raises(CorruptDataError, match=r"holds step 10 .*its directory says 99"):
                call(99)
        restored = manager.restore_or_init(dict)
        assert restored.step == 5
        assert_same(restored.state, make_state(mesh, 5))
        assert manager.last_restore is not None
        assert "99 holds step 10 (generation 1), its directory says 99: it was renamed or copied" in (
            manager.last_restore.reason
        )


def test_a_copied_step_is_not_taken_for_another_one(bucket: Path, opened: Opened, mesh: Mesh) -> None:
    shutil.copytree(bucket / "5", bucket / "7")
    with opened() as manager:
        with pytest.raises(NoRestorableStepError, match=r"holds step 5 .*its directory says 7"):
            manager.restore(7)
        assert_same(manager.restore(10)["state"], make_state(mesh, 10))
        assert_same(manager.restore(5)["state"], make_state(mesh, 5))


def test_swapped_steps_are_refused_and_come_back_under_their_own_names(
    bucket: Path, opened: Opened, mesh: Mesh
) -> None:
    def swap() -> None:
        (bucket / "5").rename(bucket / "aside")
        (bucket / "10").rename(bucket / "5")
        (bucket / "aside").rename(bucket / "10")

    swap()
    with opened() as manager:
        for step in (5, 10):
            with pytest.raises(NoRestorableStepError, match="it was renamed or copied"):
                manager.restore(step)
    swap()
    with opened() as manager:
        assert_same(manager.restore(10)["state"], make_state(mesh, 10))


def test_a_step_of_another_run_is_older_than_all_of_this_run_and_is_pointed_out(
    bucket: Path, other: Path, opened: Opened, mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(other / "20", bucket / "20")
    with caplog.at_level(logging.WARNING), opened() as manager:
        assert sum("is a step of the run" in message for message in caplog.messages) == 1
        assert sorted(manager.all_steps()) == [5, 10, 20]
        assert manager.latest_step() == 10
        restored = manager.restore_or_init(dict)
        assert restored.step == 10
        assert_same(restored.state, make_state(mesh, 10))
    with opened() as manager, caplog.at_level(logging.WARNING):
        assert_same(manager.restore(20)["state"], make_state(mesh, 120))
        assert manager.last_restore is not None
        assert manager.last_restore.generation == 0
        assert f"{bucket}/20 is a step of another run" in caplog.text


def test_a_step_of_another_run_under_another_number_is_restored_for_nobody(
    bucket: Path, other: Path, opened: Opened
) -> None:
    shutil.copytree(other / "20", bucket / "15")
    with opened() as manager:
        assert manager.restore_or_init(dict).step == 10
        with pytest.raises(NoRestorableStepError, match=r"holds step 20 .*its directory says 15"):
            manager.restore(15)


@pytest.mark.parametrize("lost", [["run_id"], ["generations"], ["run_id", "activations"]])
def test_steps_stay_those_of_the_run_when_one_kind_of_record_is_lost(
    bucket: Path, opened: Opened, mesh: Mesh, lost: list[str]
) -> None:
    for name in lost:
        path = bucket / "emergency_ckpt" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    with opened() as manager:
        assert_same(manager.restore(None)["state"], make_state(mesh, 10))
        assert manager.last_restore is not None
        assert manager.last_restore.generation == 1
