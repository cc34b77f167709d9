"""What a saved step holds, as Orbax tells it: the tree of its state, and the names of its items.

It is what the step says of itself, whatever state the job of today has; only shardings come from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from emergency_ckpt.core.extras import ProcessExtras
from emergency_ckpt.core.layout import LeafSpec
from emergency_ckpt.core.shards import dtype_of
from emergency_ckpt.core.values import Value
from emergency_ckpt.errors import StateMismatchError
from emergency_ckpt.jaxio.state import Leaf, LeafKind, decode_value, flatten
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.step_files import ORBAX_TREE_FILE
from emergency_ckpt.persistent.tree_metadata import TreeNode, tree_nodes


@dataclasses.dataclass(frozen=True)
class StepContents:
    """The state of a step without its arrays, and what is beside it.

    Attributes:
      leaves, values: the leaves by name: arrays as they are stored, and the others themselves.
      keys: PRNG implementation by leaf, of those that are known to be typed keys.
      nodes: the leaves and the empty nodes in the order of the saved tree.
      items: names of the items beside the state.
    """

    leaves: Mapping[str, LeafSpec]
    values: Mapping[str, Value]
    keys: Mapping[str, str]
    nodes: Sequence[TreeNode]
    items: Sequence[str]

    @classmethod
    def of_slot(cls, slot: SealedSlot) -> StepContents:
        layout = slot.layout
        tree = dict(layout.metadata_files)[ORBAX_TREE_FILE]
        nodes = tree_nodes(tree, f"the layout {layout.hash}")
        extras = [ProcessExtras.from_text(text) for text in slot.manifest.extras.values()]
        items = sorted({name for each in extras for name in each.items})
        return cls(layout.leaf, slot.manifest.values, layout.key_implementations, nodes, items)

    @classmethod
    def of_reader(cls, reader: StepReader, items: Sequence[str]) -> StepContents:
        """`items`: what the step has beside the state. Of another program's step every array is opened."""
        return cls(reader.leaves, reader.values(), reader.key_implementations, reader.nodes, items)

    def state(self, abstract_state: Any) -> Any:
        """The saved tree: arrays as `jax.ShapeDtypeStruct`, other leaves as they were saved.

        A leaf that agrees with that of `abstract_state` has its sharding (and is a typed key as it is there);
        one that does not is shown as it is stored. Where all names agree the tree has the nodes of
        `abstract_state`, otherwise dicts and lists.
        """
        flat, targets = flatten(abstract_state), jax.tree_util.tree_leaves(abstract_state)
        today = {leaf.name: (leaf, target) for leaf, target in zip(flat.leaves, targets, strict=True)}
        described = {
            **{name: self._array(spec, *today.get(name, (None, None))) for name, spec in self.leaves.items()},
            **{name: _value(self.values, name, today.get(name)) for name in self.values},
        }
        if described.keys() == today.keys():
            return jax.tree_util.tree_unflatten(flat.treedef, [described[leaf.name] for leaf in flat.leaves])
        return _as_tree(self.nodes, described)

    def _array(self, saved: LeafSpec, leaf: Leaf | None, target: Any) -> jax.ShapeDtypeStruct:
        if leaf is None or leaf.kind not in (LeafKind.ARRAY, LeafKind.PRNG_KEY):
            return jax.ShapeDtypeStruct(saved.shape, dtype_of(saved.dtype))
        keys = self.keys.get(saved.name, leaf.key_impl)  # Not every writer says which integers are keys.
        if (leaf.shape, leaf.dtype, leaf.key_impl) != (saved.shape, saved.dtype, keys):
            return jax.ShapeDtypeStruct(saved.shape, dtype_of(saved.dtype))
        if isinstance(target, jax.ShapeDtypeStruct):
            return target
        return jax.ShapeDtypeStruct(leaf.logical_shape, leaf.jax_dtype, sharding=leaf.sharding)


def _value(values: Mapping[str, Value], name: str, today: tuple[Leaf, Any] | None) -> Any:
    """A value in the type that the job of today has for it, if it has one for it."""
    if today is None or today[0].kind is not LeafKind.VALUE:
        return values[name]
    try:
        return decode_value(today[0], values)
    except StateMismatchError:
        return values[name]


def _as_tree(nodes: Sequence[TreeNode], leaves: Mapping[str, Any]) -> Any:
    root: dict[str | int, Any] = {}
    for node in nodes:
        if node.name not in leaves and not node.is_empty:
            continue
        at = root
        for key in node.keys[:-1]:
            at = at.setdefault(key, {})
        at[node.keys[-1]] = leaves.get(node.name, node.empty)
    return _with_lists(root)


def _with_lists(node: Any) -> Any:
    """Dicts whose keys are positions were sequences."""
    if not isinstance(node, dict):
        return node
    below = {key: _with_lists(each) for key, each in node.items()}
    if below and all(isinstance(key, int) for key in below):
        return [below[key] for key in sorted(below)]
    return below
