"""Names, kinds and refusals of leaves."""

import enum
import typing

import flax.nnx as nnx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training import train_state

from emergency_ckpt.core.values import captured
from emergency_ckpt.errors import StateMismatchError, UnsupportedStateError
from emergency_ckpt.jaxio.state import LeafKind, decode_value, describe_leaf, flatten
from tests.jaxio.states import kinds_state, shardings_state


class Pair(typing.NamedTuple):
    first: typing.Any
    second: typing.Any


@flax.struct.dataclass
class Struct:
    weights: typing.Any
    label: str = flax.struct.field(pytree_node=False, default="static")


class Model(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(2, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs)])


@jax.tree_util.register_pytree_node_class
class WithoutKeys:
    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def nnx_state():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    return nnx.state((model, optimizer))


def flax_train_state():
    params = {"dense": {"kernel": jnp.ones((2, 2))}}
    return train_state.TrainState.create(apply_fn=str, params=params, tx=optax.chain(optax.adam(1e-3)))


STATES = {
    "list": lambda: [1, (jnp.ones(2), {"x": 2.0})],
    "dict": lambda: {"b": [1, (jnp.ones(2), {"x": 2.0})], "a": Pair(None, Pair(3, {})), "5": "six"},
    "integer keys": lambda: {0: {10: jnp.ones(1)}, 1: np.zeros(2)},
    "dots": lambda: {"a.b": {"c": jnp.ones(1)}},
    "kinds": kinds_state,
    "struct": lambda: Struct({"w": jnp.ones(2)}),
    "optax": lambda: optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init({"w": jnp.ones(2)}),
    "flax": flax_train_state,
    "nnx": nnx_state,
    "nnx module": lambda: Model(nnx.Rngs(0)),
    "without keys": lambda: {"node": WithoutKeys(jnp.ones(1), jnp.ones(2))},
}


@pytest.mark.parametrize("name", STATES)
def test_names_are_orbax_parameter_names(name):
    state = STATES[name]()
    assert [leaf.name for leaf in flatten(state).leaves] == list(ocp.tree.to_flat_dict(state, sep="."))


def test_live_and_abstract_arrays_describe_themselves_equally():
    for state in (shardings_state(), kinds_state(), nnx_state()):
        for name, leaf in jax.tree.leaves_with_path(state):
            if isinstance(leaf, jax.Array):
                twin = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                assert describe_leaf(str(name), twin) == describe_leaf(str(name), leaf)


def test_typed_keys_are_stored_as_their_key_data():
    leaf = describe_leaf("k", jax.ShapeDtypeStruct((3,), jax.random.key(0, impl="rbg").dtype))
    assert (leaf.kind, leaf.key_impl) == (LeafKind.PRNG_KEY, "rbg")
    assert (leaf.shape, leaf.logical_shape, leaf.dtype) == ((3, 4), (3,), "uint32")


@pytest.mark.parametrize(
    "leaf",
    [
        object(),
        np.array([object()]),
        np.array(["a"], np.dtypes.StringDType()),
        np.ma.masked_array([1.0, 2.0], [True, False]),
        np.zeros(1, [("a", "i4")]).view(np.recarray),
        np.zeros(2**20, "S2"),
        1 << 2**24,
    ],
    ids=lambda leaf: f"{type(leaf).__name__} {getattr(leaf, 'dtype', '')}",
)
def test_what_cannot_be_held_exactly_is_refused_with_its_name(leaf):
    with pytest.raises(UnsupportedStateError, match=r"'outer\.inner'"):
        flatten({"outer": {"inner": leaf}})


def test_tracers_are_refused_with_their_name():
    def step(x):
        with pytest.raises(UnsupportedStateError, match="'w' is a tracer"):
            flatten({"w": x})
        return x

    jax.jit(step)(jnp.ones(1))


def test_two_leaves_of_one_name_are_refused_with_both_paths():
    with pytest.raises(UnsupportedStateError, match=r"\['a'\]\['b.c'\].*\['a.b'\]\['c'\].*'a.b.c'"):
        flatten({"a": {"b.c": 1}, "a.b": {"c": 2}})


def test_a_bare_leaf_has_no_name():
    with pytest.raises(UnsupportedStateError, match="single leaf without a name"):
        flatten(jnp.ones(1))


class Phase(enum.IntEnum):
    WARM = 3


@pytest.mark.parametrize(
    "value", [True, 3, 0.5, 1j, "s", b"b", Phase.WARM, np.float16(1), np.datetime64("2020"), np.array(["a"])]
)
def test_values_are_described_by_their_type_and_come_back_in_it(value):
    leaf = describe_leaf("v", value)
    assert leaf.kind is LeafKind.VALUE
    found = decode_value(leaf, {"v": captured("v", value)})
    assert type(found) is type(value)
    assert found == value


def test_a_value_that_does_not_fit_the_wanted_numpy_type_is_refused():
    with pytest.raises(StateMismatchError, match=r"'v' was saved as float 0.5 .*value of type int32"):
        decode_value(describe_leaf("v", np.int32(1)), {"v": 0.5})


def test_a_value_that_was_not_saved_is_named():
    with pytest.raises(StateMismatchError, match=r"'v'.*saved values: \['w'\]"):
        decode_value(describe_leaf("v", 1), {"w": 0.5})
