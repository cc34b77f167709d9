"""A job that trains until it is told to leave, for tests that send it notices."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from emergency_ckpt import CheckpointManager
from tests.integration.training_job import make_config, make_mesh, make_state


def train_until_told(root: str, changed: dict[str, Any] | None = None) -> dict[str, Any]:
    """Trains, once the file `go` is there, until all processes leave at one step; tells what happened.

    `changed`: flags.
    """
    mesh = make_mesh(2)
    fresh = make_state(mesh, 0)
    flags = {"enable_autocheckpoint": True, "local_checkpoint_period": 1000, **(changed or {})}
    with CheckpointManager.from_config(make_config(root, flags), mesh, fresh) as manager:
        start = manager.restore_or_init(lambda: fresh).step or 0
        print(f"restored {start}", flush=True)
        while not Path(root, "go").exists():
            time.sleep(0.02)
        for step in range(start + 1, start + 100_000):
            manager.save(step, make_state(mesh, step))
            print(f"step {step}", flush=True)
            if manager.reached_preemption(step):
                manager.wait_until_finished()
                return {
                    "began_after": start,
                    "left_at": step,
                    "steps": list(manager.all_steps()),
                    "heard": [[notice.source, notice.kind, notice.detail] for notice in manager.notices],
                }
    raise AssertionError("no notice was ever agreed on")
