"""Live states are recognised, and refused by the name of the leaf that does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt.core.shards import dtype_of
from emergency_ckpt.errors import StateMismatchError, UnsupportedStateError
from emergency_ckpt.jaxio.binding import StateBinder
from emergency_ckpt.jaxio.layouts import build_layout
from emergency_ckpt.jaxio.state import flatten
from emergency_ckpt.jaxio.topology import Topology
from tests.jaxio.memory_slot import abstract
from tests.jaxio.states import dtypes_state, filled, kinds_state, mesh, shardings_state


def binder_for(state):
    layout = build_layout(state, Topology.single_process())
    return StateBinder(state, layout, 0), layout


@pytest.mark.parametrize("make", [dtypes_state, shardings_state, kinds_state])
def test_every_shard_is_bound_once_in_the_order_of_the_slot_to_its_part_of_the_leaf(make):
    state = make()
    binder, layout = binder_for(abstract(state))
    bound = binder.bind(state)
    assert [b.shard for b in bound.buffers] == list(layout.process_shards[0])
    wholes = dict(zip((leaf.name for leaf in flatten(state).leaves), jax.tree.leaves(state), strict=True))
    for buffer in bound.buffers:
        whole = wholes[buffer.leaf]
        if isinstance(whole, jax.Array) and jnp.issubdtype(whole.dtype, jax.dtypes.prng_key):
            whole = jax.random.key_data(whole)
        shard = layout.shards[buffer.shard]
        assert shard.leaf == buffer.leaf
        expected = np.asarray(whole)[shard.box.slices()]
        assert np.asarray(buffer.data).tobytes() == expected.tobytes()
        assert np.asarray(buffer.data).dtype == dtype_of(layout.leaf[shard.leaf].dtype)


def test_replicas_within_the_process_are_bound_once():
    state = {"w": filled((8, 4), "float32", NamedSharding(mesh(), P("data")))}
    binder, _ = binder_for(state)
    assert [b.data.shape for b in binder.bind(state).buffers] == [(4, 4), (4, 4)]


def test_values_are_bound_as_json_and_may_change_their_type():
    binder, _ = binder_for({"step": 0, "name": "a"})
    assert binder.bind({"step": np.float32(0.5), "name": "b"}).values == {"step": 0.5, "name": "b"}


def test_a_new_optimizer_in_a_train_state_is_the_same_structure():
    def create():
        params = {"w": jnp.ones((2, 2))}
        return train_state.TrainState.create(apply_fn=lambda x: x, params=params, tx=optax.adam(1e-3))

    first, second = create(), create()
    assert jax.tree.structure(first) != jax.tree.structure(second)
    binder, layout = binder_for(first)
    assert len(binder.bind(second).buffers) == len(layout.shards)
    assert len(binder.bind(first).buffers) == len(layout.shards)


def test_another_mesh_order_that_holds_the_same_boxes_is_followed():
    state = {"w": filled((8, 4), "float32", NamedSharding(mesh(), P("model")))}
    binder, layout = binder_for(state)
    turned = Mesh(np.array(jax.devices())[::-1].reshape(2, 4), ("data", "model"))
    moved = jax.device_put(np.asarray(state["w"]), NamedSharding(turned, P("model")))
    for state_now in (state, {"w": moved}, state):
        for buffer in binder.bind(state_now).buffers:
            box = layout.shards[buffer.shard].box
            np.testing.assert_array_equal(np.asarray(buffer.data), np.asarray(moved)[box.slices()])


def test_a_numpy_array_may_stand_for_an_array_that_lies_on_one_device():
    binder, _ = binder_for({"w": jnp.ones((2, 3))})
    (buffer,) = binder.bind({"w": np.zeros((2, 3), np.float32)}).buffers
    assert isinstance(buffer.data, np.ndarray)


CUT = NamedSharding(mesh(), P("data"))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (
            lambda: filled((8, 8), "float32", CUT),
            r"'w': found array float32\[8, 8\].*has array float32\[8, 4\]",
        ),
        (lambda: filled((8, 4), "bfloat16", CUT), r"'w': found array bfloat16\[8, 4\].*float32\[8, 4\]"),
        (lambda: filled((8, 4), "float32", NamedSharding(mesh(), P("model"))), "'w' is cut differently"),
        (lambda: np.zeros((8, 4), np.float32), "'w' is cut differently"),
        (lambda: 1.0, "'w': found value of type float"),
        (lambda: jax.random.key(0), "'w': found typed PRNG key"),
    ],
)
def test_a_leaf_that_does_not_fit_is_named_with_both_sides(leaf, message):
    fits = {"w": filled((8, 4), "float32", CUT)}
    binder, _ = binder_for(fits)
    for _ in range(2):
        with pytest.raises(StateMismatchError, match=message):
            binder.bind({"w": leaf()})
        assert len(binder.bind(fits).buffers) == 2


def test_another_implementation_of_a_key_is_refused():
    binder, _ = binder_for({"k": jax.random.key(0, impl="rbg")})
    with pytest.raises(StateMismatchError, match=r"'k'.*unsafe_rbg.*has typed PRNG key \(rbg\)"):
        binder.bind({"k": jax.random.key(0, impl="unsafe_rbg")})


@pytest.mark.parametrize(
    "leaf",
    [
        lambda: jnp.zeros((1,), jnp.int32),
        lambda: jax.random.key(0),
        lambda: np.zeros(1),
        lambda: "text",
        lambda: b"",
    ],
)
def test_what_could_not_be_restored_as_the_value_it_stands_for_is_refused(leaf):
    binder, _ = binder_for({"step": 0})
    with pytest.raises(StateMismatchError, match=r"'step': found .*has value of type int"):
        binder.bind({"step": leaf()})


def test_other_leaves_are_named():
    binder, _ = binder_for({"a": 1, "b": {"c": jnp.ones(1)}})
    with pytest.raises(StateMismatchError, match=r"missing b\.c, unexpected b\.d"):
        binder.bind({"a": 1, "b": {"d": jnp.ones(1)}})


@pytest.mark.parametrize(
    "make", [lambda: filled((8, 4), "float32", CUT), lambda: jnp.ones(2), lambda: jax.random.key(0)]
)
def test_a_deleted_array_is_named(make):
    leaf = make()
    binder, _ = binder_for({"params": {"w": leaf}})
    binder.bind({"params": {"w": leaf}})
    leaf.delete()
    with pytest.raises(UnsupportedStateError, match=r"'params\.w'.*deleted.*donated"):
        binder.bind({"params": {"w": leaf}})
