"""Errors in the background: told once, to whoever waits, asks or closes, and to no train loop that does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from emergency_ckpt import CheckpointManager, Config, LocalCheckpointOptions
from emergency_ckpt.agent import draining
from emergency_ckpt.errors import PersistentStoreError
from tests.manager.states import OPTIONS, Opener, Unreliable, flags, make_state, save_all

EVERY_STEP = dataclasses.replace(OPTIONS, local=LocalCheckpointOptions(save_interval_steps=1))


def fail_once(manager: CheckpointManager, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 5 does not reach the persistent tier, and nobody has been told yet."""
    Unreliable(monkeypatch, draining, "write_part", PersistentStoreError("disk full"))
    for step in range(5, 8):
        assert manager.save(step, make_state(mesh, step)), "training goes on"


@pytest.mark.parametrize(
    "ask",
    [
        CheckpointManager.wait_until_finished,
        CheckpointManager.close,
        lambda manager: (manager._engine.wait(), manager.check_for_errors()),
    ],
    ids=["wait", "close", "check"],
)
def test_the_first_to_ask_is_told_and_nobody_else(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, ask: Callable[[CheckpointManager], Any]
) -> None:
    manager = opened(options=EVERY_STEP)
    save_all(manager, mesh, range(1, 5))
    fail_once(manager, mesh, monkeypatch)
    with pytest.raises(PersistentStoreError, match=r"step 5 .* did not reach the persistent tier: disk full"):
        ask(manager)
    assert manager.latest_complete_step() == 7, "everything was waited for before"
    manager.wait_until_finished()
    manager.check_for_errors()
    manager.close()
    assert opened().restore_or_init(dict).step == 7


def test_several_errors_are_told_together(opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = opened()
    Unreliable(monkeypatch, draining, "write_part", PersistentStoreError("disk full"), times=2)
    for step in (5, 10):
        manager.save(step, make_state(mesh, step))
    with pytest.raises(PersistentStoreError, match="step 5 ") as caught:
        manager.wait_until_finished()
    assert [note.partition(" (")[0] for note in caught.value.__notes__] == ["and: step 10"]


def test_a_closed_manager_has_released_everything_whatever_it_raises(
    opened: Opener, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened(persistent_non_replicated_directory=tmp_path / "datasets")
    Unreliable(monkeypatch, ocp.CheckpointManager, "close", OSError("datasets cannot be closed"))
    fail_once_at = Unreliable(monkeypatch, draining, "write_part", PersistentStoreError("disk full"))
    manager.save(5, make_state(mesh, 5))
    with pytest.raises(OSError, match="datasets cannot be closed") as caught:
        manager.close()
    assert fail_once_at.left == 0
    assert any("disk full" in note for note in caught.value.__notes__)
    assert not manager._engine.job.local.usable
    assert opened().restore_or_init(dict).step == 5


def test_an_error_of_the_program_is_not_replaced_by_one_of_its_manager(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(ramdisk, tmp_path / "bucket", mesh, make_state(mesh, 0), options=EVERY_STEP)

    def train() -> None:
        with manager:
            fail_once(manager, mesh, monkeypatch)
            raise KeyboardInterrupt("by the user")

    with pytest.raises(KeyboardInterrupt, match="by the user") as caught:
        train()
    (note,) = caught.value.__notes__
    assert note.startswith("and, when the checkpoint manager was closed: step 5 ")


def test_a_block_that_ends_well_tells_of_errors(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train() -> None:
        with opened(options=EVERY_STEP) as manager:
            fail_once(manager, mesh, monkeypatch)

    with pytest.raises(PersistentStoreError, match="step 5 "):
        train()


def test_finish_tells_of_its_own_step_only(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Config = flags(ramdisk, tmp_path, save_checkpoint_on_completion=False)
    manager = CheckpointManager.from_config(config, mesh, make_state(mesh, 0))
    Unreliable(monkeypatch, draining, "write_part", PersistentStoreError("disk full"))
    manager.save(1, make_state(mesh, 1))
    manager.finish(2, make_state(mesh, 2))
    with pytest.raises(PersistentStoreError, match="step 1 "):
        manager.close()
    manager = CheckpointManager.from_config(flags(ramdisk, tmp_path), mesh, make_state(mesh, 0))
    Unreliable(monkeypatch, draining, "write_part", PersistentStoreError("disk full"), times=9)
    with pytest.raises(PersistentStoreError, match=r"last step 2 did not reach .*disk full"):
        manager.finish(2, make_state(mesh, 2))
    manager.close()
