"""Layouts follow from shapes and shardings alone, and their differences are named."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.shards import Box, Shard, covers
from emergency_ckpt.errors import TopologyError, UnsupportedStateError
from emergency_ckpt.jaxio.layouts import build_layout, describe_mismatch
from emergency_ckpt.jaxio.orbax_metadata import layout_metadata_files
from emergency_ckpt.jaxio.state import flatten, process_boxes
from emergency_ckpt.jaxio.topology import Topology
from tests.jaxio.memory_slot import abstract
from tests.jaxio.states import dtypes_state, kinds_state, mesh, shardings_state

ONE = Topology.single_process()


@pytest.mark.parametrize("make", [dtypes_state, shardings_state, kinds_state])
def test_live_and_abstract_states_have_the_same_layout(make):
    state = make()
    assert build_layout(abstract(state), ONE).hash == build_layout(state, ONE).hash


@pytest.mark.parametrize("make", [dtypes_state, shardings_state, kinds_state])
def test_layouts_survive_their_serialisation(make):
    layout = build_layout(make(), ONE, {"_METADATA": b"{}"})
    assert Layout.from_bytes(layout.to_bytes()) == layout


@st.composite
def sharded_arrays(draw):
    """A mesh of one to three axes over the eight devices, a spec over any of them, a shape that it divides."""
    sizes = draw(st.sampled_from([(8,), (2, 4), (4, 2), (2, 2, 2), (1, 8), (8, 1, 1)]))
    axes = "xyz"[: len(sizes)]
    order = draw(st.permutations(range(8)))
    spread = Mesh(np.array(jax.devices())[np.array(order)].reshape(sizes), tuple(axes))
    dims = draw(st.integers(1, 3))
    of_dim = [draw(st.integers(-1, dims - 1)) for _ in axes]
    spec = [tuple(a for a, d in zip(axes, of_dim, strict=True) if d == dim) for dim in range(dims)]
    parts = [math.prod(spread.shape[a] for a in names) for names in spec]
    shape = tuple(n * draw(st.integers(0, 3)) for n in parts)
    return jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(spread, P(*[s or None for s in spec]))
    )


@given(sharded_arrays())
@settings(max_examples=60)
def test_the_boxes_of_any_sharding_cut_the_array_without_gap_or_overlap(leaf):
    layout = build_layout({"w": leaf}, ONE)
    boxes = [shard.box for shard in layout.shards]
    assert covers(boxes, Box.whole(leaf.shape))
    assert sum(box.size for box in boxes) == math.prod(leaf.shape)
    assert layout.process_shards == (tuple(range(len(boxes))),)


def test_process_local_leaves_are_whole_on_every_process():
    state = {"n": np.ones(3), "u": jnp.ones(2), "a": jax.ShapeDtypeStruct((4,), jnp.int8)}
    layout = build_layout(state, Topology(0, (0, 0, 1, 1), None))
    assert layout.shards == (
        Shard("a", Box((0,), (4,))),
        Shard("n", Box((0,), (3,))),
        Shard("u", Box((0,), (2,))),
    )
    assert layout.process_shards == ((0, 1, 2),) * 4


def test_a_single_device_of_another_process_is_refused_with_the_name():
    leaf = flatten({"w": jnp.ones(2)}).leaves[0]
    with pytest.raises(
        UnsupportedStateError, match="'w' lies on one single device of process 0, seen from process 1"
    ):
        process_boxes(leaf, 1, 2)


def test_differences_are_named_with_what_was_saved_and_what_is_wanted():
    sharding = NamedSharding(mesh(), P("data"))
    saved = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding), "step": 1, "gone": np.ones(2)}
    wanted = {
        "w": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=sharding),
        "step": jnp.ones(()),
        "new": 2,
    }
    assert describe_mismatch(build_layout(saved, ONE), build_layout(wanted, ONE)) == [
        "gone: saved float64[2], wanted nothing",
        "new: saved nothing, wanted a value",
        "step: saved a value, wanted float32[]",
        "w: saved float32[8, 4], wanted bfloat16[8, 4]",
    ]


def test_another_implementation_of_typed_keys_is_a_difference_although_their_bytes_look_alike():
    layouts = [
        build_layout({"k": key}, ONE, layout_metadata_files({"k": key}, "state"))
        for key in (jax.random.key(0, impl="rbg"), jax.random.key(0, impl="unsafe_rbg"))
    ]
    assert describe_mismatch(*layouts) == [
        "k: saved uint32[4] of rbg keys, wanted uint32[4] of unsafe_rbg keys"
    ]


def test_cutting_a_leaf_differently_is_no_difference():
    one, other = (
        jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)
        for sharding in (NamedSharding(mesh(), P("data")), SingleDeviceSharding(jax.devices()[0]))
    )
    assert describe_mismatch(build_layout({"w": one}, ONE), build_layout({"w": other}, ONE)) == []


def test_devices_outside_the_topology_are_refused():
    leaf = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh(), P("data")))
    with pytest.raises(TopologyError, match=r"'w' lies on devices of processes \[0\]"):
        build_layout({"w": leaf}, Topology(0, (), None))
