"""From a live state to the buffers of its shards, cheaply enough to be done at every save.

What was checked once (tree structure, shardings) is only compared again; a state that does not fit its layout
is refused with the name of the leaf.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from emergency_ckpt.core.conversion import as_array, converted
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.shards import Box, dtype_of
from emergency_ckpt.core.values import VALUE_TYPES, Value, captured, shown
from emergency_ckpt.errors import StateMismatchError, UnsupportedStateError
from emergency_ckpt.jaxio.state import (
    Leaf,
    LeafKind,
    describe_leaf,
    flatten,
    leaf_name,
    process_boxes,
)

HOST_PLATFORMS = frozenset({"cpu"})


class ShardBuffer(NamedTuple):
    """One shard of this process: a single-device array, or a numpy array that its owner may still change.

    A tuple because thousands are made at every save. `on_cpu`: host memory, which can be viewed and held.
    """

    shard: int
    leaf: str
    data: jax.Array | np.ndarray
    on_cpu: bool


@dataclasses.dataclass(frozen=True)
class Binding:
    """A live state as the shards that this process stores, in the order of the slot, and its values now."""

    buffers: Sequence[ShardBuffer]
    values: Mapping[str, Value]


class StateBinder:
    """Maps live states to the shards of one layout.

    Made once, from the abstract state of which the layout was built. Not thread-safe: saves come one by one.
    """

    def __init__(
        self,
        abstract_state: Any,
        layout: Layout,
        process_index: int,
        host_platforms: Collection[str] = HOST_PLATFORMS,
    ) -> None:
        """Boxes that the process does not hold in `layout` are left where they are: no copy of them is made.

        `host_platforms`: platforms whose devices keep their arrays in this host's memory, to be viewed.
        """
        flat = flatten(abstract_state)
        held = layout.process_shards[process_index]
        shards: dict[str, dict[Box, int]] = {}
        for index in held:
            shards.setdefault(layout.shards[index].leaf, {})[layout.shards[index].box] = index
        self.process_index = process_index
        processes = process_index, layout.process_count
        self._treedef = flat.treedef
        self._leaves = [
            _ValueLeaf(leaf)
            if leaf.kind is LeafKind.VALUE
            else _ArrayLeaf(leaf, shards.get(leaf.name, {}), processes, host_platforms)
            for leaf in flat.leaves
        ]

    def bind(self, state: Any) -> Binding:
        """The buffers of all shards that this process stores of its own, and its values. Local.

        Reads no shards and does not wait for them; it waits for 0-d arrays that stand where the abstract state
        has a value. Raises StateMismatchError for a state with other leaves, shapes, dtypes or boxes than the
        layout, and UnsupportedStateError for a deleted array, both naming the leaf.
        """
        leaves, treedef = jax.tree_util.tree_flatten(state)
        if treedef != self._treedef:
            self._accept_structure(state, treedef)
        found: list[ShardBuffer] = []
        values: dict[str, Value] = {}
        for expected, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(expected, _ValueLeaf):
                values[expected.name] = expected.value(leaf)
            else:
                found += expected.buffers(leaf)
        found.sort(key=operator.itemgetter(0))
        return Binding(found, values)

    def _accept_structure(self, state: Any, treedef: Any) -> None:
        """Static parts of a tree may change from state to state (an optimizer made anew), names may not."""
        wanted = [leaf.name for leaf in self._leaves]
        names = [leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
        if names != wanted:
            raise StateMismatchError(
                "the state has other leaves than the abstract state of this manager: "
                f"missing {_some(set(wanted) - set(names))}, unexpected {_some(set(names) - set(wanted))}; "
                "save states of one structure, or make a manager for this one"
            )
        self._treedef = treedef


class _ValueLeaf:
    """A leaf that was described as a value: any that can be restored as such will do, now and later.

    It may become a 0-d array in training code (`TrainState.step` after the first jitted step). Its number is
    read at the save, since the array may be donated afterwards.
    """

    def __init__(self, leaf: Leaf) -> None:
        self.name = leaf.name
        self._leaf = leaf

    def value(self, leaf: Any) -> Value:
        assert self._leaf.value_type is not None
        found = self._scalar(leaf) if isinstance(leaf, jax.Array) else leaf
        if isinstance(found, np.ndarray) and not found.shape and self._leaf.value_type is not np.ndarray:
            found = found[()]
        if not isinstance(found, (*VALUE_TYPES, np.ndarray)):
            _refuse(self._leaf, leaf)
        value = captured(self.name, found)
        try:
            converted(value, self._leaf.value_type)
        except (ValueError, TypeError) as error:
            raise StateMismatchError(
                f"leaf {self.name!r}: found {shown(value)} of type {type(value).__name__}, but the abstract "
                f"state of this manager has {self._leaf.describe()}, which cannot hold it ({error}); save "
                "states of one kind, from the first step on"
            ) from error
        return value

    def _scalar(self, leaf: jax.Array) -> np.ndarray:
        """A number that is computed on devices; every process that holds it has its own copy of it."""
        key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if leaf.shape or key or not leaf.sharding.addressable_devices:
            _refuse(self._leaf, leaf)
        try:
            return np.asarray(leaf.addressable_shards[0].data)
        except RuntimeError as error:
            raise_if_deleted(self.name, leaf, error)
            raise


class _ArrayLeaf:
    """A leaf with shards: what it must look like, and where the shards of its last sharding are found."""

    def __init__(
        self,
        leaf: Leaf,
        shards: Mapping[Box, int],
        processes: tuple[int, int],
        host_platforms: Collection[str],
    ) -> None:
        self.name = leaf.name
        self._leaf = leaf
        self._shards = shards
        self._processes = processes
        self._host_platforms = host_platforms
        self._shape = leaf.logical_shape
        self._dtype: Any = None
        self._sharding: jax.sharding.Sharding | None = None
        self._places: tuple[tuple[int, int], ...] = ()
        self._device_count = 0
        self._on_cpu = False

    def buffers(self, leaf: Any) -> list[ShardBuffer]:
        """Each distinct shard that this process stores, once."""
        if not isinstance(leaf, jax.Array):
            return self._host_buffers(leaf)
        try:
            if leaf.dtype != self._dtype or leaf.shape != self._shape or leaf.sharding != self._sharding:
                self._accept(leaf)
            data = self._shard_data(self._stored(leaf))
        except RuntimeError as error:
            raise_if_deleted(self.name, leaf, error)
            raise
        held = zip(self._places, data, strict=True)
        return [ShardBuffer(shard, self.name, each, self._on_cpu) for (_, shard), each in held]

    def _shard_data(self, stored: jax.Array) -> list[jax.Array]:
        """The single-device arrays of all shards; this is where most of a snapshot's time goes."""
        if self._device_count == 1 and self._places:  # Its one device may be another process's.
            return [stored.addressable_shards[0].data]
        # Quicker than `addressable_shards` for arrays on several devices. (Of replicas, it gives any.)
        return [stored.addressable_data(at) for at, _ in self._places]

    def _accept(self, leaf: jax.Array) -> None:
        """Checks an array of a sharding that was not seen before, and finds its shards."""
        found = describe_leaf(self.name, leaf)
        self._check(found, leaf)
        places: dict[int, int] = {}
        for at, shard in enumerate(self._stored(leaf).addressable_shards):
            stored = self._shards.get(Box.from_slices(shard.index, found.shape))
            if stored is not None:
                places.setdefault(stored, at)
        self._dtype, self._sharding = leaf.dtype, leaf.sharding
        self._places = tuple((at, shard) for shard, at in places.items())
        self._device_count = leaf.sharding.num_devices
        platforms = {device.platform for device in leaf.sharding.addressable_devices}
        self._on_cpu = platforms.issubset(self._host_platforms)

    def _host_buffers(self, leaf: Any) -> list[ShardBuffer]:
        """A numpy array in place of one that every process holds whole, or a number in place of a scalar."""
        number = self._number(leaf)
        if number is None:
            self._check(describe_leaf(self.name, leaf), leaf)
        data = leaf if number is None else number
        return [ShardBuffer(shard, self.name, data, True) for shard in self._shards.values()]

    def _number(self, leaf: Any) -> np.ndarray | None:
        """What is to be stored for a Python or numpy number that the dtype of this scalar holds exactly."""
        scalar = self._leaf.kind is not LeafKind.PRNG_KEY and not self._leaf.shape
        if not scalar or not isinstance(leaf, (bool, int, float, complex, np.generic, np.ndarray)):
            return None
        return as_array(leaf, dtype_of(self._leaf.dtype))

    def _check(self, found: Leaf, leaf: Any) -> None:
        wanted = self._leaf
        if (found.shape, found.dtype, found.key_impl) != (wanted.shape, wanted.dtype, wanted.key_impl):
            _refuse(wanted, leaf)
        if found.sharding == wanted.sharding or (found.is_process_local and wanted.is_process_local):
            return
        found_boxes, wanted_boxes = (process_boxes(each, *self._processes) for each in (found, wanted))
        if found_boxes != wanted_boxes:
            process = self._processes[0]
            raise StateMismatchError(
                f"leaf {self.name!r} is cut differently than in the abstract state of this manager: process "
                f"{process} was to hold {_some(wanted_boxes.get(process, ()))}, its sharding {found.sharding} "
                f"has {_some(found_boxes.get(process, ()))}; save it with the sharding {wanted.sharding}"
            )

    def _stored(self, leaf: jax.Array) -> jax.Array:
        return jax.random.key_data(leaf) if self._leaf.kind is LeafKind.PRNG_KEY else leaf


def raise_if_deleted(name: str, leaf: Any, cause: Exception) -> None:
    """Raises UnsupportedStateError when the leaf is an array whose buffers are gone."""
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        raise UnsupportedStateError(
            f"leaf {name!r} cannot be saved: its array was deleted, most likely donated to a jitted function; "
            "save the state which that function returned"
        ) from cause


def _refuse(wanted: Leaf, leaf: Any) -> NoReturn:
    found = describe_leaf(wanted.name, leaf)
    number = f" {shown(leaf)}" if found.kind is LeafKind.VALUE else ""
    raise StateMismatchError(
        f"leaf {wanted.name!r}: found {found.describe()}{number}, but the abstract state of this manager has "
        f"{wanted.describe()}; save states of one kind, from the first step on"
    )


def _some(items: Iterable[object], most: int = 5) -> str:
    """The first few of many things, for a message."""
    listed = sorted(map(str, items))
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "none") + more
