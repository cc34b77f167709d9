"""A persistent directory that plain Orbax or MaxText began is continued, and stays readable for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt import (
    CheckpointManager,
    CheckpointManagerOptions,
    LocalCheckpointOptions,
    PersistentCheckpointOptions,
)
from emergency_ckpt.errors import StateMismatchError
from tests.manager.states import assert_same


class State(flax.struct.PyTreeNode):
    step: Any
    params: Any
    opt_state: Any
    key: jax.Array
    note: str
    nothing: None = None
    empty: Any = dataclasses.field(default_factory=dict)


def state_at(mesh: Mesh, step: int, *axes: str | None) -> State:
    """A state with everything that plain Orbax can save; different in every leaf at every step."""
    place, everywhere = NamedSharding(mesh, P(*axes or ("fsdp",))), NamedSharding(mesh, P())
    params = {
        "params": {
            "w": jax.device_put(jnp.arange(64.0).reshape(8, 8) + step, place),
            "b": jax.device_put((jnp.arange(8) + step).astype(jnp.bfloat16), everywhere),
        }
    }
    return State(
        step=jax.device_put(jnp.int32(step), everywhere),
        params=params,
        opt_state=jax.tree.map(
            lambda x: jax.device_put(x + step, x.sharding if x.ndim else everywhere),
            optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params),
        ),
        key=jax.device_put(jax.random.key(step, impl="rbg"), everywhere),
        note=f"step {step}",
    )


NAMES = ocp.path.step.standard_name_format(step_prefix="ck", step_format_fixed_length=6)
OPTIONS = CheckpointManagerOptions(
    local=LocalCheckpointOptions(save_interval_steps=1, max_to_keep=1),
    persistent=PersistentCheckpointOptions(save_interval_steps=10, max_to_keep=4),
    step_name_format=NAMES,
)


def plain_manager(root: Path, item: str, **formats: Any) -> ocp.CheckpointManager:
    """Plain Orbax's manager on `root`, as its users and MaxText make it."""
    options = ocp.CheckpointManagerOptions(step_name_format=NAMES)
    handlers = {item: ocp.PyTreeCheckpointHandler(**formats)}
    return ocp.CheckpointManager(root, options=options, item_handlers=handlers)


def write_plain(root: Path, mesh: Mesh, item: str, steps: list[int], **formats: Any) -> None:
    with plain_manager(root, item, **formats) as plain:
        for step in steps:
            saved = ocp.args.PyTreeSave(state_at(mesh, step))
            plain.save(step, args=ocp.args.Composite(**{item: saved}), force=True)


@pytest.mark.parametrize(
    ("item", "formats"),
    [
        ("default", {}),
        ("items", {"use_zarr3": True}),
        ("items", {"use_ocdbt": False}),
        ("state", {"use_ocdbt": False, "use_zarr3": True}),
    ],
)
def test_a_directory_of_plain_orbax_is_continued_and_stays_one(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, item: str, formats: dict[str, Any]
) -> None:
    root = tmp_path / "bucket"
    write_plain(root, mesh, item, [10, 20, 30], **formats)
    with CheckpointManager(ramdisk, root, mesh, state_at(mesh, 0, None, "fsdp"), options=OPTIONS) as manager:
        assert list(manager.all_steps()) == [10, 20, 30]
        assert manager.latest_step() == 30
        assert not manager.should_save(30)
        restored = manager.restore_or_init(lambda: pytest.fail("there is a step to restore"))
        assert restored.step == 30
        assert_same(restored.state, state_at(mesh, 30, None, "fsdp"))
        for step in (40, 50):
            assert manager.save(step, state_at(mesh, step, None, "fsdp"))
            manager.wait_until_finished()
        manager.check_for_errors()
        assert list(manager.all_steps()) == [20, 30, 40, 50], "retention counts the steps of both"

    with plain_manager(root, item) as plain:
        assert list(plain.all_steps()) == [20, 30, 40, 50]
        assert plain.latest_step() == 50
        for step in (20, 50):
            wanted = state_at(mesh, step)
            args = ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted))
            assert_same(plain.restore(step, args=ocp.args.Composite(**{item: args}))[item], wanted)
        plain.save(60, args=ocp.args.Composite(**{item: ocp.args.PyTreeSave(state_at(mesh, 60))}))

    with CheckpointManager(ramdisk, root, mesh, state_at(mesh, 0), options=OPTIONS) as manager:
        assert manager.latest_step() == 50, "what another program adds is older than what the run saved"
        assert_same(manager.restore(60)["state"], state_at(mesh, 60))


def test_an_old_step_of_another_program_is_restored_on_request_and_newer_ones_of_ours_are_void(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    root = tmp_path / "bucket"
    write_plain(root, mesh, "items", [10, 20])
    abstract = state_at(mesh, 0)
    with CheckpointManager(ramdisk, root, mesh, abstract, options=OPTIONS) as manager:
        manager.restore(None)
        assert manager.save(30, state_at(mesh, 30))
    with CheckpointManager(ramdisk, root, mesh, abstract, options=OPTIONS) as manager:
        assert list(manager.all_steps()) == [10, 20, 30]
        assert_same(manager.restore(10)["state"], state_at(mesh, 10))
        assert list(manager.all_steps()) == [10, 20, 30]
        assert manager.save(11, state_at(mesh, 11))
        manager.wait_until_finished()
        assert list(manager.all_steps()) == [10, 11, 20], "what another program wrote is never void"
        assert manager.latest_step() == 11
    with CheckpointManager(ramdisk, root, mesh, abstract, options=OPTIONS) as manager:
        assert manager.restore_or_init(dict).step == 11, "older than any step of the run, whatever its number"
        assert_same(manager.restore(20)["state"], state_at(mesh, 20))


def test_a_step_of_another_program_that_is_in_the_way_is_neither_replaced_nor_silent(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    root = tmp_path / "bucket"
    write_plain(root, mesh, "default", [10, 20])
    with CheckpointManager(ramdisk, root, mesh, state_at(mesh, 0), options=OPTIONS) as manager:
        manager.restore(10)
        manager.save(20, state_at(mesh, 1020))
        with pytest.raises(Exception, match="ck_000020 holds step 20"):
            manager.wait_until_finished()
    with plain_manager(root, "default") as plain:
        found = plain.restore(20)["default"]
    assert found["note"] == "step 20"


@pytest.mark.parametrize("saved", [7, "array"])
@pytest.mark.parametrize("wanted", [0, "array"])
def test_the_step_of_a_train_state_may_be_a_number_or_an_array(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, saved: Any, wanted: Any
) -> None:
    array = jax.device_put(jnp.int32(7), NamedSharding(mesh, P()))
    root = tmp_path / "bucket"
    with plain_manager(root, "items") as plain:
        step = array if saved == "array" else saved
        plain.save(1, args=ocp.args.Composite(items=ocp.args.PyTreeSave({"step": step, "w": jnp.ones(3)})))
    abstract = {"step": array if wanted == "array" else wanted, "w": jnp.zeros(3)}
    with CheckpointManager(ramdisk, root, mesh, abstract, options=OPTIONS) as manager:
        found = manager.restore(None)["state"]["step"]
        assert_same(found, array if wanted == "array" else 7)
        manager.save(2, {"step": found, "w": jnp.zeros(3)})
        manager.wait_until_finished()
        manager.check_for_errors()
    with CheckpointManager(ramdisk, root, mesh, abstract, options=OPTIONS) as manager:
        assert_same(manager.restore(2)["state"]["step"], found)


def test_a_state_that_others_saved_differently_names_every_leaf(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    root = tmp_path / "bucket"
    with plain_manager(root, "items") as plain:
        saved = {"a": jnp.zeros(3), "b": "text", "c": jnp.int8(1), "d": 0.5}
        plain.save(1, args=ocp.args.Composite(items=ocp.args.PyTreeSave(saved)))
    wanted = {"a": jnp.zeros(4), "b": jnp.zeros(1), "c": jnp.int8(1), "d": jnp.int32(0), "e": "text"}
    with (
        CheckpointManager(ramdisk, root, mesh, wanted, options=OPTIONS) as manager,
        pytest.raises(StateMismatchError) as caught,
    ):
        manager.restore(None)
    for line in (
        "a: saved float32[3], wanted float32[4]",
        "b: saved the str 'text', wanted float32[1]",
        "d: saved the float 0.5, wanted int32[]",
        "e: saved nothing, wanted a value",
    ):
        assert line in str(caught.value)
    assert "c: " not in str(caught.value)


def test_steps_that_plain_orbax_adds_between_two_lives_are_counted(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    root = tmp_path / "bucket"
    abstract = state_at(mesh, 0)
    with CheckpointManager(ramdisk, root, mesh, abstract, options=OPTIONS) as manager:
        manager.save(10, state_at(mesh, 10))
    write_plain(root, mesh, "default", [20])
    with CheckpointManager(ramdisk, root, mesh, abstract, options=OPTIONS) as manager:
        assert list(manager.all_steps()) == [10, 20]
        assert manager.restore_or_init(dict).step == 10
        assert_same(manager.restore(20)["state"], state_at(mesh, 20))
        manager.save(21, state_at(mesh, 21))
    with CheckpointManager(ramdisk, root, mesh, abstract, options=OPTIONS) as manager:
        assert manager.restore_or_init(dict).step == 21
        np.testing.assert_array_equal(
            jax.random.key_data(manager.restore(20)["state"].key), jax.random.key_data(state_at(mesh, 20).key)
        )
