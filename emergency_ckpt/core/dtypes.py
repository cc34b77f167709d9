"""dtypes in JSON: the names of plain numbers, numpy's short form of others, the fields of structures.

Reading gives only dtypes of a fixed size without objects, whatever the text says.
"""

from __future__ import annotations

import re
from typing import Any, cast

import numpy as np

from emergency_ckpt.core.shards import dtype_of

MACHINE_DEPENDENT = (np.longdouble, np.clongdouble)
"""Numbers that differ from machine to machine, and have bytes that mean nothing."""

# Byte order, kind, size and unit of time, as numpy writes them for what has no name that `dtype_of` knows.
_SHORT = re.compile(r"[<>|][biufcmMSUV][1-9]\d{0,6}(\[\d{0,9}(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?")


def is_describable(dtype: np.dtype[Any]) -> bool:
    """Whether the dtype comes back from its description as it is."""
    if dtype.hasobject or dtype.itemsize == 0:
        return False
    try:
        return dtype_from_json(dtype_to_json(dtype)) == dtype
    except (ValueError, TypeError):
        return False


def dtype_to_json(dtype: np.dtype[Any]) -> Any:
    """The description of a dtype; raises ValueError for one that is more than its memory."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": dtype_to_json(base), "shape": list(shape)}
    if dtype.fields is not None:
        if dtype.type is not np.void:
            raise ValueError(f"{dtype} makes objects of a class of its own")
        fields = [[name, dtype_to_json(field[0]), field[1]] for name, field in dtype.fields.items()]
        return {"fields": fields, "itemsize": dtype.itemsize}
    try:
        return dtype.name if dtype_of(dtype.name) == dtype else dtype.str
    except ValueError:
        return dtype.str


def dtype_from_json(content: Any) -> np.dtype[Any]:
    """The dtype of a description; raises ValueError or TypeError for what is none."""
    if isinstance(content, dict):
        return _structure(cast(dict[str, Any], content))
    if not isinstance(content, str):
        raise ValueError(f"{content!r:.80} describes no dtype")
    # numpy's own parser takes whole expressions and fails in many ways: it is only given what fits the pattern.
    dtype = np.dtype(content) if _SHORT.fullmatch(content) else dtype_of(content)
    if dtype.type in MACHINE_DEPENDENT:
        raise ValueError(f"{content} is another number on every machine")
    return dtype


def _structure(raw: dict[str, Any]) -> np.dtype[Any]:
    if "base" in raw:
        return np.dtype((dtype_from_json(raw["base"]), tuple(map(_size, raw["shape"]))))
    names, formats, offsets = zip(*raw["fields"], strict=True)
    described = {
        "names": names,
        "formats": [dtype_from_json(each) for each in formats],
        "offsets": [_size(at) for at in offsets],
        "itemsize": _size(raw["itemsize"]),
    }
    return np.dtype(cast(Any, described))


def _size(content: Any) -> int:
    if type(content) is not int or not 0 <= content < 2**31:
        raise ValueError(f"{content!r:.80} is no size")
    return content
