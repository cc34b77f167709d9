"""Sentences about flags and their values: what a flag expects, and what was wrong with a value.

Every message names the flag, the value that was found, where it was written, and what was expected.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from emergency_ckpt.config.names import did_you_mean

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def expected(field: FieldInfo) -> str:
    """What values a flag takes, in words: "a whole number of at least 1, or None"."""
    return _expected(field.annotation, field.metadata)


def is_choice(field: FieldInfo) -> bool:
    """Whether a flag takes one of a few words."""
    return get_origin(field.annotation) is Literal


def explain(error: ValidationError, fields: Mapping[str, FieldInfo], sources: Mapping[str, str]) -> str:
    """One readable line per flag that could not be used.

    `sources` says where each value was written; a flag that is not in it was given in Python.
    """
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        flag = str(problem["loc"][0])
        if flag in lines:  # a flag that takes one of two types reports once per type
            continue
        if problem["type"] == "extra_forbidden":
            flags = [name for name, field in fields.items() if not field.exclude]
            lines[flag] = f"{flag}: there is no such flag.{did_you_mean(flag, flags)}"
            continue
        reason = problem.get("ctx", {}).get("error")  # what a validator of ours said
        why = f" ({reason})" if reason else ""
        lines[flag] = (
            f"{flag}: expected {expected(fields[flag])}{why}, found {problem['input']!r} "
            f"({sources.get(flag, 'given in Python')})."
        )
    count = f"{len(lines)} flags" if len(lines) > 1 else "One flag"
    return f"{count} cannot be used:\n" + "\n".join(f"  - {line}" for line in lines.values())


def _expected(annotation: Any, metadata: Iterable[Any]) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):
        return ", or ".join(_expected(option, metadata) for option in get_args(annotation))
    if annotation is type(None):
        return "None"
    if hasattr(annotation, "__metadata__"):
        return _expected(annotation.__origin__, [*_flatten(annotation.__metadata__), *metadata])
    bounds = "" if annotation is str else _bounds(metadata)
    return _KINDS[annotation] + bounds


def _bounds(metadata: Iterable[Any]) -> str:
    # pydantic keeps `ge=` and `gt=` as objects with an attribute of that name.
    for item in metadata:
        if hasattr(item, "ge"):
            return f" of at least {item.ge}"
        if hasattr(item, "gt"):
            return f" above {item.gt}"
    return ""


def _flatten(metadata: Iterable[Any]) -> Iterable[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item
