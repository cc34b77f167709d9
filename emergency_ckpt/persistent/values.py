"""Leaves that are not arrays (Python and numpy scalars, strings): their form in JSON and in Orbax's format.

What is read back has the type and the bits of what was written, which Orbax's format alone does not keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from emergency_ckpt.core.shards import dtype_of
from emergency_ckpt.errors import CorruptDataError, UnsupportedStateError

Value = bool | int | float | complex | str | np.generic


def values_to_json(values: Mapping[str, Value]) -> dict[str, list[Any]]:
    """`{leaf: [type, content]}`; raises UnsupportedStateError for a value of another type."""
    return {name: _to_json(name, value) for name, value in sorted(values.items())}


def values_from_json(raw: Mapping[str, Any]) -> dict[str, Value]:
    """The inverse; raises CorruptDataError for what `values_to_json` did not write."""
    try:
        return {str(name): _from_json(kind, content) for name, (kind, content) in raw.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptDataError(f"the saved values of non-array leaves are damaged: {error}") from error


def as_array(name: str, value: Value) -> np.ndarray:
    """The 0-d array as which Orbax stores a number; raises UnsupportedStateError where it has none."""
    array = np.asarray(value)
    if array.dtype.kind not in "biufcV" or array.ndim:
        raise UnsupportedStateError(
            f"leaf {name!r}: the {type(value).__name__} {value!r} has no form in a checkpoint (expected a"
            " number of at most 64 bits, a complex of 128, or a string). Keep it in custom metadata instead."
        )
    return array


def _to_json(name: str, value: Value) -> list[Any]:
    if isinstance(value, np.generic):
        return ["numpy", [value.dtype.name, np.asarray(value).tobytes().hex()]]
    if isinstance(value, bool | int | float | str):
        return [type(value).__name__, value]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    raise UnsupportedStateError(
        f"leaf {name!r} is a {type(value).__name__}; expected a Python or numpy scalar or a string."
    )


def _from_json(kind: str, content: Any) -> Value:
    if kind == "numpy":
        name, data = content
        return np.frombuffer(bytes.fromhex(data), dtype_of(name))[0]
    if kind == "complex":
        return complex(*content)
    plain = {"bool": bool, "int": int, "float": float, "str": str}[kind] if kind in _PLAIN else None
    if plain is None or not isinstance(content, plain):
        raise ValueError(f"{content!r} is not a value of type {kind!r}")
    return content


_PLAIN = ("bool", "int", "float", "str")
