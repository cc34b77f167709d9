"""Devices of one process that hold other copies than the rest are named at the save, where that is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt import CheckpointManager, Config, ReplicaDivergenceError


def make_state(mesh: Mesh, step: int, damaged: int | None = None) -> dict[str, jax.Array]:
    sharding = NamedSharding(mesh, P("fsdp"))
    right = np.arange(32, dtype=np.float32).reshape(8, 4) + step
    pieces = []
    for device, index in sharding.addressable_devices_indices_map(right.shape).items():
        piece = right[index].copy()
        if device.id == damaged:
            piece.view(np.uint32)[1, 2] ^= 1 << 30
        pieces.append(jax.device_put(piece, device))
    return {"w": jax.make_array_from_single_device_arrays(right.shape, sharding, pieces)}


def make_config(ramdisk: Path, tmp_path: Path, **flags: Any) -> Config:
    return Config(
        run_name="r",
        base_output_directory=str(tmp_path),
        enable_checkpointing=True,
        enable_emergency_checkpoint=True,
        local_checkpoint_directory=str(ramdisk),
        local_checkpoint_period=1,
        checkpoint_period=1000,
        checkpoint_agent="off",
        **flags,
    )


@pytest.mark.parametrize("mode", ["warn", "raise"])
def test_a_device_with_another_copy_is_named_and_an_error_where_that_is_wanted(
    mesh: Mesh,
    ramdisk: Path,
    tmp_path: Path,
    mode: Literal["warn", "raise"],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_config(ramdisk, tmp_path, compare_device_copies=True, on_replica_divergence=mode)
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        assert manager.save(1, make_state(mesh, 1))
        manager.wait_until_finished()
        assert manager.metrics_snapshot()["replica_divergences"] == 0
        assert manager.save(2, make_state(mesh, 2, damaged=6))
        if mode == "raise":
            with pytest.raises(ReplicaDivergenceError, match="different copies of w") as raised:
                manager.wait_until_finished()
            assert (raised.value.step, raised.value.leaves) == (2, ("w",))
        manager.wait_until_finished()
        assert manager.latest_complete_step() == 2
        assert manager.metrics_snapshot()["replica_divergences"] == 1
        assert manager.metrics_snapshot()["last_divergent_step"] == 2
    (line,) = [r.getMessage() for r in caplog.records if " replicas step=2 " in r.getMessage()]
    assert "copies of w[4:6, 0:4] in this process differ" in line
    assert "device 2 and device 6 differ, and nothing tells which of them is right" in line


def test_it_is_off_unless_asked_for(mesh: Mesh, ramdisk: Path, tmp_path: Path) -> None:
    config = make_config(ramdisk, tmp_path)
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        assert manager.save(1, make_state(mesh, 1, damaged=6))
        manager.wait_until_finished()
        assert manager.metrics_snapshot()["replica_divergences"] == 0
