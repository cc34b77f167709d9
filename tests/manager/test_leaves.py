"""Every kind of leaf through the whole manager, and leaves that change their kind while a job trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt import CheckpointManager
from emergency_ckpt.errors import StateMismatchError, UnsupportedStateError
from tests.jaxio.framework_states import VALUES, nnx_parts, optax_states, train_state
from tests.jaxio.memory_slot import abstract, same
from tests.jaxio.states import MESHES, every_dtype_state, filled, kinds_state, placements_state, shardings_state
from tests.manager.states import OPTIONS, Opener


def forget_ramdisk(ramdisk: Path) -> None:
    for manifest in ramdisk.rglob("*.manifest"):
        manifest.unlink()


def test_every_kind_of_leaf_comes_back_from_both_tiers(opened: Opener, ramdisk: Path, tmp_path: Path) -> None:
    with jax.enable_x64(True):
        state = {
            "dtypes": every_dtype_state(),
            "kinds": kinds_state(),
            "shardings": shardings_state(),
            "values": VALUES,
            "optax": optax_states(),
            "flax": train_state(),
            "nnx": nnx_parts(),
        }
        manager = opened(abstract(state))
        assert manager.save(5, state)
        manager.wait_until_finished()
        manager.check_for_errors()
        manager = opened(abstract(state))
        restored = manager.restore_or_init(dict)
        assert restored.source == "own slot"
        assert same(restored.state, state)
        forget_ramdisk(ramdisk)
        manager = opened(abstract(state))
        restored = manager.restore_or_init(dict)
        assert restored.source == "persistent"
        assert same(restored.state, state)
    with ocp.PyTreeCheckpointer() as checkpointer:
        theirs = checkpointer.restore(next((tmp_path / "bucket" / "5").glob("*/_METADATA")).parent)
    assert theirs["values"]["int"] == 3
    assert theirs["values"]["bytes"] is None
    assert theirs["flax"]["params"]["dense"]["kernel"].tolist() == [[1, 1, 1]] * 2


@pytest.mark.parametrize(
    ("shape", "names", "replica"),
    [(shape, names, axis) for shape, names in MESHES for axis in range(len(shape))],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_every_placement_comes_back_wherever_the_replica_axis_is(
    ramdisk: Path, tmp_path: Path, shape: tuple[int, ...], names: str, replica: int
) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(shape), tuple(names))
    state = dict(list(placements_state(mesh).items())[:40])
    options = dataclasses.replace(OPTIONS, replica_axis_index=replica)

    def manage() -> CheckpointManager:
        return CheckpointManager(ramdisk, tmp_path / "bucket", mesh, abstract(state), options=options)

    with manage() as manager:
        assert manager.save(5, state)
        manager.wait_until_finished()
        manager.check_for_errors()
    with manage() as manager:
        restored = manager.restore_or_init(dict)
        assert (restored.source, same(restored.state, state)) == ("own slot", True)
    forget_ramdisk(ramdisk)
    with manage() as manager:
        restored = manager.restore_or_init(dict)
        assert (restored.source, same(restored.state, state)) == ("persistent", True)


def test_device_layouts_and_memory_kinds_that_the_abstract_state_asks_for(
    opened: Opener, mesh: Mesh, ramdisk: Path
) -> None:
    turned = Format(Layout((1, 0)), NamedSharding(mesh, P("fsdp")))
    pinned = NamedSharding(mesh, P("fsdp"), memory_kind="pinned_host")
    state = {
        "turned": jax.device_put(np.arange(32, dtype=np.float32).reshape(8, 4), turned),
        "pinned": filled((8, 4), "bfloat16", pinned),
    }
    wanted = {
        "turned": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=turned),
        "pinned": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=pinned),
    }
    opened(wanted).save(5, state)
    for source in ("own slot", "persistent"):
        restored = opened(wanted).restore_or_init(dict)
        assert restored.source == source
        assert same(restored.state, state)
        assert restored.state["turned"].format.layout.major_to_minor == (1, 0)
        forget_ramdisk(ramdisk)


def test_a_guard_against_transfers_in_the_train_step_stops_neither_saves_nor_restores(
    opened: Opener, mesh: Mesh, ramdisk: Path
) -> None:
    cut = NamedSharding(mesh, P("fsdp"))
    wanted = {"w": filled((8, 4), "float32", cut), "sub-byte": filled((8, 4), "int4", cut), "step": 0}
    state = wanted | {"step": jnp.int32(5)}
    with jax.transfer_guard("disallow_explicit"):
        assert opened(abstract(wanted)).save(5, state)
        for source in ("own slot", "persistent"):
            restored = opened(abstract(wanted)).restore_or_init(dict)
            assert restored.source == source
            forget_ramdisk(ramdisk)
    assert same(restored.state, wanted | {"step": 5})


def create(step: Any = 0) -> TrainState:
    params = {"w": jnp.ones((4, 2))}
    return TrainState.create(apply_fn=len, params=params, tx=optax.adam(1e-3)).replace(step=step)


@jax.jit
def update(state: TrainState) -> TrainState:
    return state.apply_gradients(grads=state.params)


DONATED = jax.jit(lambda state: state.apply_gradients(grads=state.params), donate_argnums=0)


@pytest.mark.parametrize("made_with", ["python number", "array"])
@pytest.mark.parametrize("tier", ["own slot", "persistent"])
def test_a_step_counter_that_becomes_an_array_is_saved_from_the_first_step_on(
    opened: Opener, ramdisk: Path, made_with: str, tier: str
) -> None:
    """`TrainState.create` begins with the number 0; after the first jitted step it is an array."""
    wanted = create() if made_with == "python number" else abstract(update(create()))
    manager = opened(wanted)
    state = create()
    assert isinstance(state.step, int)
    assert manager.save(0, state)
    for step in range(1, 6):
        state = update(state) if step < 3 else DONATED(state)
        manager.save(step, state)
    right = np.asarray(state.params["w"]).copy()
    DONATED(state)
    manager.wait_until_finished()
    manager.check_for_errors()
    if tier == "persistent":
        forget_ramdisk(ramdisk)
    restored = opened(wanted).restore_or_init(dict)
    found = restored.state.step
    assert (restored.step, restored.source) == (5, tier)
    assert isinstance(found, int) if made_with == "python number" else isinstance(found, jax.Array)
    assert int(found) == restored.step
    assert np.asarray(restored.state.params["w"]).tolist() == right.tolist()
    after = update(restored.state)
    assert int(after.step) == int(found) + 1


def test_an_older_step_is_restored_in_the_kind_that_the_state_has_now(opened: Opener, ramdisk: Path) -> None:
    opened(create()).save(5, create(5))
    restored = opened(abstract(update(create()))).restore(5)["state"]
    assert isinstance(restored.step, jax.Array)
    assert int(restored.step) == 5


def test_what_cannot_be_saved_is_named_before_anything_is_saved(opened: Opener) -> None:
    with pytest.raises(UnsupportedStateError, match=r"leaf 'opt\.mask' is of type MaskedArray"):
        opened({"opt": {"mask": np.ma.masked_array([1], [True])}})
    with pytest.raises(UnsupportedStateError, match=r"leaf 'table' is of type ndarray and dtype object"):
        opened({"table": np.array([None])})
    manager = opened({"step": 0, "w": jnp.ones(2)})
    with pytest.raises(StateMismatchError, match="leaf 'step': found 'x' of type str"):
        manager.save(1, {"step": "x", "w": jnp.ones(2)})
    with pytest.raises(UnsupportedStateError, match=r"leaf 'step' is of type int of 2097\d+ bytes"):
        manager.save(2, {"step": 1 << 2**24, "w": jnp.ones(2)})
    assert manager.save(4, {"step": 3, "w": jnp.ones(2)})


@pytest.mark.parametrize("writer", ["ours", "orbax"])
def test_keys_of_another_implementation_are_not_taken_for_the_wanted_ones(
    opened: Opener, ramdisk: Path, tmp_path: Path, writer: str
) -> None:
    """The data of rbg and unsafe_rbg keys have one shape, and mean other numbers."""
    saved, wanted = ({"key": jax.random.key(3, impl=impl)} for impl in ("rbg", "unsafe_rbg"))
    if writer == "ours":
        opened(saved).save(5, saved)
    else:
        with ocp.CheckpointManager(tmp_path / "bucket") as manager:
            manager.save(5, args=ocp.args.PyTreeSave(saved))
    with pytest.raises(StateMismatchError, match="key: saved rbg keys, wanted unsafe_rbg keys"):
        opened(wanted).restore(5)
    assert same(opened(saved).restore(5)["state"], saved)
