"""The metadata files that make a directory of arrays a checkpoint of a PyTree in Orbax's eyes.

They depend on the abstract state alone, so they are made once, by the process that has jax, and travel in the
layout to whoever writes the checkpoint. Written as JSON here, against Orbax's format and not its internals.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from emergency_ckpt.errors import UnsupportedStateError
from emergency_ckpt.jaxio.state import Leaf, LeafKind, describe_leaf, flatten, leaf_name

STEP_METADATA_FILE = "_CHECKPOINT_METADATA"
"""Key in `Layout.metadata_files` of the one file that lies in the step directory; the others are the item's."""

_MAX_RECORDED_DEVICES = 256
_SEQUENCE_KEY, _MAPPING_KEY = 1, 2


def metadata_files(abstract_state: Any, *, use_zarr3: bool = True) -> dict[str, bytes]:
    """Orbax's metadata files of an item that holds `abstract_state`: path in the item directory → content.

    Leaves are `jax.ShapeDtypeStruct`s or what they stand for. Local to the calling process; all processes get
    the same bytes if their shardings are the same. Raises UnsupportedStateError for a state that cannot be
    saved.
    """
    flatten(abstract_state)
    keyed, _ = jax.tree_util.tree_flatten_with_path(abstract_state, is_leaf=_is_leaf_or_empty)
    entries = [
        (path, None if _is_empty(node) else describe_leaf(leaf_name(path), node), node) for path, node in keyed
    ]
    leaves = [leaf for _, leaf, _ in entries if leaf is not None]
    files = {
        "_METADATA": _dump(
            {
                "tree_metadata": dict(_tree_entry(path, leaf, node) for path, leaf, node in entries),
                "use_ocdbt": True,
                "use_zarr3": use_zarr3,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            }
        )
    }
    if shardings := {leaf.name: text for leaf in leaves if (text := _sharding_text(leaf))}:
        files["_sharding"] = _dump(
            {base64.b64encode(name.encode()).decode(): text for name, text in shardings.items()}
        )
    if arrays := [_array_entry(leaf) for leaf in leaves if leaf.kind in (LeafKind.ARRAY, LeafKind.PRNG_KEY)]:
        files["array_metadatas/process_0"] = _dump({"array_metadatas": arrays})
    return files


def step_metadata_file(item: str) -> bytes:
    """Orbax's metadata of a step whose state lies in the directory `item`.

    Times and the user's metadata are added at commit, and `metrics` is taken out if there are none.
    """
    handlers = {item: ocp.PyTreeCheckpointHandler, "metrics": ocp.JsonCheckpointHandler}
    return _dump(
        {
            "item_handlers": {name: f"{h.__module__}.{h.__qualname__}" for name, h in handlers.items()},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": None,
            "commit_timestamp_nsecs": None,
            "custom_metadata": {},
        }
    )


def layout_metadata_files(abstract_state: Any, item: str) -> dict[str, bytes]:
    """All files that a layout carries for a step whose state lies in the directory `item`."""
    return {**metadata_files(abstract_state), STEP_METADATA_FILE: step_metadata_file(item)}


def _tree_entry(path: tuple[Any, ...], leaf: Leaf | None, node: Any) -> tuple[str, dict[str, Any]]:
    names = [leaf_name((key,)) for key in path]
    value: dict[str, Any] = {"value_type": _value_type(leaf, node), "skip_deserialize": leaf is None}
    if leaf is not None and leaf.kind in (LeafKind.ARRAY, LeafKind.PRNG_KEY):
        value["write_shape"] = list(_shard_shape(leaf))
    keys = [{"key": name, "key_type": _key_type(key)} for name, key in zip(names, path, strict=True)]
    return str(tuple(names)), {"key_metadata": keys, "value_metadata": value}


def _value_type(leaf: Leaf | None, node: Any) -> str:
    """Orbax's name for a kind of leaf or of empty node."""
    if leaf is None:
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return "None"
        for kind, name in ((list, "List"), (tuple, "Tuple"), (Mapping, "Dict")):
            if isinstance(node, kind):
                return name
        return "None"
    if leaf.kind is LeafKind.VALUE:
        return "string" if leaf.value_type is not None and issubclass(leaf.value_type, str) else "scalar"
    return "np.ndarray" if leaf.kind is LeafKind.NUMPY else "jax.Array"


def _key_type(key: Any) -> int:
    if isinstance(key, jax.tree_util.SequenceKey | jax.tree_util.FlattenedIndexKey):
        return _SEQUENCE_KEY
    return _MAPPING_KEY


def _array_entry(leaf: Leaf) -> dict[str, Any]:
    """What Orbax keeps beside an array: the implementation of PRNG keys, and the shape of a shard.

    Where chunks are smaller than shards, the array's own metadata says so; that is what readers use.
    """
    shape = list(_shard_shape(leaf))
    kind = {"random_key_impl": leaf.key_impl} if leaf.kind is LeafKind.PRNG_KEY else None
    entry = {"param_name": leaf.name, "write_shape": shape, "chunk_shape": shape, "ext_metadata": kind}
    return {"array_metadata": entry}


def _shard_shape(leaf: Leaf) -> tuple[int, ...]:
    if leaf.sharding is None:
        return leaf.shape
    return (*leaf.sharding.shard_shape(leaf.logical_shape), *leaf.shape[len(leaf.logical_shape) :])


def _sharding_text(leaf: Leaf) -> str | None:
    """The sharding in Orbax's JSON, for restores without a target; None for kinds it has no form for.

    A large mesh is recorded without its devices: Orbax then takes all devices in their default order. The list
    would be repeated for every leaf.
    """
    sharding = leaf.sharding
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        # Each process has such an array on a device of its own, but all must write the same bytes.
        (device,) = sharding.device_set if jax.process_count() == 1 else jax.devices()[:1]
        return json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": str(device)})
    if not isinstance(sharding, jax.sharding.NamedSharding) or not isinstance(sharding.mesh, jax.sharding.Mesh):
        return None
    mesh = sharding.mesh
    text: dict[str, Any] = {
        "sharding_type": "NamedSharding",
        "shape": list(mesh.devices.shape),
        "axis_names": list(mesh.axis_names),
        "axis_types": [str(kind) for kind in mesh.axis_types],
        "partition_spec": [list(part) if isinstance(part, tuple) else part for part in sharding.spec],
    }
    if mesh.size <= _MAX_RECORDED_DEVICES:
        text["device_mesh"] = {"mesh": _device_ids(mesh.devices.tolist())}
    return json.dumps(text)


def _device_ids(devices: Any) -> Any:
    if isinstance(devices, list):
        return [_device_ids(row) for row in devices]
    return {"id": devices.id}


def _is_leaf_or_empty(node: Any) -> bool:
    return jax.tree_util.tree_structure(node).num_nodes == 1


def _is_empty(node: Any) -> bool:
    return jax.tree_util.tree_structure(node).num_leaves == 0


def _dump(content: Any) -> bytes:
    try:
        return json.dumps(content).encode()
    except (TypeError, ValueError) as error:
        raise UnsupportedStateError(f"the state's metadata has no form in JSON: {error}") from error
