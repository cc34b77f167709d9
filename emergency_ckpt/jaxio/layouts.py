"""The layout of a state, from its shardings, and how two layouts differ.

Every process derives the identical layout: nothing in it depends on which process asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.shards import Box
from emergency_ckpt.errors import TopologyError
from emergency_ckpt.jaxio.state import Leaf, LeafKind, flatten, process_boxes
from emergency_ckpt.jaxio.topology import Topology


def build_layout(
    abstract_state: Any, topology: Topology, metadata_files: Mapping[str, bytes] | None = None
) -> Layout:
    """Which shards the state consists of and which process holds which.

    Local: every process calls it by itself and gets the same layout (compare `hash` once to be sure).
    `metadata_files` is what Orbax needs to read the state, from `jaxio.orbax_metadata`.
    Raises UnsupportedStateError for leaves that cannot be checkpointed, and TopologyError for arrays on
    devices of processes that the topology does not know.
    """
    leaves = flatten(abstract_state).leaves
    arrays = [leaf for leaf in leaves if leaf.kind is not LeafKind.VALUE]
    held: dict[str, dict[int, tuple[Box, ...]]] = {}
    known: dict[Any, dict[int, tuple[Box, ...]]] = {}
    for leaf in arrays:
        place = (
            leaf.is_process_local,
            None if leaf.is_process_local else leaf.sharding,
            leaf.shape,
            leaf.key_dims,
        )
        boxes = known.get(place)
        if boxes is None or leaf.is_process_local:
            boxes = known[place] = process_boxes(leaf, topology.process_index, topology.process_count)
            _check_holders(leaf, boxes, topology)
        held[leaf.name] = boxes
    return Layout.build_from_boxes(
        leaves=[LeafSpec(leaf.name, leaf.shape, leaf.dtype) for leaf in arrays],
        boxes=held,
        process_slice=topology.process_slice,
        value_leaves=[leaf.name for leaf in leaves if leaf.kind is LeafKind.VALUE],
        metadata_files=metadata_files,
    )


def describe_mismatch(saved: Layout, wanted: Layout) -> list[str]:
    """One line per leaf that differs in existence, shape, dtype or kind; where it lies does not count."""
    old, new = _descriptions(saved), _descriptions(wanted)
    return [
        f"{name}: saved {old.get(name, 'nothing')}, wanted {new.get(name, 'nothing')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def _descriptions(layout: Layout) -> dict[str, str]:
    implementations = layout.key_implementations
    arrays = {
        leaf.name: f"{leaf.dtype}{list(leaf.shape)}"
        + (f" of {implementations[leaf.name]} keys" if leaf.name in implementations else "")
        for leaf in layout.leaves
    }
    return arrays | dict.fromkeys(layout.value_leaves, "a value")


def _check_holders(leaf: Leaf, boxes: Mapping[int, object], topology: Topology) -> None:
    unknown = sorted(set(boxes) - set(range(topology.process_count)))
    if unknown:
        raise TopologyError(
            f"leaf {leaf.name!r} lies on devices of processes {unknown}, but the mesh spans "
            f"{topology.process_count} processes; place it on the mesh that the manager was given"
        )
