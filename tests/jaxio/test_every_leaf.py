"""Every dtype, mesh, placement and framework: from the devices to a slot and back, bit for bit."""

from __future__ import annotations

from typing import Any

import flax.nnx as nnx
import jax
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt.errors import StateMismatchError
from tests.jaxio.framework_states import VALUES, Model, nnx_parts, optax_states, train_state
from tests.jaxio.memory_slot import abstract, bits, same, save
from tests.jaxio.states import MESHES, arbitrary, every_dtype_state, filled, jax_dtypes, mesh, placements_state


def test_every_dtype_comes_back() -> None:
    with jax.enable_x64(True):
        assert {"bfloat16", "complex128", "float4_e2m1fn", "float8_e8m0fnu", "int1", "uint4"} <= set(
            jax_dtypes()
        )
        state = every_dtype_state()
        slot = save(state)
        for wanted in (state, abstract(state)):
            assert same(slot.restore(wanted), state)


@pytest.mark.parametrize(("shape", "names"), MESHES)
def test_every_placement_on_every_mesh_comes_back(shape: tuple[int, ...], names: str) -> None:
    state = placements_state(Mesh(np.array(jax.devices()).reshape(shape), tuple(names)))
    assert same(save(state, abstract(state)).restore(abstract(state)), state)


@pytest.mark.parametrize("kind", ["device", "pinned_host", "unpinned_host"])
def test_every_memory_kind_comes_back(kind: str) -> None:
    state = {
        "cut": filled((8, 4), "float32", NamedSharding(mesh(), P("data"), memory_kind=kind)),
        "whole": filled((8, 4), "bfloat16", NamedSharding(mesh(), P(), memory_kind=kind)),
        "scalar": filled((), "int32", NamedSharding(mesh(), P(), memory_kind=kind)),
        "single": filled((3,), "int8", SingleDeviceSharding(jax.devices()[1], memory_kind=kind)),
        "empty": filled((0, 3), "int8", NamedSharding(mesh(), P(), memory_kind=kind)),
    }
    restored = save(state).restore(abstract(state))
    assert same(restored, state)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored)} == {kind}


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("spec", [P(), P("data"), P(None, "model", "data")])
def test_every_device_layout_comes_back_when_it_is_asked_for(order: tuple[int, ...], spec: P) -> None:
    wanted = Format(Layout(order), NamedSharding(mesh(), spec))
    host = np.arange(2 * 4 * 6, dtype=np.float32).reshape(2, 4, 6)
    state = {"w": jax.device_put(host, wanted)}
    slot = save(state)
    asked = slot.restore({"w": jax.ShapeDtypeStruct(host.shape, host.dtype, sharding=wanted)})["w"]
    assert asked.format.layout.major_to_minor == order
    assert bits(asked) == bits(state["w"])
    plain = slot.restore({"w": jax.ShapeDtypeStruct(host.shape, host.dtype, sharding=wanted.sharding)})["w"]
    assert plain.tolist() == host.tolist()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_keys_of_every_implementation_come_back(impl: str) -> None:
    def split(count: Any) -> jax.Array:
        return jax.random.split(jax.random.key(3, impl=impl), count)

    state = {
        "one": jax.random.key(1, impl=impl),
        "committed": jax.device_put(jax.random.key(1, impl=impl), jax.devices()[2]),
        "replicated": jax.device_put(jax.random.key(2, impl=impl), NamedSharding(mesh(), P())),
        "cut": jax.device_put(split(8), NamedSharding(mesh(), P("model"))),
        "partly": jax.device_put(split((2, 4)), NamedSharding(mesh(), P("data"))),
        "both": jax.device_put(split((2, 4)), NamedSharding(mesh(), P("data", "model"))),
        "turned": jax.device_put(
            split((4,)), NamedSharding(Mesh(np.array(jax.devices())[::-1].reshape(2, 4), ("x", "y")), P("y"))
        ),
        "none": split((0,)),
    }
    restored = save(state).restore(abstract(state))
    assert same(restored, state)
    draws = jax.tree.map(lambda key: np.asarray(jax.random.bits(key.reshape(-1)[0], (4,))), restored["both"])
    assert draws.tolist() == np.asarray(jax.random.bits(state["both"].reshape(-1)[0], (4,))).tolist()


def test_numpy_arrays_come_back_however_they_lie_in_memory() -> None:
    base = arbitrary((6, 8), "float64")
    locked = base.copy()
    locked.flags.writeable = False
    state = {
        "fortran": np.asfortranarray(base),
        "read only": locked,
        "every second": base[::2, ::-2],
        "transposed": base.T,
        "broadcast": np.broadcast_to(np.float32(3), (4, 5)),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.int16),
        "unaligned": np.frombuffer(b"\0" + base.tobytes(), np.float64, offset=1),
        "big endian": base.astype(">f8"),
        "times": np.array(["2020-01-01", "NaT"], "M8[s]"),
        "spans": np.array([1, 2], "m8[D]"),
        "text": np.array([["a", "bcd"]]),
        "bytes": np.array([b"a", b"bcd"]),
        "records": np.array([(1, b"x")], [("n", "<i4"), ("s", "S3")]),
    }
    restored = save(state).restore(state)
    assert [type(leaf) for leaf in jax.tree.leaves(restored)] == [np.ndarray] * len(state)
    assert same(restored, state)
    assert all(leaf.flags.writeable and leaf.flags.c_contiguous for leaf in jax.tree.leaves(restored))


def test_values_and_empty_nodes_come_back() -> None:
    assert same(save(VALUES).restore(VALUES), VALUES)
    limits = {"nan": float("nan"), "inf": -float("inf"), "zero": -0.0, "half": np.float16("nan")}
    assert same(save(limits).restore(limits), limits)


@pytest.mark.parametrize(
    "make",
    [optax_states, train_state, nnx_parts, lambda: Model(nnx.Rngs(0))],
    ids=["optax", "flax", "nnx", "module"],
)
def test_states_of_frameworks_come_back(make: Any) -> None:
    state = make()
    for wanted in (state, abstract(state)):
        assert same(save(state, wanted).restore(wanted), state)


def test_a_leaf_cut_over_several_replicas_comes_back_on_each() -> None:
    on = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("x", "replica", "y"))
    state = {"w": filled((8, 4), "float32", NamedSharding(on, P(("x", "y"))))}
    slot = save(state)
    assert len(slot.layout.shards) == 4
    assert same(slot.restore(abstract(state)), state)


def test_another_type_of_a_saved_value_is_named_with_what_was_saved() -> None:
    slot = save({"rate": "fast"})
    with pytest.raises(StateMismatchError, match=r"leaf 'rate' was saved as str 'fast' .* value of type float"):
        slot.restore({"rate": 0.5})
