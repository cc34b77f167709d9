"""A job in which one process comes to hold other bits than its counterparts, as after a fault of its device."""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt import CheckpointManager, ReplicaDivergenceError
from tests.integration.training_job import make_config, make_mesh

DAMAGED_AT = 3


class _Lines(logging.Handler):
    """Keeps what is logged about replicas."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "replicas " in (message := record.getMessage()):
            self.lines.append(message)


def make_state(mesh: Mesh, step: int, damage: str = "") -> dict[str, Any]:
    """The state at a step; this process has other bits than it should in the leaf `damage`."""
    cuts = {"w": P("fsdp"), "scale": P()}
    state: dict[str, Any] = {"lr": 0.5 + (step if damage == "lr" else 0), "host": np.arange(5.0) + step}
    if damage == "host":
        state["host"] += 1
    for name, cut in cuts.items():
        right = np.arange(64, dtype=np.float32).reshape(16, 4) + step
        sharding = NamedSharding(mesh, cut)
        pieces = []
        for device, index in sharding.addressable_devices_indices_map(right.shape).items():
            piece = right[index].copy()
            if damage == name:
                piece.view(np.uint32).reshape(-1)[0] ^= 1
            pieces.append(jax.device_put(piece, device))
        state[name] = jax.make_array_from_single_device_arrays(right.shape, sharding, pieces)
    return state


def save_and_restore(root: str, slices: int, flags: dict[str, Any], damaged: dict[str, str]) -> dict[str, Any]:
    """Steps 1 to 4; from step 3 on a leaf of each process in `damaged` has one bit too many. Then a restore."""
    mesh, process = make_mesh(slices), jax.process_index()
    heard = _Lines()
    absl_logging.get_absl_logger().addHandler(heard)
    config = make_config(root, {"local_checkpoint_period": 1, "checkpoint_period": 1000, **flags})
    raised: dict[int, str] = {}
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        for step in range(1, 5):
            leaf = damaged.get(str(process), "") if step >= DAMAGED_AT else ""
            manager.save(step, make_state(mesh, step, leaf))
            try:
                manager.wait_until_finished()
            except ReplicaDivergenceError as error:
                raised[step] = f"{error.step} {error.leaves}"
        saved = manager.metrics_snapshot()
    multihost_utils.sync_global_devices("saved")
    told = {"raised": raised, "lines": list(heard.lines), "saved": saved["replica_divergences"]}
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        restored = manager.restore_or_init(lambda: make_state(mesh, 0))
        report = manager.last_restore
        assert report is not None
        counters = manager.metrics_snapshot()
    restored_lines = heard.lines[len(told["lines"]) :]
    multihost_utils.sync_global_devices("restored")
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        manager.restore_or_init(lambda: make_state(mesh, 0))
        assert manager.last_restore is not None
        again = manager.last_restore.source
        told["again_divergences"] = manager.metrics_snapshot()["replica_divergences"]
    right = make_state(mesh, 4)
    return {
        **told,
        "step": restored.step,
        "reason": report.reason,
        "restored_lines": restored_lines,
        "fetched": counters["fetched_bytes"],
        "again": again,
        "restored": counters["replica_divergences"],
        "last": counters.get("last_divergent_step"),
        "wrong": [
            name
            for name in right
            if [np.asarray(s.data).tobytes() for s in _shards(restored.state[name])]
            != [np.asarray(s.data).tobytes() for s in _shards(right[name])]
        ],
    }


def _shards(leaf: Any) -> Any:
    return leaf.addressable_shards if isinstance(leaf, jax.Array) else [np.asarray(leaf)]
