"""Everything that a manager can be told, resolved from Orbax's option objects or from flags.

Option fields that are not supported are refused by name: nothing is ignored.
"""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emergency_ckpt.core.schedule import SaveSchedule
from emergency_ckpt.errors import ConfigError
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.store import StepNames

if TYPE_CHECKING:
    from orbax.checkpoint.experimental.emergency.checkpoint_manager import CheckpointManagerOptions

    from emergency_ckpt.config import Config


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one manager works.

    Attributes:
      persistent_directory: root of the persistent tier. local_directory: ramdisk directory, None for no local
        tier.
      schedule: periods in steps.
      local_max_to_keep, persistent_max_to_keep: complete steps kept per tier (None: all).
      persistent_keep_period: steps divisible by it are never deleted.
      replica_axis: position or name of the mesh's replica axis.
      names: how step directories are called.
      asynchronous: return from save() before the step is sealed.
      save_on_preemption: save at the step of a preemption notice.
      single_replica_restore: one slice reads the persistent tier and broadcasts.
      coordination_timeout, drain_timeout, slot_wait: time limits.
      write_options: how the persistent tier is written; read_bytes: how much of it is read at a time.
      foreign_run: what happens to another run's data on the ramdisk.
      cleanup_attempts: remove what earlier lives of the run left uncommitted.
    """

    persistent_directory: Path
    local_directory: Path | None
    schedule: SaveSchedule
    local_max_to_keep: int = 1
    persistent_max_to_keep: int | None = None
    persistent_keep_period: int | None = None
    replica_axis: int | str = 0
    names: StepNames = dataclasses.field(default_factory=StepNames)
    asynchronous: bool = True
    save_on_preemption: bool = True
    single_replica_restore: bool = False
    coordination_timeout: timedelta = timedelta(seconds=120)
    drain_timeout: timedelta = timedelta(seconds=1800)
    slot_wait: timedelta = timedelta(seconds=1)
    write_options: WriteOptions = dataclasses.field(default_factory=WriteOptions)
    read_bytes: int = 1024**3
    foreign_run: Literal["evict", "error"] = "evict"
    log_format: Literal["text", "json"] = "text"

    @property
    def wanted_slots(self) -> int:
        """One per kept step, one to write, one that a drain may hold meanwhile."""
        if self.local_directory is None:
            return 2
        return self.local_max_to_keep + 1 + (1 if self.schedule.persistent_period else 0)

    @property
    def least_slots(self) -> int:
        return 2 if self.local_directory is None else self.local_max_to_keep + 1


def settings_from_config(config: Config) -> Settings:
    """The settings that a configuration asks for."""
    timeout = config.checkpoint_drain_timeout_seconds
    concurrent_bytes = config.checkpoint_storage_concurrent_gb * 10**9
    return Settings(
        persistent_directory=Path(config.checkpoint_directory),
        local_directory=config.local_directory,
        schedule=SaveSchedule(
            config.local_checkpoint_period if config.saves_locally else 0, config.checkpoint_period
        ),
        local_max_to_keep=config.local_checkpoint_max_to_keep,
        persistent_max_to_keep=config.max_num_checkpoints_to_keep,
        replica_axis=config.checkpoint_replica_axis,
        asynchronous=config.async_checkpointing,
        save_on_preemption=config.enable_autocheckpoint,
        single_replica_restore=config.enable_single_replica_ckpt_restoring,
        coordination_timeout=timedelta(seconds=config.checkpoint_coordination_timeout_seconds),
        drain_timeout=timedelta(seconds=timeout),
        slot_wait=timedelta(seconds=config.local_checkpoint_slot_wait_seconds),
        write_options=WriteOptions(
            concurrent_bytes=concurrent_bytes,
            compression=config.checkpoint_storage_compression,
            target_data_file_bytes=config.checkpoint_storage_target_data_file_size_bytes or None,
            timeout_seconds=timeout,
        ),
        read_bytes=concurrent_bytes,
        foreign_run=config.local_checkpoint_foreign_run,
        log_format=config.checkpoint_log_format,
    )


def settings_from_orbax(
    local_directory: str | Path | None,
    persistent_directory: str | Path,
    options: CheckpointManagerOptions | None,
) -> Settings:
    """The settings that Orbax's own option objects ask for. Raises ConfigError for unsupported fields."""
    from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax_emergency

    options = options or orbax_emergency.CheckpointManagerOptions()
    _refuse_unsupported(options)
    local, persistent = options.local, options.persistent
    multiprocessing = options.multiprocessing_options or orbax_emergency.MultiprocessingOptions()
    local_path = Path(local_directory) if local_directory and not local.read_only else None
    return Settings(
        persistent_directory=Path(persistent_directory),
        local_directory=local_path,
        schedule=SaveSchedule(local.save_interval_steps if local_path else 0, persistent.save_interval_steps),
        local_max_to_keep=1 if local.max_to_keep is None else local.max_to_keep,
        persistent_max_to_keep=persistent.max_to_keep,
        persistent_keep_period=persistent.keep_period,
        replica_axis=options.replica_axis_index,
        names=_step_names(options.step_name_format),
        asynchronous=options.enable_async_checkpointing,
        single_replica_restore=options.single_host_load_and_broadcast,
        coordination_timeout=timedelta(seconds=multiprocessing.coordination_timeout_secs),
    )


def _refuse_unsupported(options: CheckpointManagerOptions) -> None:
    set_fields = [
        f"{tier}.{field}"
        for tier, part, fields in (
            ("local", options.local, ("should_save_fn", "save_decision_policy", "preservation_policy")),
            (
                "persistent",
                options.persistent,
                ("should_save_fn", "save_decision_policy", "preservation_policy"),
            ),
        )
        for field in fields
        if getattr(part, field, None) is not None
    ]
    set_fields += [f"local.{f}" for f in ("debug_use_full_global_mesh",) if getattr(options.local, f, False)]
    set_fields += [f for f in ("async_options",) if getattr(options, f, None) is not None]
    if set_fields:
        raise ConfigError(
            f"these fields of CheckpointManagerOptions are not supported yet: {', '.join(set_fields)}. Leave "
            "them at their defaults; use save_interval_steps, max_to_keep and keep_period."
        )


def _step_names(name_format: Any) -> StepNames:
    prefix = getattr(name_format, "step_prefix", None)
    digits = getattr(name_format, "step_format_fixed_length", None)
    names = StepNames(prefix, digits)
    for step in (0, 7, 123):
        if name_format.build_name(step) != names.name(step):
            raise ConfigError(
                f"step_name_format {name_format!r} is not supported: it calls step {step} "
                f"{name_format.build_name(step)!r}. Use orbax.checkpoint.path.step.standard_name_format("
                "step_prefix=…, step_format_fixed_length=…)."
            )
    return names
