"""Starting a run from another run's checkpoint: every form in which plain Orbax, MaxText or we write one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt import CheckpointManager
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError, StateMismatchError
from tests.manager.states import OPTIONS, assert_same, flags, make_state


def train_state(mesh: Mesh, seed: int, *axes: str | None) -> TrainState:
    """Flax's state as MaxText has it: parameters below 'params' twice, and an optimizer that repeats them."""
    place, everywhere = NamedSharding(mesh, P(*axes or ("fsdp",))), NamedSharding(mesh, P())
    params = {
        "params": {
            "w": jax.device_put(jnp.arange(32.0).reshape(8, 4) + seed, place),
            "b": jax.device_put((jnp.arange(8) + seed).astype(jnp.bfloat16), everywhere),
        }
    }
    tx = optax.adamw(1e-3)
    opt_state = jax.tree.map(
        lambda x: jax.device_put(x + seed, x.sharding if isinstance(x.sharding, NamedSharding) else everywhere),
        tx.init(params),
    )
    step = jax.device_put(jnp.int32(seed), everywhere)
    return TrainState(step=step, apply_fn=None, params=params, tx=tx, opt_state=opt_state)  # type: ignore[arg-type]


def orbax_manager(item: str, step: int, **kwargs: Any) -> Callable[[Path, Any], str]:
    """Plain Orbax's manager, with names of steps as MaxText's users may choose them."""

    def save(root: Path, state: Any) -> str:
        options = ocp.CheckpointManagerOptions(step_prefix="ck", step_format_fixed_length=6)
        handlers = {item: ocp.PyTreeCheckpointHandler(**kwargs)}
        with ocp.CheckpointManager(root, options=options, item_handlers=handlers) as plain:
            plain.save(step, args=ocp.args.Composite(**{item: ocp.args.PyTreeSave(state)}))
        return f"ck_{step:06d}"

    return save


def orbax_checkpointer(**kwargs: Any) -> Callable[[Path, Any], str]:
    def save(root: Path, state: Any) -> str:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**kwargs)) as plain:
            plain.save(root / "at", args=ocp.args.PyTreeSave(state))
        return "at"

    return save


def standard(root: Path, state: Any) -> str:
    with ocp.StandardCheckpointer() as plain:
        plain.save(root / "0/items", state)
    return "0/items"


def orbax_v1(root: Path, state: Any) -> str:
    ocp_v1.save(str(root / "v1"), state)
    return "v1"


def below(path: str, writer: Callable[[Path, Any], str]) -> Callable[[Path, Any], str]:
    return lambda root, state: f"{writer(root, state)}/{path}"


def ours(root: Path, state: Any) -> str:
    mesh = state.params["params"]["w"].sharding.mesh
    with CheckpointManager(None, root, mesh, state, options=OPTIONS) as manager:
        manager.save(7, state, force=True)
    return "7"


FORMS = {
    "ours": ours,
    "ours, item": below("default", ours),
    "directory": orbax_checkpointer(),
    "directory, zarr2 files": orbax_checkpointer(use_ocdbt=False),
    "directory, zarr3": orbax_checkpointer(use_zarr3=True),
    "standard, at items": standard,
    "step, default": orbax_manager("default", 3),
    "step, state, zarr3 files": orbax_manager("state", 3, use_ocdbt=False, use_zarr3=True),
    "step of MaxText": orbax_manager("items", 0, use_zarr3=True),
    "items of MaxText": below("items", orbax_manager("items", 0)),
    "Orbax v1": orbax_v1,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_full_state_comes_from_every_form_onto_any_mesh(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, form: str
) -> None:
    saved = train_state(mesh, 5)
    path = tmp_path / "other" / FORMS[form](tmp_path / "other", saved)
    other = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("replica", "x", "y"))
    wanted = train_state(other, 9, "y", "x")
    config = flags(ramdisk, tmp_path, load_full_state_path=str(path))
    with CheckpointManager.from_config(config, other, wanted) as manager:
        restored = manager.restore_or_init(lambda: pytest.fail("the other run's state is wanted"))
    assert restored.step is None
    assert_same(restored.state, train_state(other, 5, "y", "x").replace(tx=wanted.tx))


PARAMETER_FORMS = {
    **{name: FORMS[name] for name in ("ours", "directory, zarr2 files", "items of MaxText", "Orbax v1")},
    "parameters of MaxText": lambda root, state: standard(root, {"params": state.params}),
    "flax's variables": lambda root, state: standard(root, state.params),
    "bare": lambda root, state: standard(root, state.params["params"]),
}


@pytest.mark.parametrize("form", PARAMETER_FORMS)
def test_parameters_alone_come_from_every_form(mesh: Mesh, ramdisk: Path, tmp_path: Path, form: str) -> None:
    saved, fresh = train_state(mesh, 5), train_state(mesh, 9, None, "fsdp")
    path = tmp_path / "other" / PARAMETER_FORMS[form](tmp_path / "other", saved)
    config = flags(ramdisk, tmp_path, load_parameters_path=str(path))
    with CheckpointManager.from_config(config, mesh, fresh) as manager:
        restored = manager.restore_or_init(lambda: fresh)
    assert restored.step is None
    wanted = train_state(mesh, 5, None, "fsdp")
    assert_same(restored.state, fresh.replace(params=wanted.params))


def test_every_leaf_that_differs_is_named(mesh: Mesh, ramdisk: Path, tmp_path: Path) -> None:
    saved = {"params": {"w": jnp.ones((4, 4)), "b": jnp.ones(2), "n": 3}, "step": jnp.int32(3)}
    path = tmp_path / standard(tmp_path, saved)
    wanted = {
        "params": {"w": jnp.ones((4, 5)), "b": jnp.ones(2, jnp.bfloat16), "more": jnp.ones(1), "n": "text"},
        "step": jnp.int32(0),
        "rate": 0.5,
    }
    lines = [
        "params.b: saved float32[2], wanted bfloat16[2]",
        "params.more: saved nothing, wanted float32[1]",
        "params.w: saved float32[4, 4], wanted float32[4, 5]",
    ]
    for flag, expected in (
        ("load_full_state_path", [*lines, "rate: saved nothing"]),
        ("load_parameters_path", lines),
    ):
        config = flags(ramdisk, tmp_path, **{flag: str(path)})
        with (
            CheckpointManager.from_config(config, mesh, wanted) as manager,
            pytest.raises(StateMismatchError) as caught,
        ):
            manager.restore_or_init(lambda: wanted)
        for line in expected:
            assert line in str(caught.value)
        assert "step:" not in str(caught.value)


@pytest.mark.parametrize("saved", [7, np.int64(7), jnp.int32(7)])
@pytest.mark.parametrize("wanted", [0, jnp.int32(0)])
def test_a_number_may_have_been_an_array_and_the_other_way_round(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, saved: Any, wanted: Any
) -> None:
    path = tmp_path / orbax_checkpointer()(tmp_path, {"step": saved, "w": jnp.ones(3)})
    config = flags(ramdisk, tmp_path, load_full_state_path=str(path))
    with CheckpointManager.from_config(config, mesh, {"step": wanted, "w": jnp.zeros(3)}) as manager:
        step = manager.restore_or_init(dict).state["step"]
    assert_same(step, jnp.int32(7) if isinstance(wanted, jax.Array) else 7)


def test_a_number_that_does_not_fit_is_named(mesh: Mesh, ramdisk: Path, tmp_path: Path) -> None:
    path = tmp_path / orbax_checkpointer()(tmp_path, {"big": 2**40, "half": 0.5, "third": 1 / 3})
    wanted = {"big": jnp.int32(0), "half": jnp.int8(0), "third": jnp.float32(0)}
    config = flags(ramdisk, tmp_path, load_full_state_path=str(path))
    with (
        CheckpointManager.from_config(config, mesh, wanted) as manager,
        pytest.raises(StateMismatchError) as caught,
    ):
        manager.restore_or_init(dict)
    assert "big: saved the int 1099511627776, wanted int32[]" in str(caught.value)
    assert "half: saved the float 0.5, wanted int8[]" in str(caught.value)
    assert "third" not in str(caught.value)


def test_paths_that_hold_no_checkpoint_are_refused(mesh: Mesh, ramdisk: Path, tmp_path: Path) -> None:
    state = {"params": {"w": make_state(mesh, 0).params["w"]}}
    standard(tmp_path / "root", state)
    for path, error, text in (
        ("nowhere", PersistentStoreError, "does not exist"),
        ("root", PersistentStoreError, r"root is not a committed checkpoint.*\['0'\]"),
    ):
        config = flags(ramdisk, tmp_path, load_full_state_path=str(tmp_path / path))
        with CheckpointManager.from_config(config, mesh, state) as manager, pytest.raises(error, match=text):
            manager.restore_or_init(lambda: state)


def test_a_damaged_checkpoint_is_not_loaded(mesh: Mesh, ramdisk: Path, tmp_path: Path) -> None:
    state = train_state(mesh, 5)
    path = tmp_path / "other" / ours(tmp_path / "other", state)
    for file in path.rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    config = flags(ramdisk, tmp_path, load_full_state_path=str(path))
    with CheckpointManager.from_config(config, mesh, state) as manager, pytest.raises(CorruptDataError):
        manager.restore_or_init(lambda: state)
