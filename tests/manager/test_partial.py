"""Partial restores: some leaves of a step, from every tier, and nothing else changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt import CheckpointManager, LocalCheckpointOptions, PersistentCheckpointOptions
from emergency_ckpt.errors import ConfigError, NoRestorableStepError, StateMismatchError
from tests.manager.states import OPTIONS, Opener, assert_same, make_state, save_all

BARE = jax.ShapeDtypeStruct((8, 4), jnp.float32)


def part(item: Any, **changes: Any) -> ocp.args.Composite:
    return ocp.args.Composite(state=ocp.args.PyTreeRestore(item=item, partial_restore=True, **changes))


def abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x
        ),
        tree,
    )


def lose_ramdisk(ramdisk: Path) -> None:
    for manifest in ramdisk.rglob("*.manifest"):
        manifest.unlink()


def wanted_of(state: Any) -> dict[str, Any]:
    """Leaves of several kinds, in a tree of their own."""
    return {
        "params": {"layers": state.params["layers"], "w": state.params["w"]},
        "key": state.key,
        "note": state.note,
        "host": state.host,
    }


@pytest.mark.parametrize("tier", ["ramdisk", "persistent"])
def test_only_the_leaves_of_the_subtree_come_back(opened: Opener, mesh: Mesh, ramdisk: Path, tier: str) -> None:
    save_all(opened(), mesh, range(1, 6))
    if tier == "persistent":
        opened().close()
        lose_ramdisk(ramdisk)
    manager = opened()
    right = wanted_of(make_state(mesh, 5))
    assert_same(manager.restore(5, part(abstract(right)))["state"], right)
    assert manager.last_restore is not None
    assert manager.last_restore.source == ("own slot" if tier == "ramdisk" else "persistent")
    whole = sum(e.nbytes for e in manager._engine.job.layout.slot_entries(0))
    assert 0 < manager.last_restore.bytes < whole


def test_leaves_without_a_sharding_take_that_of_the_managers_state(opened: Opener, mesh: Mesh) -> None:
    save_all(opened(), mesh, range(1, 3))
    restored = opened().restore(None, part({"params": {"w": BARE}}))["state"]
    assert_same(restored, {"params": {"w": make_state(mesh, 2).params["w"]}})


@pytest.mark.parametrize("form", [ocp.args.PyTreeRestore, ocp.args.StandardRestore])
def test_placeholders_are_skipped_and_stay_in_their_place(
    opened: Opener, mesh: Mesh, form: Callable[..., Any]
) -> None:
    save_all(opened(), mesh, range(1, 3))
    item = {"params": {"w": BARE, "layers": [ocp.PLACEHOLDER, ocp.PLACEHOLDER]}, "note": ""}
    restored = opened().restore(None, ocp.args.Composite(state=form(item)))["state"]
    assert restored["params"]["layers"] == [..., ...]
    assert restored["note"] == "step 2"
    np.testing.assert_array_equal(restored["params"]["w"], make_state(mesh, 2).params["w"])


def test_without_an_item_the_whole_state_is_read_and_nothing_else_changes(opened: Opener, mesh: Mesh) -> None:
    save_all(opened(), mesh, range(1, 5))
    manager = opened()
    assert_same(manager.restore(1, part(None))["state"], make_state(mesh, 1))
    assert_same(manager.restore(None)["state"], make_state(mesh, 4))


def test_an_older_step_is_read_in_the_middle_of_a_run_and_voids_nothing(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    local = LocalCheckpointOptions(save_interval_steps=1, max_to_keep=2)
    options = dataclasses.replace(OPTIONS, local=local)
    manager = opened(options=options)
    manager.restore_or_init(dict)
    generation = manager.generation
    for step in range(1, 12):
        assert manager.save(step, make_state(mesh, step)), step
        if step > 1:  # With the save of this step still on its way.
            newest = manager.restore(None, part({"note": "", "params": {"w": BARE}}))["state"]
            assert newest["note"] == f"step {step}"
            older = manager.restore(step - 1, part({"params": {"w": BARE}}))["state"]
            np.testing.assert_array_equal(older["params"]["w"], make_state(mesh, step - 1).params["w"])
    manager.wait_until_finished()
    manager.check_for_errors()
    assert manager.generation == generation
    assert manager.metrics_snapshot()["saves_complete"] == 11
    assert list(manager.all_steps()) == [1, 5, 8, 9, 10, 11]
    assert len(list((tmp_path / "bucket/emergency_ckpt/generations").iterdir())) == 1
    assert opened(options=options).restore_or_init(dict).step == 11


def test_training_goes_on_from_the_newest_step_after_a_part_of_an_older_one_was_read(
    opened: Opener, mesh: Mesh
) -> None:
    save_all(opened(), mesh, range(1, 5))
    manager = opened()
    manager.restore(1, part({"note": ""}))
    assert not manager.should_save(2)
    assert save_all(manager, mesh, range(3, 9)) == [5, 6, 8]
    assert opened().latest_step() == 8


@pytest.mark.parametrize("how", ["item", "restore_args", "mesh_axes"])
def test_another_sharding_is_read_as_boxes_of_the_persistent_tier(opened: Opener, mesh: Mesh, how: str) -> None:
    save_all(opened(), mesh, range(1, 6))
    manager = opened()
    other = Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("x", "y"))
    place = NamedSharding(other, P(None, "y"))
    item: Any = {"params": {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=place)}, "note": ""}
    changes = {}
    if how != "item":
        item["params"]["w"] = BARE
        by_sharding = ocp.ArrayRestoreArgs(sharding=place)
        by_axes = ocp.ArrayRestoreArgs(mesh=other, mesh_axes=P(None, "y"))
        asked = by_sharding if how == "restore_args" else by_axes
        changes["restore_args"] = {"params": {"w": asked}, "note": ocp.RestoreArgs()}
    restored = manager.restore(5, part(item, **changes))["state"]
    assert restored["params"]["w"].sharding == place
    np.testing.assert_array_equal(restored["params"]["w"], make_state(mesh, 5).params["w"])
    assert restored["note"] == "step 5"
    assert manager.last_restore is not None
    assert manager.last_restore.source == "own slot, 1 leaves persistent"


def test_a_numpy_array_on_request(opened: Opener, mesh: Mesh) -> None:
    save_all(opened(), mesh, range(1, 6))
    args = {"params": {"w": ocp.RestoreArgs(restore_type=np.ndarray)}}
    found = opened().restore(5, part({"params": {"w": BARE}}, restore_args=args))["state"]["params"]["w"]
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, make_state(mesh, 5).params["w"])


def test_another_sharding_of_a_step_that_is_on_the_ramdisk_only_says_what_is_possible(
    opened: Opener, mesh: Mesh
) -> None:
    save_all(opened(), mesh, range(1, 7))
    item = {
        "params": {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P()))},
        "more": jax.ShapeDtypeStruct((3,), jnp.int8),
        "note": "",
    }
    with pytest.raises(StateMismatchError) as caught:
        opened().restore(None, part(item))
    said = str(caught.value)
    assert "step 6 (generation 1) is on the ramdisks only" in said
    assert "params.w: this manager's state has it as NamedSharding" in said
    assert "more: this manager's state has no such leaf" in said
    assert "note" not in said
    assert "restore one of the steps [1, 5]" in said


def test_every_leaf_that_the_checkpoint_lacks_is_named(opened: Opener, mesh: Mesh) -> None:
    save_all(opened(), mesh, range(1, 6))
    item = {
        "params": {"w": jax.ShapeDtypeStruct((8, 5), jnp.float32), "v": BARE},
        "note": BARE,
        "rate": 0.0,
        "text": "",
    }
    manager = opened()
    with pytest.raises(StateMismatchError) as caught:
        manager.restore(5, part(item))
    said = str(caught.value)
    for line in (
        "params.v: saved nothing, wanted float32[8, 4]",
        "params.w: saved float32[8, 4], wanted float32[8, 5]",
        "note: saved the str 'step 5', wanted float32[8, 4]",
        "text: saved nothing, wanted a value",
    ):
        assert line in said
    assert "rate:" not in said
    assert_same(manager.restore(None)["state"], make_state(mesh, 5))


def test_leaves_that_only_the_checkpoint_has_are_read_from_it(opened: Opener, mesh: Mesh) -> None:
    save_all(opened(), mesh, range(1, 6))
    smaller = {"params": {"w": make_state(mesh, 0).params["w"]}}
    item = {"params": {"w": BARE}, "key": abstract(make_state(mesh, 0).key), "note": ""}
    restored = opened(smaller).restore(5, part(item))["state"]
    right = make_state(mesh, 5)
    assert_same(restored, {"params": {"w": right.params["w"]}, "key": right.key, "note": "step 5"})


@pytest.mark.parametrize("seen_by", ["the survey", "the restore"])
def test_a_damaged_step_is_passed_over(opened: Opener, mesh: Mesh, seen_by: str) -> None:
    local = LocalCheckpointOptions(save_interval_steps=1, max_to_keep=2)
    options = dataclasses.replace(OPTIONS, local=local, persistent=PersistentCheckpointOptions(1000))
    manager = opened(options=options)
    save_all(manager, mesh, range(1, 5))
    if seen_by == "the restore":  # What was whole when the manager started is not looked at again before.
        manager = opened(options=options)
    flip(manager, 4, "params.w")
    restored = manager.restore(None, part({"params": {"w": BARE}}))["state"]
    np.testing.assert_array_equal(restored["params"]["w"], make_state(mesh, 3).params["w"])


def test_damage_in_a_leaf_that_is_not_wanted_does_no_harm(opened: Opener, mesh: Mesh) -> None:
    save_all(opened(), mesh, range(1, 5))
    manager = opened()
    flip(manager, 4, "params.w")
    assert manager.restore(4, part({"note": "", "host": make_state(mesh, 0).host}))["state"]["note"] == "step 4"
    assert manager.restore_or_init(dict).step == 2


def flip(manager: CheckpointManager, step: int, leaf: str) -> None:
    """Flips one bit of each shard of a leaf on the ramdisk."""
    job = manager._engine.job
    slot = next(job.local.sealed(held) for held in job.local.sealed_steps() if held.step == step)
    assert slot is not None
    for entry in job.layout.slot_entries(0):
        if job.layout.shards[entry.shard].leaf == leaf:
            slot.shard(entry.shard)[0] ^= 1


def test_a_damaged_persistent_step_is_passed_over_also_for_another_sharding(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 6))
    for path in (tmp_path / "bucket/5/default").rglob("d/*"):
        path.write_bytes(bytes(path.stat().st_size))
    item = {"params": {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P()))}}
    restored = manager.restore(None, part(item))["state"]
    np.testing.assert_array_equal(restored["params"]["w"], make_state(mesh, 1).params["w"])
    assert manager.latest_step() == 5


def test_only_the_wanted_boxes_of_the_persistent_tier_are_read(
    opened: Opener, mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    """Shown by a checkpoint of which nothing else is left."""
    state = {"a": make_state(mesh, 0).params["w"], "b": jnp.zeros((1000, 8))}
    with ocp.CheckpointManager(
        tmp_path / "bucket", item_handlers=ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    ) as plain:
        plain.save(3, args=ocp.args.PyTreeSave(state))
    for path in (tmp_path / "bucket/3/default/b").iterdir():
        if path.name != ".zarray":
            path.unlink()
    manager = opened(state)
    assert_same(manager.restore(3, part({"a": BARE}))["state"], {"a": state["a"]})
    with pytest.raises(NoRestorableStepError):
        manager.restore(3)


def test_a_persistent_only_manager_restores_parts(mesh: Mesh, tmp_path: Path) -> None:
    with CheckpointManager(None, tmp_path / "bucket", mesh, make_state(mesh, 0), options=OPTIONS) as manager:
        save_all(manager, mesh, range(1, 6))
        assert manager.restore(1, part({"note": ""}))["state"] == {"note": "step 1"}
        assert manager.restore(None, part({"note": ""}))["state"] == {"note": "step 5"}


def test_transformations_are_refused_by_name(opened: Opener, mesh: Mesh) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 3))
    with pytest.raises(ConfigError, match="transforms"):
        manager.restore(None, part({"note": ""}, transforms={}))


def test_a_part_of_a_step_that_is_nowhere_is_refused(opened: Opener, mesh: Mesh) -> None:
    with pytest.raises(NoRestorableStepError, match="No step can be restored"):
        opened().restore(None, part({"note": ""}))
    manager = opened()
    save_all(manager, mesh, range(1, 3))
    with pytest.raises(NoRestorableStepError, match=r"Step 7 cannot be restored.*newest restorable step is 2"):
        manager.restore(7, part({"note": ""}))
