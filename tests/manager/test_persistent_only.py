"""Without the local tier the same manager is a complete persistent-only one, on slots in anonymous memory."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from emergency_ckpt import CheckpointManager, Config
from emergency_ckpt.agent import draining
from emergency_ckpt.errors import (
    CorruptDataError,
    NoRestorableStepError,
    PersistentStoreError,
)
from tests.manager.states import Unreliable, assert_same, make_state, save_all

NOTE = ocp.args.Composite(state=ocp.args.PyTreeRestore({"note": ""}, partial_restore=True))


def config(tmp_path: Path, **changes: Any) -> Config:
    return Config(
        **{
            "run_name": "run",
            "base_output_directory": str(tmp_path),
            "enable_checkpointing": True,
            "enable_emergency_checkpoint": False,
            "checkpoint_period": 2,
            "max_num_checkpoints_to_keep": 3,
            **changes,
        }
    )


def root(tmp_path: Path) -> Path:
    return tmp_path / "run/checkpoints"


@pytest.fixture(params=["two slices", "one slice", "one device"])
def shape(request: pytest.FixtureRequest) -> Mesh:
    devices = np.array(jax.devices())
    shapes = {"two slices": (2, 4), "one slice": (1, 8), "one device": (1, 1)}[request.param]
    return Mesh(devices[: np.prod(shapes)].reshape(shapes), ("replica", "fsdp"))


def test_it_saves_keeps_and_restores(shape: Mesh, tmp_path: Path) -> None:
    with CheckpointManager.from_config(config(tmp_path), shape, make_state(shape, 0)) as manager:
        assert manager.latest_step() is None
        assert manager.restore_or_init(lambda: "fresh").state == "fresh"
        assert save_all(manager, shape, range(1, 11)) == [1, 2, 4, 6, 8, 10]
        assert list(manager.all_steps()) == [6, 8, 10]
        assert (manager.latest_step(), manager.latest_complete_step()) == (10, 10)
        # A step of this life, restored in its middle; what came later is void with the next save.
        assert_same(manager.restore(8)["state"], make_state(shape, 8))
        assert list(manager.all_steps()) == [6, 8, 10]
        assert manager.save(10, make_state(shape, 10))
        assert list(manager.all_steps()) in ([6, 8], [6, 8, 10]), "the new 10 may be committed already"
        assert save_all(manager, shape, range(11, 13)) == [12]
    with CheckpointManager.from_config(config(tmp_path), shape, make_state(shape, 0)) as manager:
        assert manager.latest_step() == 12
        restored = manager.restore_or_init(lambda: pytest.fail("there is a step to restore"))
        assert (restored.step, restored.source) == (12, "persistent")
        assert_same(restored.state, make_state(shape, 12))
        assert_same(manager.restore(8)["state"], make_state(shape, 8))
        with pytest.raises(
            NoRestorableStepError, match=r"Step 5 cannot be restored.*newest restorable step is 12"
        ):
            manager.restore(5)


def test_it_saves_on_demand_with_extras_and_metadata_and_deletes(mesh: Mesh, tmp_path: Path) -> None:
    with CheckpointManager.from_config(config(tmp_path), mesh, make_state(mesh, 0)) as manager:
        state = make_state(mesh, 3)
        assert manager.save(
            3, state, force=True, extras={"at": 30}, metrics={"loss": 0.5}, custom_metadata={"by": "hand"}
        )
        manager.wait_until_finished()
        manager.check_for_errors()
        assert not manager.save(5, state), "no period"
        assert manager.save(6, state)
        manager.wait_until_finished()
    with CheckpointManager.from_config(config(tmp_path), mesh, make_state(mesh, 0)) as manager:
        assert manager.metrics(3) == {"loss": 0.5}
        assert manager.metadata(3).custom_metadata == {"by": "hand"}
        assert manager.metrics(6) is None
        manager.delete(6)
        assert list(manager.all_steps()) == [3]
        assert dict(manager.restore_or_init(dict).extras) == {"at": 30}
        with pytest.raises(NoRestorableStepError, match="step 6 is on no tier"):
            manager.delete(6)
    assert not (root(tmp_path) / "6").exists()


def test_a_synchronous_save_raises_what_its_commit_met_and_may_be_repeated(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = config(tmp_path, async_checkpointing=False)
    with CheckpointManager.from_config(flags, mesh, make_state(mesh, 0)) as manager:
        Unreliable(monkeypatch, draining, "write_part", PersistentStoreError("disk full"))
        with pytest.raises(PersistentStoreError, match=r"step 2 .* disk full"):
            manager.save(2, make_state(mesh, 2))
        manager.check_for_errors()
        assert manager.save(2, make_state(mesh, 2))
        assert (root(tmp_path) / "2/default").is_dir()


def test_a_synchronous_save_is_committed_and_finish_commits_the_last_step(mesh: Mesh, tmp_path: Path) -> None:
    flags = config(tmp_path, async_checkpointing=False)
    with CheckpointManager.from_config(flags, mesh, make_state(mesh, 0)) as manager:
        assert manager.save(2, make_state(mesh, 2))
        assert (root(tmp_path) / "2/default").is_dir(), "when the call returns"
        assert (manager.latest_complete_step(), manager.latest_step()) == (2, 2)
        manager.finish(3, make_state(mesh, 3))
        assert (root(tmp_path) / "3/default").is_dir()
    with CheckpointManager.from_config(flags, mesh, make_state(mesh, 0)) as manager:
        assert_same(manager.restore(None)["state"], make_state(mesh, 3))


def test_saves_at_every_step_keep_up_with_the_drain_or_are_skipped_and_said(mesh: Mesh, tmp_path: Path) -> None:
    flags = config(tmp_path, checkpoint_period=1, max_num_checkpoints_to_keep=None)
    with CheckpointManager.from_config(flags, mesh, make_state(mesh, 0)) as manager:
        saved = [step for step in range(1, 21) if manager.save(step, make_state(mesh, step))]
        manager.wait_until_finished()
        manager.check_for_errors()
        assert list(manager.all_steps()) == saved
        counters = manager.metrics_snapshot()
        assert counters["saves_complete"] == counters["drains_committed"] == len(saved)
        assert counters["saves_skipped"] == 20 - len(saved)
        for step in saved[::5]:
            assert manager.restore(step, NOTE)["state"] == {"note": f"step {step}"}


def test_a_commit_that_failed_is_said_and_the_next_one_is_made(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = config(tmp_path, checkpoint_drain_retry_seconds=6000)
    with CheckpointManager.from_config(slow, mesh, make_state(mesh, 0)) as manager:
        with monkeypatch.context() as failing:
            Unreliable(failing, draining, "write_part", PersistentStoreError("disk full"), times=99)
            manager.save(2, make_state(mesh, 2))
            with pytest.raises(PersistentStoreError, match="disk full"):
                manager.wait_until_finished()
            assert list(manager.all_steps()) == []
            assert manager.latest_step() is None, "its slot is no place to restore from"
        save_all(manager, mesh, range(3, 5))
        assert list(manager.all_steps()) == [4]


def test_a_second_manager_on_the_directory_takes_the_run_over(mesh: Mesh, tmp_path: Path) -> None:
    first = CheckpointManager.from_config(config(tmp_path), mesh, make_state(mesh, 0))
    save_all(first, mesh, range(1, 5))
    with CheckpointManager.from_config(config(tmp_path), mesh, make_state(mesh, 0)) as second:
        assert second.restore_or_init(dict).step == 4
        first.save(6, make_state(mesh, 6))
        first.wait_until_finished()
        assert first.metrics_snapshot()["drains_superseded"] == 1
        assert first.restore(4, NOTE)["state"] == {"note": "step 4"}
        assert list(second.all_steps()) == [1, 2, 4]
        assert save_all(second, mesh, range(5, 9)) == [6, 8]
        assert list(second.all_steps()) == [4, 6, 8]
        first.close()
        assert save_all(second, mesh, range(9, 11)) == [10]


def latest_of_orbax(directory: Path) -> int | None:
    """What plain Orbax finds; it raises where a step goes while it makes its list, and is asked again."""
    options = ocp.CheckpointManagerOptions(read_only=True)
    gone = (FileNotFoundError, NotADirectoryError)  # The latter where it goes between two looks at one path.
    for _ in range(20):
        with contextlib.suppress(*gone), ocp.CheckpointManager(directory, options=options) as plain:
            return plain.latest_step()
    raise AssertionError("steps go at every look")


def test_others_read_the_directory_while_it_is_written(mesh: Mesh, tmp_path: Path) -> None:
    """Plain Orbax and another run's manager see committed steps only, each of them whole or gone."""
    flags = config(tmp_path, checkpoint_period=1, max_num_checkpoints_to_keep=2)
    state = {"w": make_state(mesh, 0).params["w"]}
    seen: set[int] = set()
    with CheckpointManager.from_config(flags, mesh, state) as writer:
        for step in range(1, 25):
            writer.save(step, {"w": make_state(mesh, step).params["w"]})
            if step % 3:
                continue
            found = latest_of_orbax(root(tmp_path))
            if found is None:
                continue
            reading = config(
                tmp_path, run_name=f"other{step}", load_full_state_path=str(root(tmp_path) / f"{found}")
            )
            with CheckpointManager.from_config(reading, mesh, state) as reader:
                try:
                    loaded = reader.restore_or_init(dict).state
                except (CorruptDataError, PersistentStoreError):
                    assert not (root(tmp_path) / f"{found}").exists(), "retention deleted it meanwhile"
                    continue
            assert_same(loaded, {"w": make_state(mesh, found).params["w"]})
            seen.add(found)
        writer.wait_until_finished()
        writer.check_for_errors()
    assert seen
