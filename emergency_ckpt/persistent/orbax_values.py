"""Values in Orbax's format: numbers as 0-d arrays, strings in a file of their own, nothing else.

What that format cannot hold lies in our side file alone and is an empty node in Orbax's eyes, so that plain
Orbax restores the rest of the step. Which it is depends on the value at hand, not on its type in the layout.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
import tensorstore as ts

from emergency_ckpt.core.values import Value
from emergency_ckpt.errors import CorruptDataError


@dataclasses.dataclass(frozen=True)
class OrbaxValues:
    """The values of a step as Orbax keeps them; `unheld` names those that it cannot keep."""

    numbers: Mapping[str, np.ndarray]
    strings: Mapping[str, str]
    unheld: frozenset[str]


def orbax_values(values: Mapping[str, Value]) -> OrbaxValues:
    """Sorts values by what Orbax's format can hold."""
    strings = {name: str.__str__(value) for name, value in values.items() if _is_text(value)}
    found = {name: _number(value) for name, value in values.items() if name not in strings}
    numbers = {name: number for name, number in found.items() if number is not None}
    return OrbaxValues(numbers, strings, frozenset(values) - set(strings) - set(numbers))


def tree_with_values(tree_file: bytes, values: OrbaxValues) -> bytes:
    """Orbax's description of the tree (`_METADATA`), with each value leaf described as what it is in this step.

    Raises CorruptDataError for a description that is none.
    """
    try:
        tree = json.loads(tree_file)
        for entry in tree["tree_metadata"].values():
            described = entry["value_metadata"]
            name = ".".join(str(key["key"]) for key in entry["key_metadata"])
            # Empty nodes are never read; one of them may have the joined name of a leaf.
            if not described["skip_deserialize"] and (kind := _kind(name, values)):
                entry["value_metadata"] = {"value_type": kind, "skip_deserialize": name in values.unheld}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptDataError(f"the layout carries an unusable description of the tree: {error}") from error
    return json.dumps(tree).encode()


def _kind(name: str, values: OrbaxValues) -> str | None:
    if name in values.unheld:
        return "None"
    if name in values.strings:
        return "string"
    return "scalar" if name in values.numbers else None


def _is_text(value: Value) -> TypeGuard[str]:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates, which JSON does not keep
        return False
    return True


def _number(value: Value) -> np.ndarray | None:
    if isinstance(value, str | bytes | np.ndarray):
        return None
    array: Any = np.asarray(value)
    try:
        ts.dtype(array.dtype)
    except (TypeError, ValueError):
        return None
    return array if array.dtype.kind in "biufcV" else None
