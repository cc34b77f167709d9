"""A job whose processes share records among them, restored by more and by fewer processes than saved it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from emergency_ckpt import CheckpointManager, GlobalExtras, ReshardedExtras
from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from emergency_ckpt.errors import EmergencyCheckpointError
from tests.integration.training_job import check_state, make_config, make_mesh, make_state

RECORDS = 24


class Kept:
    """Something with a state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def get_state(self) -> Any:
        return self.state

    def set_state(self, state: Any) -> None:
        self.state = state


def records_of(process: int, count: int, step: int) -> dict[str, Any]:
    return {"step": step, "records": list(range(process, RECORDS, count))}


def reshard(states: list[Any], process: int, count: int) -> Any:
    records = sorted(record for state in states for record in state["records"])
    (step,) = {state["step"] for state in states}
    return {"step": step, "records": records[process::count]}


def fail(states: list[Any], process: int, count: int) -> Any:
    if process == count - 1:
        raise LookupError("no such record")
    return states[0]


def save_all(root: str, slices: int) -> None:
    """Saves steps 2 to 14 on ramdisks, and step 10 persistently."""
    mesh, process, count = make_mesh(slices), jax.process_index(), jax.process_count()
    with CheckpointManager.from_config(make_config(root, {}), mesh, make_state(mesh, 0)) as manager:
        for step in (2, 10, 12, 14):
            extras = {
                "data": Kept(records_of(process, count, step)),
                "schedule": GlobalExtras(Kept(f"schedule of {step}")),
                "mine": process,
            }
            manager.save(step, make_state(mesh, step), extras=extras)
            manager.wait_until_finished()


def restore_all(
    trained: str, root: str, slices: int, stories: dict[str, list[dict[str, Any]]]
) -> dict[str, list[Any]]:
    """What each life of each story gets; a story begins with a copy of what was trained."""
    told: dict[str, list[Any]] = {}
    for name, lives in stories.items():
        place, process = Path(root) / name, jax.process_index()
        mine = Path(trained) / f"ramdisk_{process}"
        if mine.exists():
            # The agent stays with its own directory.
            shutil.copytree(mine, place / mine.name, ignore=shutil.ignore_patterns("agent.*"))
        if process == 0:
            shutil.copytree(Path(trained) / "bucket", place / "bucket")
        multihost_utils.sync_global_devices(name)
        told[name] = []
        for number, life in enumerate(lives):
            if process in life.get("wipe", ()) and (ramdisk := place / f"ramdisk_{process}").exists():
                remove_tree(ramdisk)
            multihost_utils.sync_global_devices(f"{name} {number}")
            told[name].append(_restore(str(place), slices, life["how"]))
    return told


def _restore(root: str, slices: int, how: str) -> Any:
    mesh = make_mesh(slices)
    data, schedule = Kept(), Kept()
    ways: dict[str, dict[str, Any]] = {
        "declared": {"data": ReshardedExtras(data, reshard), "schedule": GlobalExtras(schedule)},
        "global": {"schedule": schedule},
        "plain": {"data": data},
        "failing": {"data": ReshardedExtras(data, fail)},
        "nothing": {},
    }
    try:
        with CheckpointManager.from_config(make_config(root, {}), mesh, make_state(mesh, 0)) as manager:
            restored = manager.restore_or_init(lambda: make_state(mesh, 0), extras=ways[how])
    except EmergencyCheckpointError as error:
        return f"{type(error).__name__}: {error}"
    assert restored.step is not None
    check_state(restored.state, mesh, restored.step)
    return {
        "step": restored.step,
        "data": data.state,
        "schedule": schedule.state,
        "extras": dict(restored.extras),
    }
