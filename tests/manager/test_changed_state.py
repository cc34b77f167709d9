"""A start with another state, mesh or names than those that saved: what is used, and what is said."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt.errors import NoRestorableStepError, StateMismatchError
from tests.manager.states import OPTIONS, Opener


def sharded(mesh: Mesh, **arrays: np.ndarray) -> dict[str, jax.Array]:
    return {name: jax.device_put(array, NamedSharding(mesh, P("fsdp"))) for name, array in arrays.items()}


@pytest.fixture
def state(mesh: Mesh) -> dict[str, jax.Array]:
    return sharded(mesh, a=np.arange(8.0, dtype=np.float32), b=np.arange(16, dtype=np.int32), c=np.ones(4))


@pytest.fixture
def changed(mesh: Mesh) -> dict[str, Any]:
    return {**sharded(mesh, a=np.zeros(12, np.float32), b=np.zeros(16, np.int16), c=np.ones(4)), "rate": 0.5}


DIFFERENCES = (
    "a: saved float32[8], wanted float32[12]",
    "b: saved int32[16], wanted int16[16]",
    "rate: saved nothing, wanted a value",
)


def save_on_the_ramdisk_only(opened: Opener, state: Any, tmp_path: Path, step: int = 4) -> None:
    manager = opened(state)
    manager.save(step, state)
    manager.finish(step, state)
    manager.close()
    for committed in (tmp_path / "bucket").glob("[0-9]*"):
        shutil.rmtree(committed)


def test_a_changed_state_with_ramdisk_copies_only_is_an_error_at_start_that_voids_nothing(
    opened: Opener, state: Any, changed: Any, tmp_path: Path
) -> None:
    save_on_the_ramdisk_only(opened, state, tmp_path)
    for _ in range(2):
        with pytest.raises(StateMismatchError, match=r"the ramdisks hold step 4 \(generation 1\)") as caught:
            opened(changed)
        assert all(line in str(caught.value) for line in DIFFERENCES)
        assert "c: " not in str(caught.value)
        assert "use another run_name" in str(caught.value)
    restored = opened(state).restore(None)["state"]
    assert np.asarray(restored["a"]).tobytes() == np.asarray(state["a"]).tobytes()


def test_a_changed_state_with_a_persistent_step_names_every_leaf_and_voids_nothing(
    opened: Opener, state: Any, changed: Any
) -> None:
    manager = opened(state)
    for step in (5, 6):
        manager.save(step, state)
    manager = opened(changed)
    assert manager.latest_step() == 5  # Not None: nobody may take this for a run without checkpoints.
    for wanted in (None, 5, None):
        with pytest.raises(StateMismatchError) as caught:
            manager.restore(wanted)
        assert all(line in str(caught.value) for line in DIFFERENCES[:2])
    with pytest.raises(NoRestorableStepError, match="another state was saved, 3 leaves differ: a: saved"):
        manager.restore(6)
    assert opened(state).restore_or_init(dict).step == 6


def test_a_mesh_that_cuts_the_state_otherwise_is_no_changed_state(
    opened: Opener, state: Any, mesh: Mesh, tmp_path: Path
) -> None:
    other = Mesh(mesh.devices.reshape(4, 2), mesh.axis_names)
    again = {name: jax.device_put(np.asarray(x), NamedSharding(other, P("fsdp"))) for name, x in state.items()}
    save_on_the_ramdisk_only(opened, state, tmp_path)
    manager = opened(again)
    restored = manager.restore_or_init(dict)
    assert (restored.step, restored.source) == (4, "own slot"), "put together from shards of another cut"
    for name, array in again.items():
        assert np.asarray(restored.state[name]).tobytes() == np.asarray(array).tobytes()
        assert restored.state[name].sharding == array.sharding
    manager.save(5, again)
    manager.save(6, again)
    manager.wait_until_finished()
    restored = opened(state).restore_or_init(dict)
    assert (restored.step, restored.source) == (6, "own slot"), "and back"


def test_a_slot_with_the_right_shards_is_used_whatever_else_of_the_layout_changed(
    opened: Opener, state: Any, mesh: Mesh, tmp_path: Path
) -> None:
    renamed = Mesh(mesh.devices, ("data", "model"))
    again = {name: jax.device_put(x, NamedSharding(renamed, P("model"))) for name, x in state.items()}
    save_on_the_ramdisk_only(opened, state, tmp_path)
    for _ in range(2):
        manager = opened(again, dataclasses.replace(OPTIONS, replica_axis_index=0))
        restored = manager.restore_or_init(dict)
        assert (restored.step, restored.source) == (4, "own slot")
        assert all((restored.state[name] == x).all() for name, x in state.items())
    manager.save(6, again)
    manager.wait_until_finished()
    assert opened(again).restore_or_init(dict).step == 6


def test_a_value_that_was_not_saved_is_a_mismatch_on_every_tier(opened: Opener, mesh: Mesh) -> None:
    arrays = sharded(mesh, a=np.arange(8.0))
    opened(arrays).save(5, arrays)
    with pytest.raises(StateMismatchError, match="rate"):
        opened({**arrays, "rate": jnp.float32(0.5).item()}).restore(5)
