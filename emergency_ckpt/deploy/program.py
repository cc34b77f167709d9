"""The words of the program's command line: its own, and the flags of the job, so that image and config agree.

What goes in comes out: the flags that a program reads from these words are those of the configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emergency_ckpt.config import FLAGS, Config
from emergency_ckpt.config.load import PACKAGED_BASE
from emergency_ckpt.config.values import read_value
from emergency_ckpt.deploy.names import is_secret
from emergency_ckpt.deploy.values import PREFIX
from emergency_ckpt.errors import ConfigError

MAXTEXT_FLAGS = frozenset(
    {
        "async_checkpointing",
        "base_output_directory",
        "checkpoint_period",
        "checkpoint_storage_concurrent_gb",
        "checkpoint_storage_target_data_file_size_bytes",
        "checkpoint_storage_use_ocdbt",
        "checkpoint_storage_use_zarr3",
        "enable_autocheckpoint",
        "enable_checkpoint_cloud_logger",
        "enable_checkpointing",
        "enable_emergency_checkpoint",
        "enable_multi_tier_checkpointing",
        "enable_single_replica_ckpt_restoring",
        "jax_distributed_initialization_timeout",
        "load_full_state_path",
        "load_parameters_path",
        "local_checkpoint_directory",
        "local_checkpoint_period",
        "max_num_checkpoints_to_keep",
        "mtc_data_parallelism",
        "multi_tier_checkpointing_backup_interval_minutes",
        "multi_tier_checkpointing_backup_interval_steps",
        "run_name",
        "save_checkpoint_on_completion",
    }
)
"""Flags of ours that MaxText's base.yml has; its command line refuses all others."""

_MOST_CHARACTERS = 100_000
"""Linux takes 128 KiB in one argument, and XPK puts the whole command into one."""


def program_words(config: Config, command: tuple[str, ...], program: str) -> tuple[str, ...]:
    """`command` and the flags as `key=value`. Raises ConfigError for what cannot be said there."""
    words = (*command, *_flags(config, program), *_other_keys(config))
    if sum(len(word) + 3 for word in words) > _MOST_CHARACTERS:
        raise ConfigError(
            f"the command line of the program has more than {_MOST_CHARACTERS} characters, because the files "
            f"set {len(config.other_keys)} keys of other programs. Name a file that sets what the image's own "
            "files do not."
        )
    return words


def _flags(config: Config, program: str) -> Iterator[str]:
    given = [flag for flag in FLAGS if _is_given(config, flag)]
    if program == "maxtext" and (foreign := [flag for flag in given if flag not in MAXTEXT_FLAGS]):
        raise ConfigError(
            f"MaxText's command line refuses {', '.join(foreign)} ({config.source_of(foreign[0])}): it has no "
            "such keys. Leave them out, or set deploy_program=own for a program that reads all flags."
        )
    for flag in given:
        yield f"{flag}={_text(getattr(config, flag), is_text=Config.model_fields[flag].annotation is str)}"


def _is_given(config: Config, flag: str) -> bool:
    """Whether somebody set it: the packaged base.yml sets everything, to what is the default anyway."""
    source = config.sources.get(flag)
    return source is not None and (
        not source.startswith(f"{PACKAGED_BASE}:")
        or getattr(config, flag) != Config.model_fields[flag].get_default()
    )


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
        text = value if _stands_for_itself(value, is_text) else json.dumps(value, ensure_ascii=False)
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isprintable():
        raise ConfigError(f"{value!r} has characters that are not printable; a command line cannot carry them.")
    return text


def _stands_for_itself(value: str, is_text: bool) -> bool:
    read = read_value(value, "")
    if is_text:  # a flag that takes text, of which only what YAML calls nothing is read as YAML
        return read.text == value and read.value is not None
    return type(read.value) is str and read.value == value
