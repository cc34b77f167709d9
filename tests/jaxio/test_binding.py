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


def test_values_may_change_their_type_among_the_numbers_of_python():
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


MESH_WIDE = NamedSharding(mesh(), P())


@pytest.mark.parametrize(
    ("live", "saved"),
    [
        (lambda: jnp.int32(7), np.int32(7)),
        (lambda: jax.device_put(jnp.int32(7), MESH_WIDE), np.int32(7)),
        (lambda: jax.device_put(jnp.int32(7), MESH_WIDE.with_memory_kind("pinned_host")), np.int32(7)),
        (lambda: jnp.bfloat16(0.5), jnp.bfloat16(0.5).item()),
        (lambda: np.asarray(7), np.int64(7)),
        (lambda: np.int8(7), np.int8(7)),
        (lambda: True, True),
    ],
)
def test_a_number_in_an_array_may_stand_where_a_value_was(live, saved):
    state = {"step": 0, "w": jnp.ones(2)}
    binder, _ = binder_for(state)
    bound = binder.bind({**state, "step": live()})
    assert bound.values == {"step": saved}
    assert not isinstance(bound.values["step"], (np.ndarray, jax.Array))
    assert len(bound.buffers) == 1


@pytest.mark.parametrize(
    ("wanted", "live"),
    [
        (lambda: jnp.int32(0), 7),
        (lambda: jnp.int32(0), np.int64(7)),
        (lambda: jnp.int32(0), np.asarray(7.0)),
        (lambda: jax.ShapeDtypeStruct((), jnp.bfloat16, sharding=MESH_WIDE), 0.5),
        (lambda: np.zeros((), np.uint8), 255),
        (lambda: jnp.bool_(False), True),
        (lambda: jnp.complex64(0), 1),
    ],
)
def test_a_number_may_stand_where_a_0d_array_was(wanted, live):
    binder, layout = binder_for({"step": wanted()})
    (buffer,) = binder.bind({"step": live}).buffers
    assert isinstance(buffer.data, np.ndarray)
    assert buffer.data.dtype == dtype_of(layout.leaves[0].dtype)
    assert buffer.data.shape == ()
    assert buffer.data == live


@pytest.mark.parametrize(
    ("wanted", "live"),
    [
        (lambda: jnp.int32(0), 2**31),
        (lambda: jnp.int32(0), 0.5),
        (lambda: jnp.uint8(0), -1),
        (lambda: jnp.float32(0), 0.1),
        (lambda: jnp.float32(0), 1j),
        (lambda: jnp.int32(0), "7"),
        (lambda: jnp.zeros(1, jnp.int32), 7),
        (lambda: jax.random.key(0), 7),
    ],
)
def test_a_number_that_the_array_cannot_hold_is_refused_with_both(wanted, live):
    binder, _ = binder_for({"step": wanted()})
    with pytest.raises(StateMismatchError, match=rf"'step': found value of type \w+ '?{live}.* has "):
        binder.bind({"step": live})


def test_a_deleted_number_where_a_value_was_is_named():
    binder, _ = binder_for({"step": 0})
    step = jnp.int32(1)
    step.delete()
    with pytest.raises(UnsupportedStateError, match=r"'step'.*deleted.*donated"):
        binder.bind({"step": step})


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
