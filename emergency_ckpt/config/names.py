"""Which key was meant: nearest names, and keys of a file that look like a misspelt flag of ours.

A file may hold hundreds of keys of another program. None of those may be taken for a misspelling, and no
misspelling of ours may pass as one of those.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

# Likeness as difflib measures it, 0 to 1. Two dropped or swapped letters leave a name of this length above
# SURE; LIKELY also catches `local_checkpoint_dir` and `max_checkpoints_to_keep`.
SURE = 0.92
LIKELY = 0.8

# Keys of MaxText, of any version, that are more alike to one of our flags than LIKELY and mean something else.
MAXTEXT_NEIGHBOURS = frozenset(
    {
        "checkpoint_storage_device_host_concurrent_gb",
        "dcn_data_parallelism",
        "enable_checkpoint_standard_logger",
        "enable_continuous_checkpointing",
        "ici_data_parallelism",
        "rollout_data_parallelism",
        "save_checkpoint_on_start",
    }
)


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
"""Flags of ours that MaxText's base.yml has; its files, variables and command line refuse all others."""

MAXTEXT_HANDS_ON = frozenset(
    {
        "base_output_directory",
        "checkpoint_period",
        "enable_checkpointing",
        "enable_emergency_checkpoint",
        "local_checkpoint_directory",
        "local_checkpoint_period",
        "run_name",
    }
)
"""What MaxText's emergency manager is told, in one form or another; it hears of no other flag."""

MAXTEXT_FILE_VARIABLE = "EMERGENCY_CKPT_CONFIG"
MAXTEXT_WORDS_VARIABLE = "EMERGENCY_CKPT_FLAGS"
"""Environment variables with the others: a YAML file, and `key=value` words as a shell would read them."""


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Up to three candidates most like `name`, best first."""
    return difflib.get_close_matches(_plain(name), candidates, n=3, cutoff=cutoff)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The nearest names as a sentence with a leading space, or nothing."""
    names = nearest(name, candidates)
    return f" Did you mean {' or '.join(names)}?" if names else ""


def misspelt(keys: Collection[str], flags: Collection[str]) -> dict[str, str]:
    """Keys of one file that look like a misspelt flag, each with that flag.

    A key that is merely alike counts only if the file does not also set the flag itself: a complete file of
    another program sets all of its keys, so there a similar name is another key.
    """
    found: dict[str, str] = {}
    for key in keys:
        if key in flags or key in MAXTEXT_NEIGHBOURS:
            continue
        for flag in nearest(key, flags, LIKELY)[:1]:
            if flag not in keys or likeness(key, flag) >= SURE:
                found[key] = flag
    return found


def likeness(key: str, flag: str) -> float:
    """How alike a key is to a flag, 0 to 1, whatever its case and dashes."""
    return difflib.SequenceMatcher(None, flag, _plain(key)).ratio()


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("-", "_")
