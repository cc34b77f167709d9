"""YAML as MaxText's files and command lines write it, with the place where each value stands.

Scalars follow YAML 1.2 and Python's habits (`10_000`, `1e-3`, `None`), not YAML 1.1's: `on` is a word, `12:30`
is not a number in base 60, and a date is text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from emergency_ckpt.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """One value as somebody wrote it.

    Attributes:
      value: read as YAML.
      text: as written, for flags that take text (`run_name=2024_01` is no number); None for lists and maps.
      source: where it was written, for messages.
    """

    value: Any
    text: str | None
    source: str


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars described above."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"|~|null|Null|NULL|None", ["", *"~nN"]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def stands_for_itself(text: str, *, is_text: bool) -> bool:
    """Whether text is read as it is after `key=` (`is_text`: of a flag that takes text), without quotes."""
    read = read_value(text, "")
    if is_text:  # Of which only what YAML calls nothing is read as YAML.
        return read.text == text and read.value is not None
    return type(read.value) is str and read.value == text


def read_value(text: str, source: str) -> Given:
    """A value from a command line or the environment.

    Text that is not YAML stands for itself, so that a path or a prompt needs no quotes.
    """
    text = text.strip()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError):
        return Given(text, text, source)
    if isinstance(node, yaml.ScalarNode) and node.style in ("'", '"'):
        text = node.value
    return Given(value, text, source)


def read_file(path: Path) -> dict[str, Given]:
    """The top-level keys of a YAML file, each with its file and line.

    Raises `ConfigError` when the file cannot be read, is not a map of keys, or sets a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error}") from error
    try:
        loader = _Loader(text)
        loader.name = str(path)  # PyYAML's messages name it, with the line
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"{path} must hold lines of the form `key: value`, found something else at the top."
            )
        _refuse_duplicates(path, node)
        loader.flatten_mapping(node)
        return dict(_entries(path, node, loader))
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def _entries(path: Path, node: yaml.MappingNode, loader: _Loader) -> Iterator[tuple[str, Given]]:
    for key, value in node.value:
        text = value.value if isinstance(value, yaml.ScalarNode) else None
        place = f"{path}:{key.start_mark.line + 1}"
        yield str(key.value), Given(loader.construct_object(value, deep=True), text, place)


def _refuse_duplicates(path: Path, node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        first = lines.setdefault(str(key.value), line)
        if first != line:
            raise ConfigError(
                f"{path} sets {key.value} twice, in lines {first} and {line}. Remove one of them."
            )
