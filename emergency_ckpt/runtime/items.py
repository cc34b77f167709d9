"""Items: what Orbax calls the parts of a checkpoint beside the state, each saved and restored by its handler.

A handler writes an item's files into a private directory at the time of the save. They travel with the extras,
in the same commit as the arrays, and the drain lays them out in the step as Orbax does.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from emergency_ckpt.core.extras import Item
from emergency_ckpt.errors import ConfigError, ExtrasError, UnsupportedStateError
from emergency_ckpt.persistent.files import Files
from emergency_ckpt.persistent.step_files import ITEM_NAMES
from emergency_ckpt.persistent.trees import download_tree

STATE, DATASET = "state", "dataset"
_NOBODY = object()
_RESERVED = (*ITEM_NAMES, "metrics", "process_metadata")
_NAME = re.compile(r"(?!emergency_ckpt)[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_OF_ARRAYS = (
    ocp.args.PyTreeSave,
    ocp.args.StandardSave,
    ocp.args.ArraySave,
    ocp.args.JaxRandomKeySave,
)


@dataclasses.dataclass(frozen=True)
class StoredItem:
    """An item whose files lie in a store that handlers cannot reach themselves."""

    files: Files


def split_items(args: Any) -> tuple[Any, dict[str, ocp.args.CheckpointArgs]]:
    """The state and the other items in what a save was given: the state itself, or Orbax's arguments around it.

    Sizes of chunks and files that they ask for are no part of what is saved, and have no effect. Raises
    UnsupportedStateError when there is no state among them, or it is given with other arguments, or is to be
    saved as something else than it is.
    """
    items: dict[str, ocp.args.CheckpointArgs] = {}
    if isinstance(args, ocp.args.Composite):
        items = dict(args.items())
        if STATE not in items:
            raise UnsupportedStateError(
                f"Composite has the items {sorted(items)}; expected {STATE!r} among them"
            )
        args = items.pop(STATE)
    if isinstance(args, ocp.args.PyTreeSave | ocp.args.StandardSave):
        _refuse_changes(args)
        return args.item, items
    if isinstance(args, ocp.args.CheckpointArgs):
        raise UnsupportedStateError(
            f"a state cannot be saved with {type(args).__name__}; use PyTreeSave or StandardSave"
        )
    return args, items


def _refuse_changes(args: ocp.args.PyTreeSave | ocp.args.StandardSave) -> None:
    kind = type(args).__name__.removesuffix("Args")
    if args.custom_metadata is not None:
        raise UnsupportedStateError(
            f"{kind}(custom_metadata=…) is not supported; give it to save(…, custom_metadata=…)"
        )
    if args.save_args is None:
        return
    keyed, _ = jax.tree_util.tree_flatten_with_path(args.save_args)
    asked = {
        path: leaf.dtype for path, leaf in keyed if isinstance(leaf, ocp.SaveArgs) and leaf.dtype is not None
    }
    if not asked:
        return
    leaves, _ = jax.tree_util.tree_flatten_with_path(args.item)
    cast = [path for path, leaf in leaves if path in asked and getattr(leaf, "dtype", None) != asked[path]]
    if cast:
        raise UnsupportedStateError(
            f"SaveArgs(dtype=…) asks to save {jax.tree_util.keystr(cast[0])} as {np.dtype(asked[cast[0]])} "
            f"({len(cast)} leaves in all); leaves are saved as they are. Cast the state before saving it, or "
            "leave the dtype out"
        )


class ItemHandlers:
    """The handler of each item: the one that was given for it, or the one registered for its arguments."""

    def __init__(
        self,
        item_handlers: ocp.CheckpointHandler | Mapping[str, ocp.CheckpointHandler] | None = None,
        handler_registry: Any = None,
    ) -> None:
        """Orbax's two ways of naming handlers; a single handler is the dataset's. ConfigError for both ways."""
        if item_handlers is not None and handler_registry is not None:
            raise ConfigError("item_handlers and handler_registry exclude each other; give one of them")
        if item_handlers is not None and not isinstance(item_handlers, Mapping):
            item_handlers = {DATASET: item_handlers}
        given = dict(item_handlers or {})
        self._by_name = {name: h() if isinstance(h, type) else h for name, h in given.items()}
        self._registry = handler_registry

    def save(self, name: str, args: ocp.args.CheckpointArgs) -> Item:
        """What the item's handler writes in this process, now.

        Raises UnsupportedStateError for a name or a kind of item that cannot be kept, ExtrasError when the
        handler fails.
        """
        _check(name, args)
        handler = self._handler(name, args)
        if self._is_default(name, args) and isinstance(args, ocp.args.JsonSave):
            return Item(_handler_name(handler), _json_file(name, args))
        with tempfile.TemporaryDirectory(prefix="emergency_ckpt-item-") as directory:
            try:
                handler.save(epath.Path(directory), args=args)
                handler.finalize(epath.Path(directory))
            except Exception as error:
                raise ExtrasError(
                    f"item {name!r} cannot be saved: its handler {_handler_name(handler)} raised "
                    f"{type(error).__name__}: {error}"
                ) from error
            return Item(_handler_name(handler), _read_files(Path(directory)))

    def restore(self, name: str, args: ocp.args.CheckpointArgs, found: Item | epath.Path | StoredItem) -> Any:
        """What the item's handler makes of its files, which are given, or lie in a directory or in a bucket.

        Raises ExtrasError when the handler fails, PersistentStoreError when the bucket does.
        """
        if isinstance(found, StoredItem):
            with tempfile.TemporaryDirectory(prefix="emergency_ckpt-item-") as directory:
                download_tree(found.files, "", Path(directory))
                return self.restore(name, args, epath.Path(directory))
        if isinstance(found, Item):
            with tempfile.TemporaryDirectory(prefix="emergency_ckpt-item-") as directory:
                _write_files(Path(directory), found.files)
                return self.restore(name, args, epath.Path(directory))
        handler = self._handler(name, args)
        try:
            return handler.restore(found, args=args)
        except Exception as error:
            raise ExtrasError(
                f"item {name!r} cannot be restored: its handler {_handler_name(handler)} raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def close(self) -> None:
        """Closes the handlers that were given by name, once."""
        handlers, self._by_name = self._by_name, {}
        for handler in handlers.values():
            handler.close()

    def _is_default(self, name: str, args: ocp.args.CheckpointArgs) -> bool:
        """Whether the handler is the one that is registered for such arguments."""
        return name not in self._by_name and self._registered_name(name, args) is _NOBODY

    def _registered_name(self, name: str, args: ocp.args.CheckpointArgs) -> Any:
        """Under which name the caller's registry has such an item (None: under any), or `_NOBODY`."""
        if self._registry is None:
            return _NOBODY
        return next((found for found in (name, None) if self._registry.has(found, args)), _NOBODY)

    def _handler(self, name: str, args: ocp.args.CheckpointArgs) -> ocp.CheckpointHandler:
        if name in self._by_name:
            return self._by_name[name]
        registered_name = self._registered_name(name, args)
        if self._registry is not None and registered_name is not _NOBODY:
            return self._registry.get(registered_name, args)
        try:
            return ocp.args.get_registered_handler_cls(args)()
        except (TypeError, ValueError) as error:
            raise ExtrasError(
                f"no handler is known for item {name!r} with {type(args).__name__}: {error}. Give one as "
                "item_handlers={…} or handler_registry=… when making the manager."
            ) from error


def _json_file(name: str, args: ocp.args.JsonSave) -> dict[str, bytes]:
    """What Orbax's handler writes, without its threads and signals: JSON is saved at many steps."""
    if jax.process_index() != 0:
        return {}
    try:
        return {"metadata": json.dumps(args.item).encode()}
    except (TypeError, ValueError) as error:
        raise ExtrasError(f"item {name!r} is no JSON: {error}") from error


def _check(name: str, args: ocp.args.CheckpointArgs) -> None:
    if name in _RESERVED or not _NAME.fullmatch(name):
        raise UnsupportedStateError(
            f"an item cannot be called {name!r}: expected at most 100 letters, digits, '_' and '-', and "
            f"none of {', '.join(_RESERVED)}"
        )
    if isinstance(args, _OF_ARRAYS) and jax.process_count() > 1:
        raise UnsupportedStateError(
            f"item {name!r} is a {type(args).__name__}: arrays that several processes hold are saved as part "
            f"of the state; put them into one tree, such as {{'state': …, {name!r}: …}}"
        )


def _handler_name(handler: Any) -> str:
    """As Orbax names handlers in the metadata of a step."""
    if hasattr(handler, "typestr"):
        return handler.typestr()
    return f"{type(handler).__module__}.{type(handler).__qualname__}"


def _read_files(directory: Path) -> dict[str, bytes]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def _write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
