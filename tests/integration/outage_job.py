"""A job that trains on while its store fails in one way after the other, as the test tells it by files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from emergency_ckpt import CheckpointManager
from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from emergency_ckpt.errors import EmergencyCheckpointError
from tests.integration.training_job import check_state, make_config, make_mesh, make_state

FLAGS = {
    "local_checkpoint_period": 1,
    "checkpoint_period": 3,
    "max_num_checkpoints_to_keep": 2,
    "local_checkpoint_slot_wait_seconds": 5,
    "checkpoint_drain_retry_seconds": 2,
    "checkpoint_storage_stall_seconds": 0.5,
    "checkpoint_agent_idle_seconds": 5,
    "enable_autocheckpoint": True,
}
_STEP_SECONDS = 0.05
_MORE_STEPS = 2


class _Training:
    def __init__(self, root: str, manager: CheckpointManager, mesh: jax.sharding.Mesh) -> None:
        self.root, self.manager, self._mesh = Path(root), manager, mesh
        self.step, self.told = 0, list[str]()

    def until(self, done: Any) -> None:
        """Trains until it is so on all processes."""
        while True:
            self.step += 1
            time.sleep(_STEP_SECONDS)
            self.manager.save(self.step, make_state(self._mesh, self.step))
            try:
                self.manager.check_for_errors()
            except EmergencyCheckpointError as error:
                self.told.append(f"{type(error).__name__}: {error}")
            if multihost_utils.process_allgather(np.int32(bool(done()))).all():
                return

    def hears_of(self, file: str) -> None:
        self.until((self.root / file).exists)

    def committed(self) -> float:
        return self.manager.metrics_snapshot().get("last_committed_step", -1)


def _live_through(training: _Training, story: str) -> dict[str, Any]:
    training.hears_of(f"{story}.begins")
    training.told = []
    training.until(lambda: training.told)
    before = training.step
    training.until(lambda: training.step > before + _MORE_STEPS)
    complete = training.manager.latest_complete_step()
    print(f"{story} was told", flush=True)
    training.hears_of(f"{story}.ends")
    since = training.step
    training.until(lambda: training.committed() >= since)
    return {"told": training.told, "complete": complete is not None and complete >= before}


def go_on_through(root: str, url: str, stories: list[str]) -> dict[str, Any]:
    """For each story: the store fails, is told of, steps are complete all the same; it comes back."""
    mesh, process = make_mesh(2), jax.process_index()
    config = make_config(root, {"base_output_directory": url, **FLAGS})
    manager = CheckpointManager.from_config(config, mesh, make_state(mesh, 0))
    manager.restore_or_init(lambda: make_state(mesh, 0))
    training = _Training(root, manager, mesh)
    training.until(lambda: training.committed() > 0)
    found: dict[str, Any] = {}
    for story in stories:
        print(f"ready for {story}", flush=True)
        found[story] = _live_through(training, story)
    manager.wait_until_finished()
    left = _leave(training)
    counters = manager.metrics_snapshot()
    config = make_config(root, {"base_output_directory": url, **FLAGS})
    multihost_utils.sync_global_devices("closed")
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as second:
        _check_restored(second, mesh, training.step)
        newest = training.step + 1
        second.finish(newest, make_state(mesh, newest))
    multihost_utils.sync_global_devices("finished")
    remove_tree(Path(root) / f"ramdisk_{process}")
    config = make_config(root, {"base_output_directory": url, **FLAGS})
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as third:
        _check_restored(third, mesh, newest)
        steps = list(third.all_steps())
    return {
        "stories": found,
        "left": left,
        "newest": newest,
        "skipped": counters["saves_skipped"],
        "steps": steps,
    }


def _leave(training: _Training) -> dict[str, Any]:
    """The store answers nothing any more, slots are pinned for it, and a signal ends the job."""
    print("ready for the end", flush=True)
    training.told = []
    training.hears_of("end.begins")
    training.until(lambda: training.told)
    print("the end was told", flush=True)
    training.until(lambda: training.manager.reached_preemption(training.step))
    closed = ""
    try:
        training.manager.close()
    except EmergencyCheckpointError as error:
        closed = type(error).__name__
    complete = training.manager.metrics_snapshot()["last_complete_step"]
    print("closed in the outage", flush=True)
    while not (training.root / "end.ends").exists():
        time.sleep(0.05)
    return {"complete": complete == training.step, "closed": closed}


def _check_restored(manager: CheckpointManager, mesh: jax.sharding.Mesh, step: int) -> None:
    restored = manager.restore_or_init(lambda: make_state(mesh, 0))
    assert restored.step == step, f"step {restored.step} was restored, {step} was the last one"
    check_state(restored.state, mesh, step)
