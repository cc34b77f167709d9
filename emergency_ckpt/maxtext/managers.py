"""The managers that MaxText makes, with MaxText's signatures.

What MaxText passes comes from its own flags; what it has no flags for comes from a file or a variable of ours,
because its command line, its files and its environment refuse keys that it does not know.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shlex
from collections.abc import Mapping
from typing import Any

import jax

from emergency_ckpt.config import FLAGS, Config, load_config
from emergency_ckpt.config.load import is_given
from emergency_ckpt.config.names import MAXTEXT_FILE_VARIABLE, MAXTEXT_WORDS_VARIABLE
from emergency_ckpt.errors import ConfigError
from emergency_ckpt.manager import CheckpointManager
from emergency_ckpt.persistent.object_store.urls import check_location
from emergency_ckpt.runtime.settings import Settings, settings_from_config

_TO_SAVED_FORM = (
    ("maxtext.common.train_state_nnx", "to_checkpoint_dict"),
    ("maxtext.common.train_state_nnx", "to_linen_checkpoint_dict"),
)
"""What MaxText's versions call to make of an nnx state what they save."""


def create_orbax_emergency_checkpoint_manager(
    local_checkpoint_dir: str,
    persistent_checkpoint_dir: str,
    global_mesh: jax.sharding.Mesh,
    abstract_state: Any,
    local_save_interval_steps: int,
    persistent_save_interval_steps: int,
    orbax_logger: Any = None,
) -> CheckpointManager:
    """Takes the place of MaxText's function of this name. Collective.

    Args:
      local_checkpoint_dir: ramdisk directory of this host (`local_checkpoint_directory`); it must exist.
      persistent_checkpoint_dir: MaxText's `checkpoint_dir`: a directory that all processes reach, or a `gs://`
        or `s3://` URL.
      global_mesh: the job's mesh; its first axis, or `checkpoint_replica_axis`, tells slices apart.
      abstract_state: the state that is going to be saved, with shardings. An nnx state is turned into what
        MaxText saves of it, by MaxText's own function.
      local_save_interval_steps, persistent_save_interval_steps: steps between two saves on the ramdisks
        (`local_checkpoint_period`) and on the persistent tier (`checkpoint_period`).
      orbax_logger: Orbax's `AbstractLogger`; gets a dict per event.

    All other flags are those of the file that the environment variable EMERGENCY_CKPT_CONFIG names, then of the
    `key=value` words in EMERGENCY_CKPT_FLAGS, and otherwise their defaults; but `enable_autocheckpoint` is True
    where nobody says otherwise, because the manager that MaxText makes here reacts to preemptions, too.

    Raises what `CheckpointManager` raises, and ConfigError for a file that cannot be used.
    """
    settings = settings_of(
        local_checkpoint_dir,
        persistent_checkpoint_dir,
        local_save_interval_steps,
        persistent_save_interval_steps,
    )
    if orbax_logger is not None:
        settings = dataclasses.replace(settings, event_listener=orbax_logger.log_entry)
    return CheckpointManager.from_settings(settings, global_mesh, _saved_form(abstract_state))


def settings_of(
    local_directory: str,
    persistent_directory: str,
    local_period: int,
    persistent_period: int,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """What MaxText says, on top of what the file says. Raises ConfigError."""
    base, run = _base_and_run(persistent_directory)
    words = [
        "enable_checkpointing=True",
        "enable_emergency_checkpoint=True",
        "enable_multi_tier_checkpointing=False",
        f"local_checkpoint_directory={local_directory}",
        f"local_checkpoint_period={local_period}",
        f"checkpoint_period={persistent_period}",
        f"base_output_directory={base}",
        f"run_name={run}",
    ]
    config = _load(words, environ)
    if not is_given(config, "enable_autocheckpoint"):
        config = config.replace(enable_autocheckpoint=True)
    return dataclasses.replace(
        settings_from_config(config), persistent_directory=check_location(persistent_directory)
    )


def _load(words: list[str], environ: Mapping[str, str]) -> Config:
    file, said = environ.get(MAXTEXT_FILE_VARIABLE, ""), environ.get(MAXTEXT_WORDS_VARIABLE, "")
    # MaxText reads variables of the same form for all of its keys.
    ours = {name: value for name, value in environ.items() if name.removeprefix("M_").lower() in FLAGS}
    try:
        return load_config(["maxtext", *([file] if file else []), *shlex.split(said), *words], ours)
    except (ConfigError, ValueError) as error:
        given = {MAXTEXT_FILE_VARIABLE: file, MAXTEXT_WORDS_VARIABLE: said}
        named = "".join(f", {name}={text}" for name, text in given.items() if text)
        raise ConfigError(f"the manager cannot be made of MaxText's flags{named}: {error}") from error


def _base_and_run(directory: str) -> tuple[str, str]:
    """MaxText's `base_output_directory` and `run_name`; of another directory its parent and its name."""
    parts = directory.rstrip("/").removesuffix("/checkpoints").rpartition("/")
    return parts[0] or "/", parts[2]


def _saved_form(abstract_state: Any) -> Any:
    """Newer versions save a plain tree that they make of an nnx state; that tree is the manager's state."""
    if not hasattr(abstract_state, "to_pure_dict"):
        return abstract_state
    for module, name in _TO_SAVED_FORM:
        try:
            convert = getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
        return convert(abstract_state if name == "to_checkpoint_dict" else abstract_state.to_pure_dict())
    return abstract_state
