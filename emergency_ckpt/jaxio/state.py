"""A state pytree as named leaves: what each leaf is, how it is stored, and on which devices it lies.

Names are Orbax's parameter names. Everything follows from types, shapes and shardings alone, so the abstract
and the live states of a training job describe themselves equally.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from emergency_ckpt.core.conversion import converted
from emergency_ckpt.core.dtypes import MACHINE_DEPENDENT
from emergency_ckpt.core.shards import Box, dtype_of
from emergency_ckpt.core.values import Value, captured, shown
from emergency_ckpt.errors import StateMismatchError, UnsupportedStateError

# Numbers that TensorStore has no dtype for, and for which bytes cannot stand in.
_WITHOUT_STORE = ("complex32", "bcomplex32")


class LeafKind(enum.StrEnum):
    """How a leaf is stored: bytes in slots for the first three, JSON in the manifest for values."""

    ARRAY = "array"
    PRNG_KEY = "typed PRNG key"
    NUMPY = "numpy array"
    VALUE = "value"


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of a state.

    Attributes:
      name: its keys joined by '.', as Orbax names parameters.
      kind: how it is stored.
      shape: its global shape as stored; typed PRNG keys have the dimensions of their key data at the end.
      dtype: name of the dtype as stored; uint32 for typed PRNG keys. Empty for values.
      jax_dtype: the dtype as JAX sees it: a key dtype for typed PRNG keys.
      sharding: where the array lies; None for numpy arrays, values and abstract arrays that name no place.
      committed: whether a restored array stays on its devices, as JAX understands it.
      key_impl: name of the PRNG implementation of a typed key.
      array_layout: a device layout that an abstract leaf asks for (`jax.experimental.layout.Format`).
      value_type: Python type of a value.
      key_dims: how many dimensions of `shape` are key data.
    """

    name: str
    kind: LeafKind
    shape: tuple[int, ...] = ()
    dtype: str = ""
    jax_dtype: Any = None
    sharding: jax.sharding.Sharding | None = None
    committed: bool = False
    key_impl: str | None = None
    array_layout: Any = None
    value_type: type | None = None
    key_dims: int = 0

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """The shape that the sharding speaks of: without the dimensions of key data."""
        return self.shape[: len(self.shape) - self.key_dims]

    @property
    def is_process_local(self) -> bool:
        """Whether each process keeps its own whole copy.

        So it is for numpy arrays and for arrays on one single device: in a job of many processes each process
        has its own, on a device of its own, and all are held to be equal (as JAX requires of such arguments).
        """
        return self.sharding is None or isinstance(self.sharding, jax.sharding.SingleDeviceSharding)

    def describe(self) -> str:
        """Kind, dtype and shape, for messages."""
        if self.kind is LeafKind.VALUE:
            return f"{self.kind} of type {self.value_type.__name__ if self.value_type else '?'}"
        impl = f" ({self.key_impl})" if self.key_impl else ""
        return f"{self.kind}{impl} {self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class FlatState:
    """The leaves of a state, in the order of its tree structure, which alone knows of None and empty nodes."""

    treedef: Any
    leaves: tuple[Leaf, ...]


def flatten(state: Any) -> FlatState:
    """Describes every leaf of a live or abstract state, without touching data.

    Abstract leaves are `jax.ShapeDtypeStruct`s. Raises UnsupportedStateError, naming the leaf, for what cannot
    be checkpointed: tracers, objects, two leaves of one name.
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = [leaf_name(path) for path, _ in keyed]
    _check_names(names, [jax.tree_util.keystr(path) for path, _ in keyed])
    return FlatState(
        treedef, tuple(describe_leaf(name, leaf) for name, (_, leaf) in zip(names, keyed, strict=True))
    )


def key_implementations(state: Any) -> dict[str, str]:
    """PRNG implementation by leaf, of those leaves that are typed keys."""
    return {leaf.name: leaf.key_impl for leaf in flatten(state).leaves if leaf.key_impl is not None}


def without_arrays(state: Any) -> Any:
    """The state with abstract leaves in place of its arrays, where these say the same: it keeps no memory.

    An abstract leaf on one single device does not say whether the array may leave it: such arrays stay.
    """

    def abstract(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            return leaf
        if leaf.committed != _commits(leaf.sharding):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map(abstract, state)


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of the leaf at a JAX key path."""
    return ".".join(_key_name(key) for key in path)


def describe_leaf(name: str, leaf: Any) -> Leaf:
    """What the leaf is and how it is stored; raises UnsupportedStateError for what cannot be."""
    if isinstance(leaf, jax.core.Tracer):
        raise UnsupportedStateError(
            f"leaf {name!r} is a tracer, not data: save and restore are called outside of jit, "
            "with the values that a jitted function returns"
        )
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return _describe_array(name, leaf)
    if isinstance(leaf, np.ndarray) and type(leaf) in (np.ndarray, np.memmap):
        dtype = _storable(leaf.dtype)
        if dtype is not None:
            return Leaf(name, LeafKind.NUMPY, leaf.shape, dtype)
    captured(name, leaf)
    return Leaf(name, LeafKind.VALUE, value_type=np.ndarray if isinstance(leaf, np.ndarray) else type(leaf))


def _describe_array(name: str, leaf: jax.Array | jax.ShapeDtypeStruct) -> Leaf:
    kind, shape, dtype, key_impl = LeafKind.ARRAY, tuple(leaf.shape), leaf.dtype, None
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        kind = LeafKind.PRNG_KEY
        key_impl, data = _key_storage(leaf)
        shape, dtype = tuple(data.shape), data.dtype
    live = isinstance(leaf, jax.Array)
    return Leaf(
        name,
        kind,
        shape,
        stored_dtype(name, dtype),
        leaf.dtype,
        sharding=leaf.sharding,
        committed=leaf.committed if live else _commits(leaf.sharding),
        key_impl=key_impl,
        array_layout=None if live else _asked_layout(leaf),
        key_dims=len(shape) - len(leaf.shape),
    )


def _key_storage(keys: Any) -> tuple[str, jax.ShapeDtypeStruct]:
    """Implementation name and key data of typed PRNG keys, found without computing anything."""
    impl: list[str] = []

    def unwrap(traced: jax.Array) -> jax.Array:
        impl.append(str(jax.random.key_impl(traced)))
        return jax.random.key_data(traced)

    data = jax.eval_shape(unwrap, jax.ShapeDtypeStruct(keys.shape, keys.dtype))
    return impl[0], data


def _commits(sharding: jax.sharding.Sharding | None) -> bool:
    """Whether an abstract leaf asks for a committed array, which it cannot say.

    One on this process's first device is taken for what plain `jnp` code makes there: an array that may move.
    Committed to that device it could not meet arrays that are spread over a mesh.
    """
    if sharding is None:
        return False
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        first = jax.local_devices()[0]
        return sharding != jax.sharding.SingleDeviceSharding(first)
    return True


def _asked_layout(leaf: jax.ShapeDtypeStruct) -> Any:
    asked = getattr(leaf, "format", None)
    return asked if getattr(asked, "layout", None) is not None else None


def stored_dtype(name: str, dtype: Any) -> str:
    """The dtype's name, if slots can hold it; raises UnsupportedStateError naming the leaf otherwise."""
    stored = _storable(dtype)
    if stored is None:
        raise UnsupportedStateError(
            f"leaf {name!r} has dtype {dtype}, which cannot be checkpointed; expected numbers or bools in "
            "native byte order. Convert the array, or keep it out of the saved state."
        )
    return stored


@functools.lru_cache(maxsize=256)
def _storable(dtype: Any) -> str | None:
    """The name from which `core` makes the very same dtype again, None for what both tiers cannot hold."""
    try:
        again = dtype_of(dtype.name)
    except (ValueError, AttributeError):
        return None
    refused = dtype.kind in "mMSU" or dtype.type in MACHINE_DEPENDENT or dtype.name in _WITHOUT_STORE
    return dtype.name if again == dtype and not refused else None


def decode_value(leaf: Leaf, values: Mapping[str, Value]) -> Any:
    """The saved value of a value leaf, in the type that is wanted.

    Raises StateMismatchError when it was not saved, or cannot be had in that type without loss.
    """
    if leaf.name not in values:
        raise StateMismatchError(
            f"leaf {leaf.name!r} is wanted as {leaf.describe()}, but no such value was saved; "
            f"saved values: {sorted(values)}"
        )
    saved = values[leaf.name]
    assert leaf.value_type is not None
    try:
        return converted(saved, leaf.value_type)
    except (ValueError, TypeError) as error:
        raise StateMismatchError(
            f"leaf {leaf.name!r} was saved as {type(saved).__name__} {shown(saved)} and is wanted as "
            f"{leaf.describe()}, which cannot hold it ({error}); ask for the type that was saved"
        ) from error


def process_boxes(leaf: Leaf, process_index: int, process_count: int) -> dict[int, tuple[Box, ...]]:
    """The distinct boxes of the leaf that each process holds, ascending; all processes get the same answer.

    Raises UnsupportedStateError for an array on one single device of another process, which that process
    would take for its own.
    """
    if leaf.is_process_local:
        _check_own_device(leaf, process_index)
        return {process: (Box.whole(leaf.shape),) for process in range(process_count)}
    assert leaf.sharding is not None
    boxes: dict[int, set[Box]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.logical_shape).items():
        boxes.setdefault(device.process_index, set()).add(box_of(leaf, index))
    return {process: tuple(sorted(held)) for process, held in boxes.items()}


def box_of(leaf: Leaf, index: tuple[slice, ...] | None) -> Box:
    """The box, in the shape as stored, of a shard index into the logical shape."""
    key_data = tuple(slice(None) for _ in range(leaf.key_dims))
    return Box.from_slices((*(index or ()), *key_data), leaf.shape)


def _check_own_device(leaf: Leaf, process_index: int) -> None:
    owners = {device.process_index for device in leaf.sharding.device_set} if leaf.sharding else set()
    if owners - {process_index}:
        raise UnsupportedStateError(
            f"leaf {leaf.name!r} lies on one single device of process {sorted(owners)[0]}, seen from process "
            f"{process_index}; place it with a NamedSharding over a mesh, which says the same on every process"
        )


def _check_names(names: list[str], paths: list[str]) -> None:
    seen: dict[str, str] = {}
    for name, path in zip(names, paths, strict=True):
        if not path:
            raise UnsupportedStateError(
                "the state is a single leaf without a name; put it into a dict, such as {'params': state}"
            )
        if name in seen:
            raise UnsupportedStateError(
                f"the leaves at {seen[name]} and {path} would both be named {name!r} (keys joined by '.'); "
                "rename one of the keys"
            )
        seen[name] = path


def _key_name(key: Any) -> str:
    match key:
        case jax.tree_util.SequenceKey(idx=name) | jax.tree_util.GetAttrKey(name=name):
            return str(name)
        case jax.tree_util.DictKey(key=name) | jax.tree_util.FlattenedIndexKey(key=name):
            return str(name)
    raise UnsupportedStateError(
        f"a node of the state has keys of type {type(key).__name__} ({key}), which have no name in a "
        "checkpoint; register its class with keys of jax.tree_util (DictKey, GetAttrKey, SequenceKey)"
    )
