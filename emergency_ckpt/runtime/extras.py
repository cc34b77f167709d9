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
from emergency_ckpt.core.plan_words import processes_named
from emergency_ckpt.errors import ExtrasError
from emergency_ckpt.runtime.declared_extras import GlobalExtras, ReshardedExtras, undeclared
from emergency_ckpt.runtime.items import ItemHandlers, StoredItem

MAX_BYTES = 1024 * 1024
_BYTES = "__bytes__"
_ARRAY = "__ndarray__"


@dataclasses.dataclass(frozen=True)
class SavedExtras:
    """What one process finds saved beside the arrays of a restored step.

    Attributes:
      own: its extras; `why_none` says why there are none.
      items: the items that can be had, whoever wrote their files: these, or where they lie.
      is_converted: whether its extras were made from those of another number of processes, so that `why_none`
        says why some are missing.
    """

    own: ProcessExtras | None
    why_none: str
    items: Mapping[str, Item | epath.Path | StoredItem] = dataclasses.field(default_factory=dict)
    is_converted: bool = False


@dataclasses.dataclass(frozen=True)
class ReceivedExtras:
    """Extras as plain data by name, and what the handlers made of the items."""

    values: Mapping[str, Any]
    items: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class WantedExtras:
    """What the caller of a restore wants back beside the arrays; the same on all processes.

    Attributes:
      targets: objects with `set_state()`, or declarations of such, by name.
      items: Orbax's restore arguments by item.
      elsewhere: items that may be missing, with the steps for which the caller has them from elsewhere.
    """

    targets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    items: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    elsewhere: Mapping[str, Collection[int]] = dataclasses.field(default_factory=dict)
    handlers: ItemHandlers = dataclasses.field(default_factory=ItemHandlers)

    @property
    def needed(self) -> frozenset[str]:
        """The names of extras without which the restore fails."""
        return frozenset(
            name
            for name, target in self.targets.items()
            if isinstance(target, ReshardedExtras) or hasattr(undeclared(target), "set_state")
        )

    @property
    def reshards(self) -> bool:
        """Whether the extras of all processes are needed where their number was another one."""
        return any(isinstance(target, ReshardedExtras) for target in self.targets.values())

    def receive(self, step: int, saved: SavedExtras) -> ReceivedExtras:
        """Puts everything of `step` in its place. Raises ExtrasError when something wanted is not there."""
        values = self.deliver(saved)
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

    def deliver(self, saved: SavedExtras) -> dict[str, Any]:
        """The saved extras as data; those for which there is an object with `set_state()` are put back into it.

        Raises ExtrasError when something wanted is not there.
        """
        values = {name: _decode(value) for name, value in saved.own.values.items()} if saved.own else {}
        for name in self.targets:
            if name not in self.needed:
                continue
            if name not in values:
                holds = saved.own is not None and not saved.is_converted
                found = f"the checkpoint holds {sorted(values)}" if holds else saved.why_none
                raise ExtrasError(
                    f"extras {name!r} are wanted, but {found}. Restore without these extras, and put what they "
                    "were for (a data iterator, say) into its place yourself."
                )
            target = undeclared(self.targets[name])
            if hasattr(target, "set_state"):
                target.set_state(values[name])
        return values

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
    bytes, numpy arrays, and lists, tuples (which come back as lists) and dicts of these; or a declaration.
    Raises ExtrasError for anything else, and for more than 1 MiB.
    """
    if not extras and not items and not always:
        return None
    given = extras or {}
    plain = {name: _encode(_state_of(undeclared(value)), name) for name, value in given.items()}
    same = frozenset(name for name, value in given.items() if isinstance(value, GlobalExtras))
    text = ProcessExtras(plain, items, same).to_text()
    if len(text) > MAX_BYTES:
        sizes = {name: len(ProcessExtras({name: value}).to_text()) for name, value in plain.items()}
        sizes |= {name: len(ProcessExtras(items={name: item}).to_text()) for name, item in items.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        raise ExtrasError(
            f"the extras of this process take {len(text)} bytes, at most {MAX_BYTES} are allowed; the "
            f"largest is {largest!r} with {sizes[largest]} bytes. Put large data into the state as arrays."
        )
    return text


def convert(
    targets: Mapping[str, Any], saved: Mapping[int, ProcessExtras], saved_by: int, process: int, count: int
) -> ProcessExtras | None:
    """The extras of one of `count` processes from those that another number of processes, `saved_by`, saved.

    Args:
      targets: what is wanted: all that `ReshardedExtras` say how to make is made.
      saved: by process that saved them; of values that are the same everywhere one process's are enough.

    None where nothing can be had so. Raises ExtrasError where states are missing or cannot be made.
    """
    first = saved[min(saved)] if saved else ProcessExtras()
    values = {name: first.values[name] for name in sorted(first.same_everywhere)}
    for name, target in targets.items():
        if not isinstance(target, ReshardedExtras):
            continue
        having = {p for p, each in saved.items() if name in each.values}
        missing = [p for p in range(saved_by) if p not in having]
        if missing and (having or len(saved) < saved_by):
            raise ExtrasError(
                f"extras {name!r} were saved by {saved_by} processes, and those of {processes_named(missing)} "
                "are on no ramdisk and not in the persistent tier. Restore an older step, or without them."
            )
        if not missing:
            states = [_decode(saved[p].values[name]) for p in range(saved_by)]
            values[name] = _encode(_resharded(name, target, states, process, count), name)
    resharded = {name for name, target in targets.items() if isinstance(target, ReshardedExtras)}
    made = ProcessExtras(values, {}, first.same_everywhere - resharded)
    if len(made.to_text()) > MAX_BYTES:
        raise ExtrasError(
            f"the extras that were made of those of {saved_by} processes take {len(made.to_text())} bytes, at "
            f"most {MAX_BYTES} are allowed"
        )
    return made if values else None


def _resharded(name: str, target: ReshardedExtras, states: list[Any], process: int, count: int) -> Any:
    try:
        return target.reshard(states, process, count)
    except Exception as error:
        raise ExtrasError(
            f"the reshard function of extras {name!r} failed for process {process} of {count} with the states "
            f"of {len(states)}: {type(error).__name__}: {error}"
        ) from error


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
