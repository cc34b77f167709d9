"""What a restore is to give: the whole state of the manager, or the part of it that the caller names.

A leaf that the slots hold as it is wanted comes from there; any other one is read from the persistent tier, box
by box. All of it follows from what the caller gives, which must be the same on all processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.part import Part
from emergency_ckpt.core.shards import Shard
from emergency_ckpt.errors import ConfigError
from emergency_ckpt.jaxio.layouts import build_layout
from emergency_ckpt.jaxio.state import Leaf, LeafKind, describe_leaf, flatten, key_implementations, leaf_name
from emergency_ckpt.jaxio.topology import Topology
from emergency_ckpt.runtime.extras import WantedExtras

_SKIPPED = ocp.PLACEHOLDER


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What one restore gives.

    Attributes:
      part: the leaves that come from slots (or from the persistent tier, cut as for slots).
      slots: these leaves by name, as abstract leaves.
      boxes: the other leaves by name, which only the persistent tier may have as they are wanted.
      reasons: per leaf of `boxes`, what the slots have instead.
      leaves, values: all array leaves, and the names of all others.
      fingerprint: equal on processes that want the same.
      treedef, names: the tree that is given, and the name of each of its leaves; None for one to be skipped.
      beside: what is wanted beside the arrays.
    """

    part: Part
    slots: Mapping[str, Any]
    boxes: Mapping[str, Any]
    reasons: Sequence[str]
    leaves: tuple[LeafSpec, ...]
    values: frozenset[str]
    fingerprint: str
    treedef: Any
    names: Sequence[str | None]
    beside: WantedExtras = dataclasses.field(default_factory=WantedExtras)

    @property
    def keys(self) -> Mapping[str, str]:
        """PRNG implementation by leaf, of those that are typed keys."""
        return key_implementations({**self.slots, **self.boxes})

    def tree(self, restored: Mapping[str, Any]) -> Any:
        """The restored leaves in the caller's tree."""
        leaves = [_SKIPPED if name is None else restored[name] for name in self.names]
        return jax.tree_util.tree_unflatten(self.treedef, leaves)


def whole_state(abstract_state: Any, layout: Layout, beside: WantedExtras) -> Wanted:
    """All leaves, as the manager's state has them."""
    leaves, treedef = jax.tree_util.tree_flatten(abstract_state)
    names = [leaf.name for leaf in flatten(abstract_state).leaves]
    return Wanted(
        part=Part(layout),
        slots=dict(zip(names, leaves, strict=True)),
        boxes={},
        reasons=(),
        leaves=layout.leaves,
        values=frozenset(layout.value_leaves),
        fingerprint=layout.hash,
        treedef=treedef,
        names=names,
        beside=beside,
    )


def asks_for_part(args: Any) -> bool:
    """Whether these arguments of Orbax for the state ask for some of its leaves only."""
    if getattr(args, "partial_restore", False):
        return True
    return any(leaf is _SKIPPED for leaf in jax.tree_util.tree_leaves(getattr(args, "item", None)))


def part_of_state(
    args: Any, abstract_state: Any, layout: Layout, topology: Topology, beside: WantedExtras
) -> Wanted:
    """The leaves of `args.item`; without an item, all leaves of the manager's state.

    `args` is Orbax's `PyTreeRestore` or `StandardRestore`. A leaf that names no sharding, neither itself nor in
    `args.restore_args`, takes that of the manager's state. Raises ConfigError for arguments that are not
    supported, and UnsupportedStateError for leaves that cannot be checkpointed.
    """
    _refuse_transforms(args)
    own_leaves = jax.tree_util.tree_leaves(abstract_state)
    own = flatten(abstract_state).leaves
    known = dict(zip([leaf.name for leaf in own], own_leaves, strict=True))
    item = abstract_state if args.item is None else args.item
    keyed, treedef = jax.tree_util.tree_flatten_with_path(item)
    names = [None if leaf is _SKIPPED else leaf_name(path) for path, leaf in keyed]
    changes = _restore_args_by_name(getattr(args, "restore_args", None))
    wanted = {
        name: _resolve(leaf, changes.get(name), known.get(name))
        for name, (_, leaf) in zip(names, keyed, strict=True)
        if name is not None
    }
    asked = build_layout(wanted, topology)
    mismatches = _mismatches(wanted, asked, {leaf.name: leaf for leaf in own}, layout)
    slots = {name: leaf for name, leaf in wanted.items() if name not in mismatches}
    return Wanted(
        part=Part(layout, frozenset(slots)),
        slots=slots,
        boxes={name: wanted[name] for name in mismatches},
        reasons=[f"{name}: {why}" for name, why in mismatches.items()],
        leaves=asked.leaves,
        values=frozenset(asked.value_leaves),
        fingerprint=asked.hash,
        treedef=treedef,
        names=names,
        beside=beside,
    )


def whole_in_another_tree(
    args: Any, abstract_state: Any, layout: Layout, topology: Topology, beside: WantedExtras
) -> Callable[[Any], Any] | None:
    """Makes the tree of `args.item` of the whole state, where that names all leaves as the state has them.

    None where it names others, fewer, or none. Raises what `part_of_state` raises.
    """
    if args.item is None:
        return None
    asked = part_of_state(args, abstract_state, layout, topology, beside)
    own = [leaf.name for leaf in flatten(abstract_state).leaves]
    if asked.boxes or sorted(own) != sorted(str(name) for name in asked.names):
        return None
    return lambda state: asked.tree(dict(zip(own, jax.tree_util.tree_leaves(state), strict=True)))


def _refuse_transforms(args: Any) -> None:
    given = [name for name in ("transforms", "legacy_transform_fn") if getattr(args, name, None) is not None]
    if given:
        raise ConfigError(
            f"restore(…, {type(args).__name__}({', '.join(given)})) is not supported; restore the leaves as "
            "they were saved and change them afterwards"
        )


def _restore_args_by_name(restore_args: Any) -> dict[str, Any]:
    keyed, _ = jax.tree_util.tree_flatten_with_path(restore_args)
    return {leaf_name(path): leaf for path, leaf in keyed if isinstance(leaf, ocp.RestoreArgs)}


def _resolve(leaf: Any, change: Any, own: Any) -> Any:
    """The abstract leaf with what its `RestoreArgs` say, and with the sharding of the manager's own leaf."""
    if not isinstance(leaf, jax.ShapeDtypeStruct | jax.Array | np.ndarray):
        return leaf
    if change is not None and change.restore_type is np.ndarray:
        # One element that stands at every place: a numpy array of this shape without its memory.
        return np.broadcast_to(np.zeros((), change.dtype or leaf.dtype), leaf.shape)
    if isinstance(leaf, np.ndarray):
        return leaf
    place = _place(change) or leaf.sharding
    if place is None and own is not None:
        place = getattr(own, "sharding", None)
    shape = getattr(change, "global_shape", None) or leaf.shape
    dtype = getattr(change, "dtype", None) or leaf.dtype
    if isinstance(leaf, jax.Array) and (shape, dtype, place) == (leaf.shape, leaf.dtype, leaf.sharding):
        return leaf
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _place(change: Any) -> Any:
    """Where `ArrayRestoreArgs` want an array; None where they do not say."""
    sharding = getattr(change, "sharding", None)
    if sharding is not None:
        return sharding.to_jax_sharding() if hasattr(sharding, "to_jax_sharding") else sharding
    mesh, axes = getattr(change, "mesh", None), getattr(change, "mesh_axes", None)
    return None if mesh is None or axes is None else jax.sharding.NamedSharding(mesh, axes)


def _mismatches(
    wanted: Mapping[str, Any], asked: Layout, own: Mapping[str, Leaf], layout: Layout
) -> dict[str, str]:
    """The leaves that the slots do not hold as they are wanted, and what the slots have instead."""
    held = [{layout.shards[i] for i in indices} for indices in layout.process_shards]
    cut_otherwise: set[str] = set()
    for process, indices in enumerate(asked.process_shards):
        shards: set[Shard] = {asked.shards[i] for i in indices}
        cut_otherwise |= {shard.leaf for shard in shards - held[process]}
    found: dict[str, str] = {}
    for name, leaf in wanted.items():
        described, mine = describe_leaf(name, leaf), own.get(name)
        if mine is None:
            found[name] = "this manager's state has no such leaf"
        elif not _alike(described, mine):
            found[name] = f"this manager's state has {mine.describe()}, wanted is {described.describe()}"
        elif name in cut_otherwise:
            found[name] = f"this manager's state has it as {mine.sharding}, wanted is {described.sharding}"
    return found


def _alike(wanted: Leaf, own: Leaf) -> bool:
    if LeafKind.VALUE in (wanted.kind, own.kind):
        return wanted.kind is own.kind
    return (wanted.shape, wanted.dtype, wanted.key_impl) == (own.shape, own.dtype, own.key_impl)
