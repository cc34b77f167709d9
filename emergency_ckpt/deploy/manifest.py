"""Manifests as text: YAML documents with a comment before each, which read back as what was written.

Text that a YAML reader of another version could take for a number or a truth value is always quoted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from emergency_ckpt.deploy.templates import comment

Document = tuple[Sequence[str], Mapping[str, Any]]
"""Paragraphs of its comment, and what it says."""

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*[A-Za-z0-9_/](:[A-Za-z0-9_./-]+)?")
_WORDS_OF_YAML = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan", "inf"})


class _Numbers(list[int]):
    """A list that is written in one line."""


def numbers(values: Iterable[int]) -> list[int]:
    return _Numbers(values)


def text_of(documents: Iterable[Document]) -> str:
    """All documents, each after its comment."""
    parts = []
    for paragraphs, document in documents:
        body = yaml.dump(
            document, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=10**9
        )
        parts.append(f"{comment(list(paragraphs))}\n{body}" if paragraphs else body)
    return "---\n".join(parts)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    is_plain = bool(_PLAIN.fullmatch(value)) and value.lower() not in _WORDS_OF_YAML
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if is_plain else '"')


def _numbers(dumper: yaml.SafeDumper, value: _Numbers) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(_Numbers, _numbers)
