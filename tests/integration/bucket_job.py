"""A job whose persistent tier is a bucket, and which loses all its ramdisks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from emergency_ckpt import CheckpointManager
from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from emergency_ckpt.errors import EmergencyCheckpointError
from tests.integration.training_job import check_state, make_config, make_mesh, make_state


def save_lose_and_go_on(root: str, url: str, no_bucket: str, changed: dict[str, Any]) -> list[dict[str, Any]]:
    """Three lives: each restores what there is and saves four steps; the second one has lost the ramdisks.

    Before them a start whose bucket is not there.
    """
    mesh, process = make_mesh(2), jax.process_index()
    try:
        CheckpointManager.from_config(
            make_config(root, {"base_output_directory": no_bucket}), mesh, make_state(mesh, 0)
        )
        refused = ""
    except EmergencyCheckpointError as error:
        refused = f"{type(error).__name__}: {error}"
    told: list[dict[str, Any]] = []
    for life in range(3):
        if life == 1:
            remove_tree(Path(root) / f"ramdisk_{process}")
        flags = {
            "base_output_directory": url,
            "checkpoint_period": 3,
            "max_num_checkpoints_to_keep": 2,
            **changed,
        }
        config = make_config(root, flags)
        with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
            restored = manager.restore_or_init(lambda: make_state(mesh, 0))
            start = restored.step or 0
            check_state(restored.state, mesh, start)
            for step in range(start + 1, start + 5):
                manager.save(step, make_state(mesh, step), force=step == start + 4)
                manager.wait_until_finished()
            manager.check_for_errors()
            # Process 0 deletes, and waits until what it deletes is out of sight; the others do not.
            multihost_utils.sync_global_devices(f"life {life}")
            told.append(
                {
                    "start": start,
                    "source": restored.source,
                    "steps": list(manager.all_steps()),
                    "persistent": [s.step_id.step for s in manager._engine.job.persistent.steps()],
                    "directory": str(manager.directory),
                    "refused": refused,
                }
            )
    return told
