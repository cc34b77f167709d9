"""What the manager says of a saved step: its own tree, items and handlers, on any tier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt.errors import CorruptDataError, NoRestorableStepError
from tests.manager.states import Opener, make_state

Composite, JsonSave = ocp.args.Composite, ocp.args.JsonSave
PYTREE = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
JSON = "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler"


def shapes(tree: Any) -> Any:
    """Arrays as (shape, dtype), other leaves as they are."""
    return jax.tree.map(
        lambda x: (x.shape, str(x.dtype)) if isinstance(x, jax.ShapeDtypeStruct | jax.Array) else x, tree
    )


@pytest.mark.parametrize("tier", ["ramdisk", "persistent"])
def test_a_step_of_todays_state_is_told_leaf_by_leaf_with_its_own_values(
    opened: Opener, mesh: Mesh, ramdisk: Path, tier: str
) -> None:
    manager = opened()
    items = Composite(state=ocp.args.PyTreeSave(make_state(mesh, 5)), about=JsonSave({"a": 1}))
    manager.save(5, items, metrics={"loss": 1.0})
    manager.wait_until_finished()
    if tier == "persistent":
        manager.close()
        for path in ramdisk.rglob("*.manifest"):
            path.unlink()
        manager = opened()
    told, wanted = manager.item_metadata(5), make_state(mesh, 5)
    assert set(told.keys()) == {"state", "about"}
    assert told.about is None
    assert shapes(told.state.replace(host=None)) == shapes(wanted.replace(host=None))
    assert (told.state.host.shape, told.state.host.dtype) == (wanted.host.shape, wanted.host.dtype)
    assert told.state.params["w"].sharding == wanted.params["w"].sharding
    assert (told.state.note, told.state.rate) == ("step 5", 5 / 8), "its own values"
    metadata = manager.metadata(5)
    assert metadata.item_handlers == {"state": PYTREE, "about": JSON, "metrics": JSON}
    assert metadata.item_metadata == told
    restored = manager.restore(5, Composite(state=ocp.args.PyTreeRestore(told.state))).state
    assert restored.note == "step 5"


def other_state(mesh: Mesh) -> dict[str, Any]:
    place = NamedSharding(mesh, P("fsdp"))
    return {
        "w": jax.device_put(jnp.ones(16, jnp.bfloat16), place),
        "layers": [np.ones(2, np.int32), {"deep": jax.device_put(jnp.ones(8), place), "nothing": {}}],
        "key": jax.device_put(jax.random.key(3), NamedSharding(mesh, P())),
        "n": 7,
    }


OTHER = {
    "w": ((16,), "bfloat16"),
    "layers": [((2,), "int32"), {"deep": ((8,), "float32"), "nothing": {}}],
    "key": ((2,), "uint32"),
    "n": 7,
}


@pytest.mark.parametrize("writer", ["ours", "orbax", "orbax, one item"])
def test_a_step_of_another_state_is_told_as_it_was_saved(
    opened: Opener, mesh: Mesh, tmp_path: Path, writer: str
) -> None:
    state, handlers = other_state(mesh), {"state": PYTREE, "about": JSON}
    both = Composite(state=ocp.args.PyTreeSave(state), about=JsonSave({}))
    if writer == "ours":
        with opened(state) as manager:
            manager.save(5, both)
    else:
        args = both if writer == "orbax" else ocp.args.PyTreeSave(state)
        with ocp.CheckpointManager(tmp_path / "bucket") as plain:
            plain.save(5, args=args)
    if writer == "orbax, one item":
        del handlers["about"]
    today = {"w": state["w"], "other": jax.device_put(jnp.zeros(3), NamedSharding(mesh, P()))}
    manager = opened(today)
    told = manager.item_metadata(5)
    assert shapes(told.state) == OTHER
    assert told.state["w"].sharding == state["w"].sharding, "this leaf is the same today"
    assert told.state["layers"][1]["deep"].sharding is None
    assert set(told.keys()) == set(handlers)
    assert manager.metadata(5).item_handlers == handlers


def test_a_step_that_another_program_wrote_is_told_from_its_own_files_once_it_is_in_a_slot_too(
    mesh: Mesh, opened: Opener, tmp_path: Path
) -> None:
    state = {"w": make_state(mesh, 3).params["w"]}
    with ocp.CheckpointManager(tmp_path / "bucket") as plain:
        plain.save(3, args=Composite(state=ocp.args.StandardSave(state), about=JsonSave({})))
        plain.wait_until_finished()
        handler = plain.metadata(3).item_handlers["state"]
    manager = opened(state)
    manager.restore(3)
    assert manager.metadata(3).item_handlers == {"state": handler, "about": JSON}
    assert set(manager.item_metadata(3).keys()) == {"state", "about"}


def test_a_dataset_in_a_directory_of_its_own_is_an_item_too(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    manager = opened(persistent_non_replicated_directory=tmp_path / "datasets")
    large = JsonSave({"padding": "x" * 2**20})
    manager.save(5, Composite(state=ocp.args.PyTreeSave(make_state(mesh, 5)), dataset=large))
    manager.wait_until_finished()
    assert list(manager.item_metadata(5).keys()) == ["state", "dataset"]


def test_a_tree_that_cannot_be_read_hides_no_metrics(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    state = {"w": make_state(mesh, 3).params["w"]}
    with ocp.CheckpointManager(tmp_path / "bucket", item_names=("state",)) as plain:
        args = Composite(state=ocp.args.StandardSave(state))
        plain.save(3, args=args, custom_metadata={"by": "orbax"})
    (tmp_path / "bucket/3/state/_METADATA").write_text("{")
    manager = opened(state)
    with pytest.raises(CorruptDataError, match="_METADATA is damaged"):
        manager.item_metadata(3)
    metadata = manager.metadata(3)
    assert metadata.custom_metadata == {"by": "orbax"}
    assert dict(metadata.item_metadata.items()) == {"state": None}


def test_a_closed_manager_still_tells_of_committed_steps(opened: Opener, mesh: Mesh) -> None:
    manager = opened()
    for step in (5, 6, 10):
        manager.save(step, make_state(mesh, step), metrics={"loss": step}, custom_metadata={"n": step})
    manager.close()
    for step in (5, 10):
        assert manager.metrics(step) == {"loss": step}
        assert manager.metadata(step).custom_metadata == {"n": step}
        assert manager.item_metadata(step).state.note == f"step {step}"
    assert manager.best_step("loss", "min") == 5
    with pytest.raises(NoRestorableStepError, match="step 6 is on no tier"):
        manager.metrics(6)  # Its ramdisk may be another manager's by now.
