"""What flags mean together: contradictions, flags that do nothing yet, and advice.

Contradictions are refused when a `Config` is made. The other two are sentences for the log at start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from emergency_ckpt.core.locations import is_url

if TYPE_CHECKING:
    from emergency_ckpt.config.schema import Config

_NEED_LOCAL_TIER = (
    "local_checkpoint_directory",
    "local_checkpoint_period",
    "local_checkpoint_max_to_keep",
    "local_checkpoint_copies",
    "local_checkpoint_spread",
    "local_checkpoint_slot_wait_seconds",
    "local_checkpoint_foreign_run",
    "local_save_during_drain",
    "checkpoint_agent",
    "checkpoint_agent_bind_address",
    "checkpoint_agent_advertise_address",
    "checkpoint_agent_port",
    "checkpoint_agent_token_file",
    "checkpoint_agent_tls_certificate",
    "checkpoint_agent_tls_key",
    "checkpoint_agent_tls_ca",
    "checkpoint_agent_idle_seconds",
    "agent_flush_on_trainer_exit",
    "multi_tier_checkpointing_backup_interval_minutes",
    "multi_tier_checkpointing_backup_interval_steps",
    "trainer_stall_factor",
    "trainer_stall_floor_seconds",
    "trainer_stall_restart_seconds",
)

_STORES = ("s3://", "gs://")


def contradictions(config: Config) -> list[str]:
    """One sentence per pair of flags that cannot both hold: which, and how to fix it."""
    return [*_local_tier(config), *_backups(config), *_persistent_tier(config), *_restoring(config)]


def inactive_flags(config: Config) -> list[str]:
    """One sentence per flag that is set away from its default and does nothing, or not all of it, yet."""
    return list(_inactive(config))


def advice(config: Config) -> list[str]:
    """Sentences about settings that work but are hardly what anybody wants."""
    lines: list[str] = []
    if config.saves_locally and 0 < config.checkpoint_period < config.local_checkpoint_period:
        lines.append(
            f"{_said(config, 'local_checkpoint_period')} is longer than {_said(config, 'checkpoint_period')}: "
            "the local tier is there to be saved to more often than persistent storage."
        )
    return lines


def _local_tier(config: Config) -> Iterator[str]:
    for switch in ("enable_emergency_checkpoint", "enable_multi_tier_checkpointing"):
        if not getattr(config, switch):
            continue
        on = _said(config, switch)
        if not config.enable_checkpointing:
            yield (
                f"{on}, but {_said(config, 'enable_checkpointing')} switches all checkpoints off. "
                f"Set enable_checkpointing=True, or {switch}=False."
            )
        if not config.local_checkpoint_directory:
            yield (
                f"{on}, but {_said(config, 'local_checkpoint_directory')}. "
                f"Set local_checkpoint_directory to a directory on the ramdisk, or {switch}=False."
            )
        if config.local_checkpoint_period == 0:
            yield (
                f"{on}, but {_said(config, 'local_checkpoint_period')} saves no local step. "
                f"Set local_checkpoint_period to a number of steps, or {switch}=False."
            )
        for flag in ("base_output_directory", "run_name"):
            if not getattr(config, flag):
                yield (
                    f"{on}, but {_said(config, flag)}. The identity of the run lives in "
                    f"base_output_directory/run_name: set {flag}, or {switch}=False."
                )
    if config.use_replicator_service and not config.local_checkpoint_directory:
        yield (
            f"{_said(config, 'use_replicator_service')}, but {_said(config, 'local_checkpoint_directory')}. "
            "Set local_checkpoint_directory to the multi-tier volume, or use_replicator_service=False."
        )
    if config.saves_locally and config.local_checkpoint_directory and config.base_output_directory:
        yield from _shared_storage(config)
    if config.saves_locally and config.local_checkpoint_spread and config.checkpoint_agent == "off":
        yield (
            f"{_said(config, 'local_checkpoint_spread')}, but {_said(config, 'checkpoint_agent')}: what other "
            "slices keep comes from their agents. Set checkpoint_agent=auto, or local_checkpoint_spread=False."
        )
    certificate, key = "checkpoint_agent_tls_certificate", "checkpoint_agent_tls_key"
    if bool(getattr(config, certificate)) != bool(getattr(config, key)):
        yield (f"{_said(config, certificate)}, but {_said(config, key)}. TLS needs both: set both or neither.")


def _shared_storage(config: Config) -> Iterator[str]:
    if is_url(config.base_output_directory) or not config.run_name:
        return
    local, persistent = str(config.local_directory), config.checkpoint_directory
    if os.path.commonpath((local, persistent)) in (local, persistent):
        yield (
            f"{_said(config, 'local_checkpoint_directory')} and the checkpoints of "
            f"{_said(config, 'base_output_directory')} ({persistent}) lie in one another. "
            "Set local_checkpoint_directory to a directory of its own on the ramdisk."
        )


def _backups(config: Config) -> Iterator[str]:
    minutes = config.multi_tier_checkpointing_backup_interval_minutes
    steps = config.multi_tier_checkpointing_backup_interval_steps
    said_minutes = _said(config, "multi_tier_checkpointing_backup_interval_minutes")
    said_steps = _said(config, "multi_tier_checkpointing_backup_interval_steps")
    if minutes and steps:
        yield f"{said_minutes} and {said_steps} exclude each other. Set one of them to None."
    if config.enable_multi_tier_checkpointing and not minutes and not steps:
        yield (
            f"{_said(config, 'enable_multi_tier_checkpointing')}, but {said_minutes} and {said_steps}. "
            "Set exactly one of the two backup intervals, or enable_multi_tier_checkpointing=False."
        )
    if config.saves_locally and steps and steps < config.local_checkpoint_period:
        yield (
            f"{said_steps} is shorter than {_said(config, 'local_checkpoint_period')}, but a backup copies a "
            "local step. Set the interval to at least local_checkpoint_period."
        )


def _persistent_tier(config: Config) -> Iterator[str]:
    if config.checkpoint_storage_use_zarr3 and not config.checkpoint_storage_use_ocdbt:
        yield (
            f"{_said(config, 'checkpoint_storage_use_zarr3')} needs OCDBT, but "
            f"{_said(config, 'checkpoint_storage_use_ocdbt')}. Set checkpoint_storage_use_ocdbt=True: "
            "checkpoints are always written as zarr3 in OCDBT."
        )
    if not config.enable_checkpointing:
        return
    if config.checkpoint_period == 0 and not config.backs_up:
        yield (
            f"{_said(config, 'enable_checkpointing')}, but {_said(config, 'checkpoint_period')} saves no step. "
            "Set checkpoint_period to a number of steps (in the local tier a backup interval will do), or "
            "enable_checkpointing=False."
        )
    if config.base_output_directory and not config.run_name:
        yield (
            f"{_said(config, 'base_output_directory')}, but {_said(config, 'run_name')}. Checkpoints go to "
            "base_output_directory/run_name/checkpoints: set run_name, the same on every start of the run."
        )
    if is_url(config.base_output_directory) and not config.base_output_directory.startswith(_STORES):
        yield (
            f"{_said(config, 'base_output_directory')} is the URL of no store that is supported. Set it to "
            "s3://bucket/prefix, to gs://bucket/prefix, or to a directory that all hosts share."
        )


def _restoring(config: Config) -> Iterator[str]:
    if config.load_full_state_path and config.load_parameters_path:
        yield (
            f"{_said(config, 'load_full_state_path')} and {_said(config, 'load_parameters_path')} exclude each "
            "other. Set load_full_state_path to continue with the optimizer state, load_parameters_path to "
            "start anew from the parameters."
        )
    for flag in ("load_full_state_path", "load_parameters_path"):
        if getattr(config, flag) and not config.enable_checkpointing:
            yield (
                f"{_said(config, flag)}, but {_said(config, 'enable_checkpointing')} switches restoring off. "
                f"Set enable_checkpointing=True, or clear {flag}."
            )


def _inactive(config: Config) -> Iterator[str]:
    if config.mtc_data_parallelism:
        yield (
            f"{_said(config, 'mtc_data_parallelism')} does nothing yet: "
            "the number of slices is taken from the mesh (checkpoint_replica_axis)."
        )
    if config.enable_checkpoint_cloud_logger:
        yield (
            f"{_said(config, 'enable_checkpoint_cloud_logger')} does nothing yet: events go to the log; "
            "with checkpoint_log_format=json a log agent can collect them."
        )
    if config.saves_locally and config.local_save_during_drain != "pause":
        yield (
            f"{_said(config, 'local_save_during_drain')} does nothing yet: local saves that find no free slot "
            "while one is drained are skipped, as with pause."
        )
    for flag in ("checkpoint_storage_use_ocdbt", "checkpoint_storage_use_zarr3"):
        if not getattr(config, flag):
            yield f"{_said(config, flag)} does nothing: checkpoints are always written as zarr3 in OCDBT."
    if config.enable_autocheckpoint and not config.enable_checkpointing:
        on = _said(config, "enable_autocheckpoint")
        yield f"{on} does nothing while {_said(config, 'enable_checkpointing')}."
    if not config.enable_autocheckpoint:
        for flag in (
            "preemption_signals",
            "preemption_grace_seconds",
            "preemption_exit_code",
            "autocheckpoint_skip_if_replicated",
        ):
            if getattr(config, flag) != type(config).model_fields[flag].default:
                yield f"{_said(config, flag)} does nothing while {_said(config, 'enable_autocheckpoint')}."
        for flag in ("preemption_sources", "preemption_notice_file", "preemption_allow_imds_v1"):
            if getattr(config, flag) != type(config).model_fields[flag].default:
                yield (
                    f"{_said(config, flag)} does nothing for the job while "
                    f"{_said(config, 'enable_autocheckpoint')}: agents only log the notices."
                )
    if not config.saves_locally:
        off = _said(config, "enable_emergency_checkpoint")
        fields = type(config).model_fields
        for flag in _NEED_LOCAL_TIER:
            if getattr(config, flag) != fields[flag].default:
                yield f"{_said(config, flag)} does nothing while {off}."


def _said(config: Config, flag: str) -> str:
    """`flag=value`, and who said so where that is known."""
    value: Any = getattr(config, flag)
    shown = f"{flag}={value!r}" if value == "" else f"{flag}={value}"
    return f"{shown} ({config.source_of(flag)})"
