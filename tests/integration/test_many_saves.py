"""Hundreds of saves leave nothing behind that grows: no keys, no threads, no objects of ours, nothing else."""

from __future__ import annotations

import collections
import gc
import threading
import time
from pathlib import Path
from typing import Any

from emergency_ckpt import CheckpointManager
from tests.integration.processes import run_job
from tests.integration.training_job import make_config, make_mesh, make_state

FEW, MANY = 100, 400
LOOKS = 10


def count_what_saves_leave(root: str) -> list[dict[str, Any]]:
    """What there is after FEW and after MANY saves on both tiers, with extras."""
    mesh = make_mesh(2)
    state = make_state(mesh, 0)
    flags = {
        "local_checkpoint_period": 1,
        "checkpoint_period": 20,
        "max_num_checkpoints_to_keep": 2,
        "local_checkpoint_slot_wait_seconds": 30,
    }
    manager = CheckpointManager.from_config(make_config(root, flags), mesh, state)
    found = []
    for before, saves in ((0, FEW), (FEW, MANY)):
        for step in range(before + 1, saves + 1):
            assert manager.save(step, state, extras={"data": {"position": step}})
        manager.wait_until_finished()
        manager.check_for_errors()
        # The last steps may be on their way out in the background: what is there at the calmest moment counts.
        found.append(min((_count_later(manager) for _ in range(LOOKS)), key=lambda count: count["objects"]))
    manager.close()
    return found


def _count_later(manager: CheckpointManager) -> dict[str, Any]:
    time.sleep(0.2)
    return _count(manager)


def _count(manager: CheckpointManager) -> dict[str, Any]:
    gc.collect()
    objects = gc.get_objects()
    ours = collections.Counter(
        type(each).__qualname__ for each in objects if str(type(each).__module__).startswith("emergency_ckpt")
    )
    return {
        "keys": len(manager._engine.job.coordinator.entries("")),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "ours": dict(ours),
        "objects": len(objects),
    }


def test_nothing_grows_from_save_to_save(ramdisk: Path) -> None:
    for few, many in run_job(count_what_saves_leave, 2, str(ramdisk)):
        assert few["keys"], "the keys of the job are found"
        # The keys of the last saves are deleted a little later on some processes than on others.
        assert many["keys"] <= few["keys"] + 5
        # One that each drain leaves would be fifteen more.
        assert len(many["threads"]) <= len(few["threads"]) + 8, (few["threads"], many["threads"])
        grown = {name: n for name, n in many["ours"].items() if n > few["ours"].get(name, 0) + 5}
        assert not grown
        assert many["objects"] < few["objects"] + (MANY - FEW) / 2
