"""Everything that a manager can be told, resolved from Orbax's option objects or from flags.

Option fields that are not supported are refused by name: nothing is ignored.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emergency_ckpt.agent.options import AgentOptions
from emergency_ckpt.agent.starting import IDLE_SECONDS
from emergency_ckpt.core.backups import BackupRule
from emergency_ckpt.core.schedule import SaveRule, SaveSchedule
from emergency_ckpt.core.stalls import StallLimits
from emergency_ckpt.errors import ConfigError
from emergency_ckpt.jaxio.binding import HOST_PLATFORMS
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.attempts import StepNames
from emergency_ckpt.persistent.object_store.urls import check_location
from emergency_ckpt.preemption.choosing import SourceOptions, names_of
from emergency_ckpt.preemption.signals import SignalOptions
from emergency_ckpt.runtime.policies import (
    AskedPolicy,
    Preservation,
    Ranking,
    local_max_to_keep,
    persistent_preservation,
    ranking_of,
    tier_rule,
)
from emergency_ckpt.telemetry.log import EventListener

if TYPE_CHECKING:
    from orbax.checkpoint.experimental.emergency.checkpoint_manager import CheckpointManagerOptions

    from emergency_ckpt.config import Config


AGENT_VARIABLE = "EMERGENCY_CKPT_AGENT"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one manager works.

    Attributes:
      persistent_directory: root of the persistent tier, a path or a URL. local_directory: ramdisk
        directory, None for no local tier.
      schedule: when each tier saves; asked_locally, asked_persistently: whom process 0 asks where it says so.
      backups: when steps of the ramdisks go to the persistent tier beside its own schedule; None: never.
      clock: measures the time between backups.
      local_max_to_keep, persistent_max_to_keep: complete steps kept per tier (None: all).
      persistent_keep_period: steps divisible by it are never deleted.
      preservation: decides instead of these two what the persistent tier keeps.
      ranking: how steps are compared where no metric is named.
      replica_axis: position or name of the mesh's replica axis.
      names: how step directories are called.
      asynchronous: return from save() before the step is sealed, and committed where that is due.
      save_on_preemption: save at the step of a preemption notice.
      single_replica_restore: one slice reads the persistent tier and broadcasts.
      coordination_timeout, drain_timeout, slot_wait: time limits.
      drain_retry: longest mean pause between a drain that failed and its next try.
      stall: how long nothing of a request to the store may move.
      write_options: how the persistent tier is written; read_bytes: how much of it is read at a time.
      foreign_run: what happens to another run's data on the ramdisk.
      remove_foreign_leftovers: remove what other programs left uncommitted in the persistent directory.
      root_metadata: the user's metadata of the run, JSON; None where none is given.
      after_commit: called on every process after each persistent commit.
      event_listener: gets the fields of every event.
      host_platforms: platforms whose arrays are in this host's memory already.
      agent: how the agent of each host is started; None: none is.
      local_copies: in how many failure domains each shard of a local step lies at least.
      local_spread: and in no more slices than that.
      on_replica_divergence: whether copies that differ are an error beside a line in the log.
      compare_device_copies: whether copies on several devices of one process are compared, too.
      flush_on_trainer_exit: whether agents drain the newest complete step when their trainers die.
      preemption_grace: how long a host has after a notice that names no time.
      skip_if_replicated: whether a preemption needs no persistent step where the hosts that stay have a whole
        one.
      exit_code: with which the program is to end after a preemption.
      notice_sources: what is watched for notices where there is no agent; and an agent is started for them
        alone. None: neither.
      signals: which of them are notices, where JAX does not hear them itself; None: none.
      stalls: what the agent makes of a step that takes far longer than those before it.
    """

    persistent_directory: str
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
    drain_retry: timedelta = timedelta(seconds=300)
    stall: timedelta = timedelta(seconds=60)
    write_options: WriteOptions = dataclasses.field(default_factory=WriteOptions)
    read_bytes: int = 1024**3
    foreign_run: Literal["evict", "error"] = "evict"
    log_format: Literal["text", "json"] = "text"
    asked_locally: AskedPolicy | None = None
    asked_persistently: AskedPolicy | None = None
    preservation: Preservation | None = None
    ranking: Ranking | None = None
    remove_foreign_leftovers: bool = False
    root_metadata: Mapping[str, Any] | None = None
    after_commit: Callable[[], None] | None = None
    event_listener: EventListener | None = None
    host_platforms: Collection[str] = HOST_PLATFORMS
    agent: AgentOptions | None = dataclasses.field(
        default_factory=lambda: default_agent(AgentOptions(idle_seconds=IDLE_SECONDS))
    )
    local_copies: int = 1
    local_spread: bool = False
    on_replica_divergence: Literal["warn", "raise"] = "warn"
    flush_on_trainer_exit: bool = True
    compare_device_copies: bool = False
    backups: BackupRule | None = None
    notice_sources: SourceOptions | None = None
    preemption_grace: timedelta = timedelta(seconds=30)
    skip_if_replicated: bool = False
    exit_code: int = 42
    signals: SignalOptions | None = None
    stalls: StallLimits = dataclasses.field(default_factory=StallLimits)
    clock: Callable[[], float] = time.monotonic

    @property
    def wanted_slots(self) -> int:
        """One per kept step, one to write, one that a drain may hold meanwhile."""
        if self.local_directory is None:
            return 2
        return self.local_max_to_keep + 1 + (1 if self.schedule.persistent else 0)

    @property
    def least_slots(self) -> int:
        return 2 if self.local_directory is None else self.local_max_to_keep + 1


def default_agent(options: AgentOptions) -> AgentOptions | None:
    """For those who cannot say it by a flag: the environment may say that no agents are wanted.

    Raises ConfigError for another value than `auto` and `off`.
    """
    said = os.environ.get(AGENT_VARIABLE, "auto")
    if said not in ("auto", "off"):
        raise ConfigError(f"the variable {AGENT_VARIABLE} is {said!r}; expected auto or off")
    return options if said == "auto" else None


def settings_from_config(config: Config) -> Settings:
    """The settings that a configuration asks for."""
    timeout = config.checkpoint_drain_timeout_seconds
    concurrent_bytes = config.checkpoint_storage_concurrent_gb * 10**9
    return Settings(
        persistent_directory=check_location(config.checkpoint_directory),
        local_directory=config.local_directory,
        schedule=_schedule(config),
        backups=_backups(config),
        local_max_to_keep=config.local_checkpoint_max_to_keep,
        persistent_max_to_keep=config.max_num_checkpoints_to_keep,
        replica_axis=config.checkpoint_replica_axis,
        asynchronous=config.async_checkpointing,
        save_on_preemption=config.enable_autocheckpoint,
        single_replica_restore=config.enable_single_replica_ckpt_restoring,
        coordination_timeout=timedelta(seconds=config.checkpoint_coordination_timeout_seconds),
        drain_timeout=timedelta(seconds=timeout),
        slot_wait=timedelta(seconds=config.local_checkpoint_slot_wait_seconds),
        drain_retry=timedelta(seconds=config.checkpoint_drain_retry_seconds),
        stall=timedelta(seconds=config.checkpoint_storage_stall_seconds),
        write_options=WriteOptions(
            concurrent_bytes=concurrent_bytes,
            compression=config.checkpoint_storage_compression,
            target_data_file_bytes=config.checkpoint_storage_target_data_file_size_bytes or None,
            timeout_seconds=timeout,
            stall_seconds=config.checkpoint_storage_stall_seconds,
        ),
        read_bytes=concurrent_bytes,
        foreign_run=config.local_checkpoint_foreign_run,
        agent=_agent_options(config),
        local_copies=config.local_checkpoint_copies,
        local_spread=config.local_checkpoint_spread,
        flush_on_trainer_exit=config.agent_flush_on_trainer_exit,
        log_format=config.checkpoint_log_format,
        on_replica_divergence=config.on_replica_divergence,
        compare_device_copies=config.compare_device_copies,
        notice_sources=_notice_sources(config) if config.enable_autocheckpoint else None,
        preemption_grace=timedelta(seconds=config.preemption_grace_seconds),
        skip_if_replicated=config.autocheckpoint_skip_if_replicated,
        exit_code=config.preemption_exit_code,
        signals=_signals(config) if config.enable_autocheckpoint else None,
        stalls=StallLimits(
            config.trainer_stall_factor,
            config.trainer_stall_floor_seconds,
            config.trainer_stall_restart_seconds,
        ),
    )


def _schedule(config: Config) -> SaveSchedule:
    local_period = config.local_checkpoint_period if config.saves_locally else 0
    schedule = SaveSchedule.of_periods(local_period, config.checkpoint_period)
    if schedule.persistent is None and config.backs_up:
        # Nothing but backups, steps that are asked for, and the step of a preemption.
        return SaveSchedule(schedule.local, SaveRule(preemption=True))
    return schedule


def _backups(config: Config) -> BackupRule | None:
    if not config.backs_up:
        return None
    minutes = config.multi_tier_checkpointing_backup_interval_minutes
    return BackupRule(config.multi_tier_checkpointing_backup_interval_steps, minutes * 60 if minutes else None)


def _notice_sources(config: Config) -> SourceOptions:
    file = config.preemption_notice_file
    return SourceOptions(
        names_of(config.preemption_sources),
        Path(file) if file else None,
        "allowed" if config.preemption_allow_imds_v1 else "never",
    )


def _signals(config: Config) -> SignalOptions:
    return SignalOptions(names_of(config.preemption_signals), config.preemption_grace_seconds)


def _agent_options(config: Config) -> AgentOptions | None:
    if config.checkpoint_agent == "off":
        return None

    def path(text: str) -> Path | None:
        return Path(text) if text else None

    return AgentOptions(
        bind=config.checkpoint_agent_bind_address or None,
        port=config.checkpoint_agent_port,
        advertise=config.checkpoint_agent_advertise_address or None,
        token_file=path(config.checkpoint_agent_token_file),
        tls_certificate=path(config.checkpoint_agent_tls_certificate),
        tls_key=path(config.checkpoint_agent_tls_key),
        tls_ca=path(config.checkpoint_agent_tls_ca),
        idle_seconds=config.checkpoint_agent_idle_seconds,
        preemption_sources=config.preemption_sources,
        preemption_file=path(config.preemption_notice_file),
        preemption_imds_v1="allowed" if config.preemption_allow_imds_v1 else "never",
    )


def settings_from_orbax(
    local_directory: str | Path | None,
    persistent_directory: str | Path,
    options: CheckpointManagerOptions | None,
    metadata: Mapping[str, Any] | None = None,
    logger: Any = None,
) -> Settings:
    """The settings that Orbax's own objects ask for. Raises ConfigError for what is not supported, by name."""
    from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax_emergency

    options = options or orbax_emergency.CheckpointManagerOptions()
    _refuse_unsupported(options)
    local, persistent = options.local, options.persistent
    multiprocessing = options.multiprocessing_options or orbax_emergency.MultiprocessingOptions()
    local_path = Path(local_directory) if local_directory else None
    local_rule, asked_locally = tier_rule("local", local)
    if local_path is None or local.read_only:
        local_rule = asked_locally = None
    persistent_rule, asked_persistently = tier_rule("persistent", persistent)
    drain_timeout, after_commit = timedelta(seconds=1800), None
    if options.async_options is not None:
        drain_timeout = _positive("async_options.timeout_secs", options.async_options.timeout_secs)
        after_commit = options.async_options.post_finalization_callback
    return Settings(
        persistent_directory=check_location(os.fspath(persistent_directory)),
        local_directory=local_path,
        schedule=SaveSchedule(local_rule, persistent_rule),
        asked_locally=asked_locally,
        asked_persistently=asked_persistently,
        local_max_to_keep=local_max_to_keep(local),
        persistent_max_to_keep=persistent.max_to_keep,
        persistent_keep_period=persistent.keep_period,
        preservation=persistent_preservation(persistent.preservation_policy),
        ranking=ranking_of(persistent.preservation_policy),
        replica_axis=options.replica_axis_index,
        names=_step_names(options.step_name_format),
        asynchronous=options.enable_async_checkpointing,
        single_replica_restore=options.single_host_load_and_broadcast,
        coordination_timeout=_positive(
            "multiprocessing_options.coordination_timeout_secs", multiprocessing.coordination_timeout_secs
        ),
        drain_timeout=drain_timeout,
        write_options=WriteOptions(timeout_seconds=drain_timeout.total_seconds()),
        remove_foreign_leftovers=options.cleanup_tmp_directories,
        root_metadata=_plain_json(metadata),
        after_commit=after_commit,
        event_listener=None if logger is None else logger.log_entry,
    )


# Fields of Orbax's option objects that have their effect here. Any other one, those of later versions of Orbax
# included, has to be at its default.
_SUPPORTED = {
    "": {
        "local",
        "persistent",
        "replica_axis_index",
        "step_name_format",
        "cleanup_tmp_directories",
        "enable_async_checkpointing",
        "async_options",
        "multiprocessing_options",
        "single_host_load_and_broadcast",
    },
    "local": {
        "save_interval_steps",
        "max_to_keep",
        "read_only",
        "should_save_fn",
        "save_decision_policy",
        "preservation_policy",
    },
    "persistent": {
        "save_interval_steps",
        "max_to_keep",
        "keep_period",
        "should_save_fn",
        "save_decision_policy",
        "preservation_policy",
    },
    "async_options": {"timeout_secs", "post_finalization_callback"},
    "multiprocessing_options": {"coordination_timeout_secs"},
}


# How one process or all of them list the directory is this manager's affair.
_NAME_FIELDS = ("step_prefix", "step_format_fixed_length", "single_host_load_and_broadcast")


def _refuse_unsupported(options: CheckpointManagerOptions) -> None:
    refused = [
        f"{name}.{field.name}" if name else field.name
        for name, supported in _SUPPORTED.items()
        if (part := getattr(options, name) if name else options) is not None
        for field in dataclasses.fields(part)
        if field.name not in supported and not _is_default(field, getattr(part, field.name))
    ]
    if refused:
        raise ConfigError(
            f"these fields of CheckpointManagerOptions are not supported: {', '.join(refused)}. Leave them at "
            "their defaults."
        )


def _positive(name: str, seconds: float) -> timedelta:
    if not seconds > 0:
        raise ConfigError(f"{name} is {seconds!r}; expected a number of seconds above 0")
    return timedelta(seconds=seconds)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return value is default or value == default


def _plain_json(metadata: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The metadata as it will be read again, so that later changes by the caller do not reach it."""
    if metadata is None:
        return None
    try:
        return json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metadata must be a JSON object: {error}") from error


def _step_names(name_format: Any) -> StepNames:
    """The names of Orbax's standard format, and of no other: one of a few names proves nothing of the rest."""
    import orbax.checkpoint as ocp

    standard: Any = ocp.path.step.standard_name_format()
    changed: list[str] = []
    if type(name_format) is type(standard):
        changed = [
            field.name
            for field in dataclasses.fields(standard)
            if field.name not in _NAME_FIELDS and not _is_default(field, getattr(name_format, field.name))
        ]
        names = StepNames(name_format.step_prefix, name_format.step_format_fixed_length)
        if not changed and all(name_format.build_name(step) == names.name(step) for step in (0, 7, 123)):
            return names
    what = f" with {', '.join(changed)}" if changed else ""
    raise ConfigError(
        f"step_name_format {name_format!r} ({type(name_format).__name__}){what} is not supported: composite "
        "formats, subclasses and formats of your own may name or find steps that this manager would miss. Use "
        "orbax.checkpoint.path.step.standard_name_format(step_prefix=…, step_format_fixed_length=…); rename "
        "the directories of steps that have other names."
    )
