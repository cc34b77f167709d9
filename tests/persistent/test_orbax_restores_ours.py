"""Plain Orbax, with no code of ours, restores what we write, bit for bit; and its manager works on our root."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emergency_ckpt.jaxio.layouts import build_layout
from emergency_ckpt.jaxio.orbax_metadata import layout_metadata_files
from emergency_ckpt.jaxio.state import LeafKind, flatten
from emergency_ckpt.jaxio.topology import Topology
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.attempts import Attempt, StepNames
from emergency_ckpt.persistent.committer import StepContent
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.saving import assert_same, read_shards, save

DTYPES = (
    *("float32", "bfloat16", "float16", "int32", "int8", "uint32", "int4", "int2"),
    *("float8_e4m3fn", "float8_e5m2", "bool", "complex64"),
)


class Pair(NamedTuple):
    first: Any
    second: Any


@flax.struct.dataclass
class Stats:
    mean: Any
    name: str = flax.struct.field(pytree_node=False)


def mesh_of(*shape: int) -> Mesh:
    count = int(np.prod(shape))
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), ("replica", "data"))


def place(array: Any, *spec: Any, shape: tuple[int, int] = (2, 4)) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh_of(*shape), PartitionSpec(*spec)))


def rich_state(with_strings: bool) -> dict[str, Any]:
    """Every kind of leaf and of node that a training state has."""
    params = {"w": place(jnp.arange(128.0).reshape(16, 8), "data"), "layers": [jnp.ones(3), (jnp.zeros(2),)]}
    state = {
        "params": params,
        "opt": optax.adam(1e-3).init({"w": params["w"]}),
        "train": TrainState.create(apply_fn=len, params={"k": jnp.full(4, 2.0)}, tx=optax.sgd(0.1, 0.9)),
        "stats": Stats(jnp.float32(3), "x"),
        "model": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param),
        "keys": {"one": jax.random.key(7), "many": jax.random.split(jax.random.key(1, impl="rbg"), 4)},
        "pair": Pair(jnp.ones(2), None),
        "nothing": None,
        "empty": {"dict": {}, "list": [], "tuple": ()},
        "numpy": np.arange(5, dtype=np.int64),
        "count": jnp.int32(9),
        "step": 7,
        "rate": 0.1,
        "flag": True,
        "dtypes": {name: place(jnp.arange(16).reshape(8, 2).astype(name), "data") for name in DTYPES},
    }
    return {**state, "name": "run"} if with_strings else state


def stored_arrays(state: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays as we store them, and the values, by leaf name."""
    arrays, values = {}, {}
    for leaf, data in zip(flatten(state).leaves, jax.tree_util.tree_leaves(state), strict=True):
        if leaf.kind is LeafKind.VALUE:
            values[leaf.name] = data
        else:
            arrays[leaf.name] = np.asarray(
                jax.random.key_data(data) if leaf.kind is LeafKind.PRNG_KEY else data
            )
    return arrays, values


def write(
    root: Path,
    state: Any,
    step: int,
    item: str,
    content: dict[str, Any] | None = None,
    prefix: str | None = None,
    layout_of: Any = None,
) -> PersistentStore:
    """`layout_of`: the abstract state of the manager, where it is another than the state."""
    store = PersistentStore(root, StepNames(prefix))
    generation = store.newest_generation() or store.mint_generation(0, None)
    known = state if layout_of is None else layout_of
    layout = build_layout(known, Topology.single_process(), layout_metadata_files(known, item))
    arrays, values = stored_arrays(state)
    save(store, Attempt(generation, step, item), arrays, StepContent(values, **content or {}), layout)
    return store


def assert_equal_states(found: Any, expected: Any) -> None:
    found_arrays, found_values = stored_arrays(found)
    expected_arrays, expected_values = stored_arrays(expected)
    assert_same(found_arrays, expected_arrays)
    assert found_values == expected_values


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x
        ),
        state,
    )


@pytest.mark.parametrize("item", ["default", "state"])
def test_the_plain_checkpointer_restores_a_state_of_every_kind_of_leaf(tmp_path: Path, item: str) -> None:
    state = rich_state(with_strings=False)
    write(tmp_path, state, 3, item)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "3" / item, abstract(state))
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert_equal_states(restored, state)
        assert restored["params"]["w"].sharding == state["params"]["w"].sharding
        without_target = checkpointer.restore(tmp_path / "3" / item)
        assert_equal_states(without_target, state)
        assert without_target["empty"] == {"dict": {}, "list": [], "tuple": ()}
        assert without_target["keys"]["many"].dtype == state["keys"]["many"].dtype


def test_the_plain_manager_restores_lists_and_describes_our_steps(tmp_path: Path) -> None:
    state = rich_state(with_strings=True)
    write(tmp_path, state, 3, "default")
    later = {**state, "step": 8}
    write(tmp_path, later, 5, "default", {"metrics": {"loss": 0.5}, "custom_metadata": {"note": "hi"}})
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [3, 5]
        assert manager.latest_step() == 5
        assert_equal_states(manager.restore(5), later)
        target = ocp.args.PyTreeRestore(abstract(state))
        restored = manager.restore(3, args=target)
        assert_equal_states(restored, state)
        metadata = manager.metadata(5)
        assert metadata.custom_metadata == {"note": "hi"}
        assert metadata.commit_timestamp_nsecs >= metadata.init_timestamp_nsecs > 0
        assert manager.metrics(5) == {"loss": 0.5}


def test_the_plain_manager_restores_onto_another_mesh(tmp_path: Path) -> None:
    state = {name: place(jnp.arange(64).reshape(16, 4).astype(name), "data") for name in DTYPES}
    write(tmp_path, state, 1, "state")
    other = NamedSharding(mesh_of(4, 2), PartitionSpec("data", "replica"))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=other), state)
    with ocp.CheckpointManager(tmp_path, item_names=("state",)) as manager:
        restored = manager.restore(1, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))
    assert_equal_states(restored["state"], state)
    assert {x.sharding for x in restored["state"].values()} == {other}


def test_the_plain_manager_saves_on_top_of_our_steps_and_its_cleaning_spares_our_records(
    tmp_path: Path,
) -> None:
    state = {"w": place(jnp.arange(16.0), "data")}
    store = write(tmp_path, state, 1, "default")
    generation = store.newest_generation()
    assert generation
    store.begin(Attempt(generation, 2, "default"))
    options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True, max_to_keep=2)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert manager.all_steps() == [1]
        for step in (2, 3):
            manager.save(step, args=ocp.args.StandardSave({"w": state["w"] * step}))
        manager.wait_until_finished()
        assert sorted(manager.all_steps()) == [2, 3]
    again = PersistentStore(tmp_path)
    assert again.newest_generation() == generation
    assert again.run_id() == store.run_id()
    assert [(s.step_id.generation, s.step_id.step, s.item) for s in again.steps()] == [
        (0, 2, "default"),
        (0, 3, "default"),
    ]


def test_step_directories_may_have_a_prefix(tmp_path: Path) -> None:
    state = {"w": place(jnp.arange(16.0), "data")}
    write(tmp_path, state, 4, "default", prefix="ckpt")
    names = ocp.path.step.standard_name_format(step_prefix="ckpt")
    options = ocp.CheckpointManagerOptions(step_name_format=names)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert manager.all_steps() == [4]
        assert_equal_states(manager.restore(4), state)


def test_a_compressed_checkpoint_of_small_chunks_and_files_is_restored(tmp_path: Path) -> None:
    state = {"w": place(jax.random.normal(jax.random.key(0), (64, 32)), "data"), "z": jnp.zeros((8, 8))}
    store = PersistentStore(tmp_path)
    layout = build_layout(state, Topology.single_process(), layout_metadata_files(state, "default"))
    options = WriteOptions(
        concurrent_bytes=4096, max_chunk_bytes=500, compression="zstd", target_data_file_bytes=10_000
    )
    arrays, _ = stored_arrays(state)
    save(store, Attempt(store.mint_generation(0, None), 1, "default"), arrays, None, layout, options)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_equal_states(checkpointer.restore(tmp_path / "1" / "default", abstract(state)), state)
    assert_same(read_shards(StepReader(tmp_path / "1")), arrays)


def test_what_orbax_itself_would_refuse_is_restored_by_us_and_harms_nobody(tmp_path: Path) -> None:
    """Zero-size arrays and the unsigned sub-byte dtypes, which TensorStore does not have."""
    state = {"none": jnp.zeros((0, 3)), "u4": jnp.arange(8, dtype=jnp.uint4), "w": jnp.arange(4.0)}
    write(tmp_path, state, 1, "default")
    arrays, _ = stored_arrays(state)
    reader = StepReader(tmp_path / "1")
    assert reader.leaves["u4"].dtype == "uint4"
    assert_same(read_shards(reader), arrays)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "1" / "default")
        assert found["none"].shape == (0, 3)
        assert found["u4"].dtype == np.uint8
        assert found["u4"].tolist() == list(range(8))
        wanted = {**abstract(state), "u4": jax.ShapeDtypeStruct((8,), jnp.uint8, sharding=state["u4"].sharding)}
        restored = checkpointer.restore(tmp_path / "1" / "default", wanted)
        assert_equal_states(restored, {**state, "u4": state["u4"].astype(jnp.uint8)})


def test_the_metadata_is_what_orbax_writes_for_the_same_state(tmp_path: Path) -> None:
    """But for the shapes of pieces, since Orbax also splits shards between replicas."""
    state = rich_state(with_strings=True)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.PyTreeSave(state))
    ours = layout_metadata_files(state, "default")
    theirs = {name: (tmp_path / "1/default" / name).read_bytes() for name in ours if name[1:2] != "C"}
    theirs["_CHECKPOINT_METADATA"] = (tmp_path / "1/_CHECKPOINT_METADATA").read_bytes()
    for name in ("_METADATA", "_sharding"):
        assert without_pieces(json.loads(ours[name])) == without_pieces(
            {**json.loads(theirs[name]), **({"use_zarr3": True} if name == "_METADATA" else {})}
        )
    name = "array_metadatas/process_0"
    found, expected = (
        sorted(map(str, without_pieces(json.loads(files[name]))["array_metadatas"])) for files in (ours, theirs)
    )
    assert found == expected
    assert json.loads(ours["_CHECKPOINT_METADATA"]).keys() == json.loads(theirs["_CHECKPOINT_METADATA"]).keys()


def without_pieces(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: without_pieces(v) for k, v in tree.items() if k not in ("write_shape", "chunk_shape")}
    return [without_pieces(v) for v in tree] if isinstance(tree, list) else tree
