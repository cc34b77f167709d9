"""Every kind of leaf through the persistent tier: read by us as it was saved, and restored by plain Orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.sharding import Mesh

from emergency_ckpt.core.shards import dtype_of
from emergency_ckpt.jaxio.topology import Topology
from emergency_ckpt.persistent.orbax_values import orbax_values
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.runtime.loading import read_state
from tests.jaxio.framework_states import VALUES, Model, nnx_parts, optax_states, train_state
from tests.jaxio.memory_slot import abstract, bits, same
from tests.jaxio.states import MESHES, every_dtype_state, placements_state
from tests.persistent.test_orbax_restores_ours import write


def read(root: Path, wanted: Any, step: int = 1) -> Any:
    return read_state(StepReader(root / str(step)), wanted, Topology.single_process(), 2**30)


def orbax_restore(root: Path, wanted: Any = None, step: int = 1) -> Any:
    with ocp.PyTreeCheckpointer() as checkpointer:
        path = root / str(step) / "default"
        if wanted is None:
            return checkpointer.restore(path)
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        return checkpointer.restore(path, item=wanted, restore_args=restore_args)


def in_tensorstore(dtype: np.dtype) -> bool:
    try:
        ts.dtype(dtype)
    except (TypeError, ValueError):
        return False
    return True


def test_every_dtype_is_read_as_it_was_saved_and_orbax_gives_the_rest_as_bytes(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        state = every_dtype_state()
        write(tmp_path, state, 1, "default")
        assert same(read(tmp_path, abstract(state)), state)
        theirs = orbax_restore(tmp_path)
    for name, arrays in state["jax"].items():
        stored = dtype_of(name) if in_tensorstore(dtype_of(name)) else np.dtype(np.uint8)
        for kind, array in arrays.items():
            found = np.asarray(theirs["jax"][name][kind])
            assert (found.dtype, found.shape) == (stored, array.shape), (name, kind)
            assert found.tobytes() == np.asarray(array).tobytes(), (name, kind)
    for name, host in state["numpy"].items():
        held = orbax_values({"x": host["value"]}).numbers
        found = theirs["numpy"][name]["value"]
        assert (found is None) == (not held), name
        if held:
            assert repr(np.asarray(found).astype(host["value"].dtype)) == repr(np.asarray(host["value"])), name


def test_orbax_restores_every_dtype_that_it_has_to_a_target(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        state = every_dtype_state()["jax"]
        state = {name: arrays for name, arrays in state.items() if in_tensorstore(dtype_of(name))}
        write(tmp_path, state, 1, "default")
        assert same(orbax_restore(tmp_path, abstract(state)), state)


@pytest.mark.parametrize(("shape", "names"), MESHES[1::2])
def test_every_placement_is_read_and_restored_by_orbax(
    tmp_path: Path, shape: tuple[int, ...], names: str
) -> None:
    state = placements_state(Mesh(np.array(jax.devices()).reshape(shape), tuple(names)))
    write(tmp_path, state, 1, "default")
    assert same(read(tmp_path, abstract(state)), state)
    assert same(orbax_restore(tmp_path, abstract(state)), state)


def test_values_are_read_as_they_were_saved_and_orbax_restores_those_that_it_can_hold(tmp_path: Path) -> None:
    state = {**VALUES, "w": jnp.arange(3.0)}
    write(tmp_path, state, 1, "default")
    assert same(read(tmp_path, state), state)
    theirs = orbax_restore(tmp_path)
    assert theirs.pop("w").tolist() == [0, 1, 2]
    assert theirs == {
        "bool": True,
        "int": 3,
        "large": None,
        "float": 0.1,
        "complex": 1 - 2j,
        "text": None,
        "bytes": None,
        "phase": 3,
        "mode": "fast",
        "scalars": [float(np.float16(0.1)), 2**64 - 1, True, 1j, 5],
        "time": None,
        "span": None,
        "strings": ["a", None],
        "none": None,
        "empty": [{}, [], (), None, None],
    }


def test_with_a_target_orbax_leaves_out_what_it_cannot_hold_and_restores_the_rest(tmp_path: Path) -> None:
    state = {"w": jnp.arange(3.0), "big": 2**70, "raw": b"x", "when": np.array(["2020"], "M8[Y]"), "step": 7}
    write(tmp_path, state, 1, "default")
    assert same(read(tmp_path, state), state)
    target = {**state, "big": None, "raw": None, "when": None}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "1/default", abstract(target))
    assert restored.pop("w").tolist() == [0, 1, 2]
    assert restored == {"big": None, "raw": None, "when": None, "step": 7}


def test_a_value_may_outgrow_what_orbax_holds_from_one_step_to_the_next(tmp_path: Path) -> None:
    """The layout, made once, calls it a number."""
    abstract_state = {"seen": 0, "note": "", "w": jnp.zeros(2)}
    for step, (seen, note) in enumerate([(5, "a"), (2**64, "b"), (6, "\ud800"), (0.5, "d")], start=1):
        state = {**abstract_state, "seen": seen, "note": note}
        write(tmp_path, state, step, "default", layout_of=abstract_state)
        assert same(read(tmp_path, abstract_state, step), state)
        theirs = orbax_restore(tmp_path, step=step)
        assert theirs["seen"] == (None if seen == 2**64 else seen)
        assert theirs["note"] == (None if note == "\ud800" else note)


def test_a_module_of_nnx_is_read_as_it_was_saved(tmp_path: Path) -> None:
    """Orbax saves it and cannot restore it: it orders the keys of nodes that have numbers and names."""
    state = Model(nnx.Rngs(0))
    write(tmp_path, state, 1, "default")
    assert same(read(tmp_path, abstract(state)), state)


@pytest.mark.parametrize("make", [optax_states, train_state, nnx_parts], ids=["optax", "flax", "nnx"])
def test_states_of_frameworks_are_read_and_restored_by_orbax(tmp_path: Path, make: Any) -> None:
    state = make()
    write(tmp_path, state, 1, "default")
    assert same(read(tmp_path, abstract(state)), state)
    with ocp.CheckpointManager(tmp_path) as manager:
        theirs = manager.restore(1, args=ocp.args.StandardRestore(abstract(state)))
    assert jax.tree.structure(theirs) == jax.tree.structure(state)
    for found, wanted in zip(jax.tree.leaves(theirs), jax.tree.leaves(state), strict=True):
        # Orbax commits every array to the devices that its target names.
        assert bits(found)[:-1] == bits(wanted)[:-1]


def test_a_saved_number_is_read_as_a_0d_array_and_the_other_way_round(tmp_path: Path) -> None:
    write(tmp_path, {"step": 7, "rate": np.float32(0.5), "raw": b"x"}, 1, "default")
    wanted = {"step": jnp.int32(0), "rate": jnp.bfloat16(0), "raw": b""}
    assert same(read(tmp_path, wanted), {"step": jnp.int32(7), "rate": jnp.bfloat16(0.5), "raw": b"x"})
    write(tmp_path, {"step": jnp.int32(7), "rate": jnp.bfloat16(0.5)}, 2, "default")
    found = read(tmp_path, {"step": 0, "rate": np.float32(0)}, step=2)
    assert same(found, {"step": 7, "rate": np.float32(0.5)})
