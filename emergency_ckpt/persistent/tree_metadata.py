"""What Orbax's own files say about an item: its leaves and how they are stored.

Read for checkpoints that another program wrote; ours carry a layout, which says more and is checksummed.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

from emergency_ckpt.core.layout import ARRAY_METADATA_FILE, key_implementations
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.files import Files
from emergency_ckpt.persistent.step_files import ORBAX_STRINGS_FILE, ORBAX_TREE_FILE

_SEQUENCE_KEY = 1
_EMPTY = {"Dict": {}, "List": [], "Tuple": ()}
_ARRAYS = ("jax.Array", "np.ndarray")


@dataclasses.dataclass(frozen=True)
class TreeMetadata:
    """Leaves by kind, and the storage format of the item.

    `fills_missing` tells that chunks which equal the fill value may have been left out.
    """

    arrays: tuple[str, ...]
    numbers: tuple[str, ...]
    strings: tuple[str, ...]
    ocdbt: bool
    zarr3: bool
    fills_missing: bool


def read_tree_metadata(files: Files, item: str) -> TreeMetadata:
    """Reads `_METADATA`. Raises PersistentStoreError where there is none or it has unknown kinds of leaves."""
    path = f"{item}/{ORBAX_TREE_FILE}".lstrip("/")
    where = files.locate(path)
    try:
        raw = json.loads(files.read(path))
        entries = [
            (".".join(str(key["key"]) for key in entry["key_metadata"]), entry["value_metadata"])
            for entry in raw["tree_metadata"].values()
        ]
        kinds = {name: str(value["value_type"]) for name, value in entries if not value["skip_deserialize"]}
    except FileNotFoundError as error:
        raise PersistentStoreError(
            f"{where} is missing: not a checkpoint of a PyTree, or one of a format older than this package"
            " reads. Convert it by restoring and saving it with a current Orbax."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptDataError(f"{where} is damaged: {error}") from error
    unknown = {name: kind for name, kind in kinds.items() if kind not in (*_ARRAYS, "scalar", "string")}
    if unknown:
        raise PersistentStoreError(
            f"{where} has leaves of kinds that only the program which wrote them can read: {unknown}"
        )
    use_ocdbt = raw.get("use_ocdbt")
    if use_ocdbt is None:
        use_ocdbt = any(entry.name == "manifest.ocdbt" for entry in files.entries(item))
    return TreeMetadata(
        arrays=tuple(sorted(n for n, kind in kinds.items() if kind in _ARRAYS)),
        numbers=tuple(sorted(n for n, kind in kinds.items() if kind == "scalar")),
        strings=tuple(sorted(n for n, kind in kinds.items() if kind == "string")),
        ocdbt=bool(use_ocdbt),
        zarr3=bool(raw.get("use_zarr3", False)),
        fills_missing=not raw.get("store_array_data_equal_to_fill_value", False),
    )


@dataclasses.dataclass(frozen=True)
class TreeNode:
    """A leaf, or a node without leaves, of a saved tree.

    Attributes:
      name: of the leaf: its keys joined by '.'.
      keys: the way to it: names, and positions in sequences.
      is_empty, empty: whether it is no leaf, and what stands there: an empty container, or None.
    """

    name: str
    keys: tuple[str | int, ...]
    is_empty: bool
    empty: Any


def tree_nodes(tree_file: bytes, where: str) -> tuple[TreeNode, ...]:
    """The nodes that a `_METADATA` file lists, in its order. Raises CorruptDataError naming `where`."""
    try:
        return tuple(_tree_node(entry) for entry in json.loads(tree_file)["tree_metadata"].values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptDataError(f"{where} is damaged: {error}") from error


def _tree_node(entry: Any) -> TreeNode:
    keys = entry["key_metadata"]
    value = entry["value_metadata"]
    return TreeNode(
        ".".join(str(key["key"]) for key in keys),
        tuple(int(key["key"]) if key["key_type"] == _SEQUENCE_KEY else str(key["key"]) for key in keys),
        bool(value["skip_deserialize"]),
        copy.copy(_EMPTY.get(str(value["value_type"]))),
    )


def read_strings(files: Files, item: str, names: tuple[str, ...]) -> dict[str, str]:
    """The values of string leaves."""
    if not names:
        return {}
    path = f"{item}/{ORBAX_STRINGS_FILE}".lstrip("/")
    try:
        raw: dict[str, Any] = json.loads(files.read(path))
        return {name: str(raw[name]) for name in names}
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptDataError(
            f"{files.locate(path)} does not hold the strings {list(names)}: {error}"
        ) from error


def read_key_implementations(files: Files, item: str) -> dict[str, str]:
    """PRNG implementation by leaf; empty where the writer did not say."""
    path = f"{item}/{ARRAY_METADATA_FILE}".lstrip("/")
    try:
        return key_implementations(files.read(path))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptDataError(f"{files.locate(path)} is damaged: {error}") from error
