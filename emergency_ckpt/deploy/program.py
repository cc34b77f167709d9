"""The words of the program's command line: its own, and the flags of the job, so that image and config agree.

What goes in comes out: the flags that a program reads from these words are those of the configuration.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from emergency_ckpt.config import FLAGS, Config
from emergency_ckpt.config.load import is_given
from emergency_ckpt.config.names import MAXTEXT_FLAGS, MAXTEXT_HANDS_ON, MAXTEXT_WORDS_VARIABLE
from emergency_ckpt.config.values import stands_for_itself
from emergency_ckpt.deploy.names import is_secret
from emergency_ckpt.deploy.values import PREFIX
from emergency_ckpt.errors import ConfigError

MAXTEXT_ADAPTER = "emergency_ckpt.maxtext"
_MOST_CHARACTERS = 100_000
"""Linux takes 128 KiB in one argument, and XPK puts the whole command into one."""


def program_words(config: Config, command: tuple[str, ...], program: str) -> tuple[str, ...]:
    """`command` and the flags as `key=value`. Raises ConfigError for what cannot be said so.

    MaxText's command line gets those flags that it knows; the adapter gets, by a variable, those that MaxText
    does not hand on to its manager.
    """
    given = {flag: f"{flag}={_text_of(config, flag)}" for flag in FLAGS if is_given(config, flag)}
    before: tuple[str, ...] = ()
    if program == "maxtext":
        _refuse_what_maxtext_refuses(config, command, given)
        if MAXTEXT_ADAPTER in command and (
            ours := [given[flag] for flag in given if flag not in MAXTEXT_HANDS_ON]
        ):
            # `env` becomes the program, so that signals reach it.
            before = ("env", f"{MAXTEXT_WORDS_VARIABLE}={shlex.join(ours)}")
        given = {flag: word for flag, word in given.items() if flag in MAXTEXT_FLAGS}
    words = (*before, *command, *given.values(), *_other_keys(config))
    if sum(len(word) + 3 for word in words) > _MOST_CHARACTERS:
        raise ConfigError(
            f"the command line of the program has more than {_MOST_CHARACTERS} characters, because the files "
            f"set {len(config.other_keys)} keys of other programs. Name a file that sets what the image's own "
            "files do not."
        )
    return words


def _refuse_what_maxtext_refuses(config: Config, command: tuple[str, ...], given: Iterable[str]) -> None:
    foreign = [flag for flag in given if flag not in MAXTEXT_FLAGS]
    if foreign and MAXTEXT_ADAPTER not in command:
        raise ConfigError(
            f"MaxText's command line refuses {', '.join(foreign)} ({config.source_of(foreign[0])}): it has no "
            f"such keys. Start it as `python3 -m {MAXTEXT_ADAPTER} -m MODULE …`, leave them out, or set "
            "deploy_program=own for a program that reads all flags."
        )
    if config.enable_multi_tier_checkpointing and MAXTEXT_ADAPTER in command:
        raise ConfigError(
            f"enable_multi_tier_checkpointing=True ({config.source_of('enable_multi_tier_checkpointing')}) "
            f"makes MaxText use GKE's replicator, and {MAXTEXT_ADAPTER} refuses that. Set "
            "enable_emergency_checkpoint=True, and keep the backup interval."
        )


def _text_of(config: Config, flag: str) -> str:
    return _text(getattr(config, flag), is_text=Config.model_fields[flag].annotation is str)


def _other_keys(config: Config) -> Iterator[str]:
    for key, value in config.other_keys.items():
        if key.startswith(PREFIX):
            continue
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise ConfigError(f"{config.source_of(key)}: {key!r} is no key that fits into key=value.")
        if is_secret(key) and isinstance(value, str) and value:
            raise ConfigError(
                f"{config.source_of(key)}: {key} looks like a secret, and a command line is no place for one. "
                "Take it out of the file, and give it to the program as a file or variable from a Secret."
            )
        yield f"{key}={_text(value, is_text=False)}"


def _text(value: Any, *, is_text: bool) -> str:
    """The value as `key=value` words are read: as YAML, where text that is not quoted stands for itself."""
    if isinstance(value, Path):
        value = str(value)
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, str):
        text = value if stands_for_itself(value, is_text=is_text) else json.dumps(value, ensure_ascii=False)
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isprintable():
        raise ConfigError(f"{value!r} has characters that are not printable; a command line cannot carry them.")
    return text
