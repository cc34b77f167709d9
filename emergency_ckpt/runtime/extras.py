"""Extras: small state of each process (data iterator, host RNG, counters), saved with the arrays in one commit.

They travel as JSON in the manifest, and the files of items with them. Each process's extras are kept by up to
two more processes in other slices, so that losing slices does not lose the position in the data.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from etils import epath

from emergency_ckpt.core.extras import Item, ProcessExtras
from emergency_ckpt.errors import ExtrasError
from emergency_ckpt.runtime.items import ItemHandlers

MAX_BYTES = 1024 * 1024
_BYTES = "__bytes__"
_ARRAY = "__ndarray__"


@dataclasses.dataclass(frozen=True)
class SavedExtras:
    """What one process finds saved beside the arrays of a restored step.

    Attributes:
      own: its extras; `why_none` says why there are none.
      items: the items that can be had, whoever wrote their files: these, or the directory where they lie.
    """

    own: ProcessExtras | None
    why_none: str
    items: Mapping[str, Item | epath.Path] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ReceivedExtras:
    """Extras as plain data by name, and what the handlers made of the items."""

    values: Mapping[str, Any]
    items: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class WantedExtras:
    """What the caller of a restore wants back beside the arrays; the same on all processes.

    Attributes:
      targets: objects with `set_state()` by name.
      items: Orbax's restore arguments by item.
      elsewhere: items that may be missing, with the steps for which the caller has them from elsewhere.
    """

    targets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    items: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    elsewhere: Mapping[str, Collection[int]] = dataclasses.field(default_factory=dict)
    handlers: ItemHandlers = dataclasses.field(default_factory=ItemHandlers)

    def receive(self, step: int, saved: SavedExtras) -> ReceivedExtras:
        """Puts everything of `step` in its place. Raises ExtrasError when something wanted is not there."""
        values = deliver(saved, self.targets)
        items = {}
        for name, args in self.items.items():
            try:
                items[name] = self._receive_item(name, args, saved)
            except ExtrasError as error:
                if name not in self.elsewhere:
                    raise
                if step not in self.elsewhere[name]:
                    steps = sorted(self.elsewhere[name])
                    raise ExtrasError(f"{error} Elsewhere it is kept for the steps {steps}.") from error
        return ReceivedExtras(values, items)

    def _receive_item(self, name: str, args: Any, saved: SavedExtras) -> Any:
        if name not in saved.items:
            raise ExtrasError(
                f"item {name!r} is wanted, but the step holds {sorted(saved.items) or 'no items'}. Restore "
                "without it, or a step that was saved with it."
            )
        return self.handlers.restore(name, args, saved.items[name])


def capture(extras: Mapping[str, Any] | None, items: Mapping[str, Item], *, always: bool = False) -> str | None:
    """The extras and the items of this process as one text; None where there are none, unless `always`.

    Either all processes have a text at a save or none: those that have one wait for those of the others.

    A value is an object with `get_state()` (a grain iterator), or plain data: None, bools, numbers, strings,
    bytes, numpy arrays, and lists, tuples (which come back as lists) and dicts of these.
    Raises ExtrasError for anything else, and for more than 1 MiB.
    """
    if not extras and not items and not always:
        return None
    plain = {name: _encode(_state_of(value), name) for name, value in (extras or {}).items()}
    text = ProcessExtras(plain, items).to_text()
    if len(text) > MAX_BYTES:
        sizes = {name: len(ProcessExtras({name: value}).to_text()) for name, value in plain.items()}
        sizes |= {name: len(ProcessExtras(items={name: item}).to_text()) for name, item in items.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        raise ExtrasError(
            f"the extras of this process take {len(text)} bytes, at most {MAX_BYTES} are allowed; the "
            f"largest is {largest!r} with {sizes[largest]} bytes. Put large data into the state as arrays."
        )
    return text


def deliver(saved: SavedExtras, wanted: Mapping[str, Any] | None) -> dict[str, Any]:
    """The saved extras as data; those for which `wanted` has an object with `set_state()` are put back into it.

    Raises ExtrasError when something wanted is not there.
    """
    values = {name: _decode(value) for name, value in saved.own.values.items()} if saved.own else {}
    for name, target in (wanted or {}).items():
        if not hasattr(target, "set_state"):
            continue
        if name not in values:
            found = f"the checkpoint holds {sorted(values)}" if saved.own else saved.why_none
            raise ExtrasError(
                f"extras {name!r} are wanted, but {found}. Restore without these extras, and put what they "
                "were for (a data iterator, say) into its place yourself."
            )
        target.set_state(values[name])
    return values


def fits(item: Item) -> bool:
    """Whether an item leaves room for the other extras of its process."""
    return len(ProcessExtras(items={"": item}).to_text()) <= MAX_BYTES // 2


def _state_of(value: Any) -> Any:
    return value.get_state() if hasattr(value, "get_state") else value


def _encode(value: Any, where: str) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.bool_() | np.integer() | np.floating():
            return value.item()
        case bytes() | bytearray():
            return {_BYTES: base64.b64encode(value).decode()}
        case np.ndarray() if not value.dtype.hasobject:
            content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
            return {_ARRAY: [value.dtype.str, list(value.shape), content]}
        case list() | tuple():
            return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
        case dict():
            odd = [key for key in value if not isinstance(key, str) or key in (_BYTES, _ARRAY)]
            if odd:
                raise ExtrasError(f"extras {where} have the key {odd[0]!r}; keys must be ordinary strings")
            return {key: _encode(item, f"{where}.{key}") for key, item in value.items()}
    raise ExtrasError(
        f"extras {where} are of type {type(value).__name__}, which cannot be saved; give plain data (numbers, "
        "strings, bytes, arrays, lists, dicts) or an object with get_state() and set_state()"
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_BYTES}:
            return base64.b64decode(value[_BYTES])
        if value.keys() == {_ARRAY}:
            dtype, shape, content = value[_ARRAY]
            return np.frombuffer(base64.b64decode(content), dtype=np.dtype(dtype)).reshape(shape).copy()
        return {key: _decode(item) for key, item in value.items()}
    return value
