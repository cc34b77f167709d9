"""What slots hold and snapshots read where slices share the state, run in each process of a test's job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt import CheckpointManager
from tests.integration.training_job import live_through, make_config, make_mesh

LEAVES, LEAF_BYTES = 12, 64 * 1024


def measure(root: str, slices: int, flags: dict[str, Any]) -> dict[str, Any]:
    """Saves a state of equal leaves twice; sizes are in leaves of one process."""
    mesh = make_mesh(slices)
    place = NamedSharding(mesh, P("fsdp"))
    width = LEAF_BYTES * mesh.shape["fsdp"]
    state = {
        f"w{leaf:02}": jax.make_array_from_callback(
            (width,), place, lambda index, leaf=leaf: np.full((width,), leaf, np.uint8)[index]
        )
        for leaf in range(LEAVES)
    }
    with CheckpointManager.from_config(make_config(root, flags), mesh, state) as manager:
        for step in (2, 4):
            manager.save(step, state)
        manager.wait_until_finished()
        manager.check_for_errors()
        told = manager.metrics_snapshot()
        read = manager._engine._binder.bind(state).buffers
        losses = manager.survivable_losses()
        slots = {p.stat().st_size for p in Path(root).glob(f"ramdisk_{jax.process_index()}/*/*/slot_*.data")}
        return {
            "complete": manager.latest_complete_step(),
            "slots": [size / LEAF_BYTES for size in slots],
            "read": sum(buffer.data.nbytes for buffer in read) / LEAF_BYTES,
            "saved": told["saved_bytes"] / LEAF_BYTES / 2,
            "slices": losses.slices,
        }


def measure_and_live(
    trained: str, root: str, slices: int, stories: dict[str, Any], measured: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One started job for both; what is measured by the name of its flags."""
    sizes = {name: measure(f"{root}/measured {name}", slices, flags) for name, flags in measured.items()}
    return sizes, live_through(trained, root, slices, stories)
