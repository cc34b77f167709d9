"""Scripts taken apart again: the words of each command that a script would run."""

from __future__ import annotations

import re
import shlex


def words_of(script: str, command: str) -> list[str]:
    """The words of the command that begins so, without the `"$@"` at its end."""
    found = re.search(rf'^ *{re.escape(command)} .*?"\$@"$', script, re.MULTILINE | re.DOTALL)
    assert found, f"{command} is not in the script"
    *words, rest = shlex.split(found[0].replace(" \\\n", " "))
    assert rest == "$@"
    return words


def options_of(script: str, command: str) -> dict[str, list[str]]:
    """The values of each `--option=value` of that command; an option without a value has an empty one."""
    options: dict[str, list[str]] = {}
    for word in words_of(script, command)[len(command.split()) :]:
        name, _, value = word.partition("=")
        options.setdefault(name, []).append(value)
    return options
