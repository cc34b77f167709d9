"""The templates of scripts: whatever a template writes out is quoted for the shell, unless it is a comment.

A template cannot forget to quote, because the environment does it; a name that it does not know is an error.
"""

from __future__ import annotations

import functools
import shlex
import textwrap
from typing import Any

import jinja2

_WIDTH = 110


class _Raw(str):
    """Text of a comment, every line of which begins with `#`."""


def render(template: str, **names: Any) -> str:
    """The script that a file of `xpk_templates/` and these names give."""
    return _environment().get_template(template).render(**names)


def comment(text: str | list[str] | tuple[str, ...]) -> str:
    """Paragraphs as lines that begin with `# `; raises ValueError for what could end such a line."""
    paragraphs = [text] if isinstance(text, str) else text
    lines: list[str] = []
    for paragraph in paragraphs:
        if not paragraph.isprintable():
            raise ValueError(f"{paragraph!r} cannot be a comment")
        more = "  " if paragraph.startswith("- ") else ""
        wrapped = textwrap.wrap(
            paragraph, _WIDTH, subsequent_indent=more, break_on_hyphens=False, break_long_words=False
        )
        lines += [f"# {line}" for line in wrapped] or ["#"]
    return _Raw("\n".join(lines))


def for_kubernetes(text: str) -> str:
    """The text in a pod's `command`, `args` or `env`, where Kubernetes expands `$(NAME)` and halves `$$`."""
    return text.replace("$", "$$")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("emergency_ckpt.deploy", "xpk_templates"),
        undefined=jinja2.StrictUndefined,
        finalize=_quoted,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    environment.filters["comment"] = comment
    return environment


def _quoted(value: Any) -> str:
    if isinstance(value, _Raw | jinja2.Undefined):
        return value  # pyright: ignore[reportReturnType]
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise TypeError(f"a template writes out {value!r}, which is neither text nor a whole number")
    return shlex.quote(str(value))
