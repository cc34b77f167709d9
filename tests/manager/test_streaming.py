"""Where no slot is free a step goes to the devices through a bounded window, and into a slot afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt import CheckpointManager
from emergency_ckpt.core.lineage import StepId
from tests.manager.states import OPTIONS, assert_same

LEAVES, LEAF_BYTES, WINDOW = 40, 256 * 1024, 1024 * 1024
Started = Callable[[int], CheckpointManager]


def mesh_of(slices: int) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(slices, -1), ("replica", "fsdp"))


def make_state(mesh: Mesh, step: int) -> dict[str, Any]:
    place = NamedSharding(mesh, P("fsdp"))
    rows = np.arange(LEAF_BYTES // 4, dtype=np.float32).reshape(256, -1)
    arrays = {f"w{i:02}": jax.device_put(rows * (i + 1) + step, place) for i in range(LEAVES)}
    return {**arrays, "none": jax.device_put(np.zeros((0, 3), np.int8), NamedSharding(mesh, P())), "step": step}


@pytest.fixture
def started(ramdisk: Path, tmp_path: Path) -> Started:
    """Of a job of so many slices; its ramdisk holds the steps 5, 6 and 8, and the bucket step 5."""

    def start(slices: int) -> CheckpointManager:
        mesh = mesh_of(slices)
        return CheckpointManager(ramdisk, tmp_path / "bucket", mesh, make_state(mesh, 0), options=OPTIONS)

    with start(2) as manager:
        for step in range(5, 9):
            manager.save(step, make_state(mesh_of(2), step))
            manager.wait_until_finished()
        manager.check_for_errors()
    return start


def restored(manager: CheckpointManager, slices: int, step: int) -> None:
    found = manager.restore_or_init(dict)
    assert found.step == step
    assert_same(found.state, make_state(mesh_of(slices), step))


def test_another_cut_goes_through_the_window_and_is_sealed_before_the_first_step(started: Started) -> None:
    with started(4) as manager:
        restored(manager, 4, 8)
        assert 0 < manager.metrics_snapshot()["restore_window_bytes"] <= WINDOW < LEAVES * LEAF_BYTES
        local = manager._engine.job.local
        slot = local.sealed(StepId(1, 8))
        assert slot is not None
        assert slot.layout.hash == local.layout.hash
        assert slot.find_damage() is None
        assert manager.save(10, make_state(mesh_of(4), 10))
        manager.wait_until_finished()
    with started(4) as manager:
        restored(manager, 4, 10)
        assert manager.last_restore is not None
        assert manager.last_restore.source == "own slot"


def test_a_step_that_is_damaged_on_the_way_is_passed_over_and_nothing_of_it_stays(
    started: Started, ramdisk: Path
) -> None:
    with started(4) as manager:
        slot = manager._engine.job.local.sealed(StepId(1, 8))
        assert slot is not None
        slot.shard(slot.layout.process_shards[0][-2])[0] ^= 1
        restored(manager, 4, 6)
        assert manager.latest_step() == 6
        assert manager.metrics_snapshot()["restore_window_bytes"] <= WINDOW
    with started(4) as manager:
        restored(manager, 4, 6)
        assert manager.last_restore is not None
        assert manager.last_restore.source == "own slot"


def test_an_older_step_is_looked_at_through_the_window_and_takes_no_slot(started: Started) -> None:
    with started(2) as manager:
        restored(manager, 2, 8)
        for step in (10, 12):
            assert manager.save(step, make_state(mesh_of(2), step))
            manager.wait_until_finished()
    with started(2) as manager:
        local = manager._engine.job.local
        before = local.sealed_steps(listed_only=False)
        assert len(before) == local.slot_count, "none is free"
        assert_same(manager.restore(5)["state"], make_state(mesh_of(2), 5))
        assert 0 < manager.metrics_snapshot()["restore_window_bytes"] <= WINDOW
        assert local.sealed_steps(listed_only=False) == before
        restored(manager, 2, 12)
