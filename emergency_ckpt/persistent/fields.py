"""Fields of our own files. A checksum says that bytes are as written, not that they are what we would write.

Every field is checked before it is used, so that a file by another hand is damage and no crash.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import CorruptDataError

_T = TypeVar("_T")
# What reading JSON, and looking into it, may raise.
UNUSABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def parsed(raw: Any, parse: Callable[[Any], _T], where: str, advice: str = "") -> _T:
    """What `parse` makes of the content of the file `where`; CorruptDataError for fields of another kind."""
    try:
        return parse(raw)
    except UNUSABLE as error:
        raise CorruptDataError(
            f"{where} has an unusable field: {type(error).__name__}: {error}.{advice and ' '}{advice}"
        ) from error


def whole_number(raw: Any) -> int:
    """A whole number of at most 64 bits, not negative."""
    if type(raw) is not int or not 0 <= raw < 2**64:
        raise ValueError(f"expected a whole number from 0 to 2**64 - 1, found {raw!r:.40}")
    return raw


def typed(raw: Any, kind: type[_T]) -> _T:
    if not isinstance(raw, kind):
        raise TypeError(f"expected a {kind.__name__}, found {raw!r:.40}")
    return raw


def step_id(raw: Any) -> StepId:
    generation, step = (whole_number(part) for part in typed(raw, list))
    return StepId(generation, step)
