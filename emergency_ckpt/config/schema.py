"""The flags: one typed, documented field per flag, MaxText's names and ours.

A `Config` that exists is valid: wrong values and flags that contradict each other raise `ConfigError`,
whether the object was loaded or built in Python. It never changes afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from emergency_ckpt.config import checks
from emergency_ckpt.config.describe import explain
from emergency_ckpt.core.locations import absolute, joined
from emergency_ckpt.errors import ConfigError


def _refuse_bool(value: object) -> object:
    # bool is an int in Python, so `checkpoint_period: true` would silently become a period of 1.
    if isinstance(value, bool):
        raise ValueError("a truth value is not a number")
    return value


def _path_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _zero_is_unset(value: int | None) -> int | None:
    # Older MaxText files write 0 for "no interval", newer ones null.
    return value or None


def _relative_name(value: str) -> str:
    if value.startswith("/") or ".." in value.split("/"):
        raise ValueError("a run name is joined to base_output_directory and must stay below it")
    return value


def _host_path(value: str) -> str:
    if "://" in value:
        raise ValueError("it must be a directory of this host, not a URL")
    return value


Whole = Annotated[int, BeforeValidator(_refuse_bool)]
Seconds = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
PathText = Annotated[str, BeforeValidator(_path_text)]
HostPath = Annotated[PathText, AfterValidator(_host_path)]
Count = Annotated[Whole, Field(ge=1)]
Index = Annotated[Whole, Field(ge=0)]
Interval = Annotated[Index | None, AfterValidator(_zero_is_unset)]
AxisName = Annotated[str, Field(min_length=1)]


class Config(BaseModel):
    """All flags of a job. Build it with `load_config`, or directly: `Config(run_name="r", ...)`.

    Raises `ConfigError` for unknown flags, wrong values and contradictions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Where a run lives.
    run_name: Annotated[str, AfterValidator(_relative_name)] = Field(
        "",
        description="Name of the run. Checkpoints go to base_output_directory/run_name/checkpoints; a job that "
        "starts again under the same name continues that run. If empty, the environment variable JOBSET_NAME "
        "(set by JobSet and XPK) is used.",
    )
    base_output_directory: PathText = Field(
        "",
        description="Holds the outputs of all runs: s3://bucket/prefix, gs://bucket/prefix, or a directory on "
        "storage that every process reaches.",
    )

    # Saving to the persistent tier.
    enable_checkpointing: bool = Field(
        False, description="Master switch: nothing is saved or restored while it is False."
    )
    async_checkpointing: bool = Field(
        True,
        description="Write to the persistent tier in the background; a step waits only until the state "
        "has left the device. If False, save() returns when the checkpoint is in persistent storage.",
    )
    checkpoint_period: Whole = Field(
        10_000,
        ge=0,
        description="Steps between two checkpoints in the persistent tier. 0 where a backup interval says all.",
    )
    max_num_checkpoints_to_keep: Count | None = Field(
        None,
        description="Newest checkpoints kept in the persistent tier; older ones are deleted. None keeps all.",
    )
    save_checkpoint_on_completion: bool = Field(
        True, description="Save the last step to the persistent tier when training ends, due or not."
    )

    # The local tier.
    enable_emergency_checkpoint: bool = Field(
        False,
        description="Save to the ramdisk of every host too, and restore from what survived there. Needs "
        "local_checkpoint_directory and a local_checkpoint_period above 0.",
    )
    local_checkpoint_directory: HostPath = Field(
        "", description="Directory on the ramdisk of each host, the same path on all hosts."
    )
    local_checkpoint_period: Whole = Field(
        0,
        ge=0,
        description="Steps between two checkpoints in the local tier; far fewer than checkpoint_period.",
    )
    local_checkpoint_max_to_keep: Whole = Field(
        1,
        ge=1,
        description="Complete steps kept on the ramdisk. One more slot serves the step being written.",
    )
    local_checkpoint_copies: Whole = Field(
        1,
        ge=1,
        description="In how many slices each shard of a local step lies at least (with one slice: on how many "
        "hosts). States that are replicated over so many slices need nothing; of others each host keeps copies "
        "of its partners' shards, and its ramdisk is that much larger.",
    )
    local_checkpoint_spread: bool = Field(
        False,
        description="Let slices that hold the same state share the work of keeping it: each stores only its "
        "part on its ramdisks, so that every shard lies in local_checkpoint_copies slices and no more. Slots "
        "and the copy from the devices are smaller by that much; a restore fetches from other slices what the "
        "own one has not stored.",
    )
    local_checkpoint_slot_wait_seconds: Seconds = Field(
        1.0,
        ge=0,
        description="Longest time that save() waits for a free slot before it skips the save.",
    )
    local_checkpoint_foreign_run: Literal["evict", "error"] = Field(
        "evict",
        description="What to do when data of another run, which no live process uses, is in the way on the "
        "ramdisk: evict removes it when the room is needed and logs it, error refuses to start.",
    )
    local_save_during_drain: Literal["pause", "restart_drain"] = Field(
        "pause",
        description="What a local save does when the only slot left is being copied to the persistent tier: "
        "pause skips local saves until the copy is done, restart_drain gives up the copy and starts it again "
        "from the newer step.",
    )

    # Copies that must be equal.
    on_replica_divergence: Literal["warn", "raise"] = Field(
        "warn",
        description="What happens when a save shows that copies of the state in several slices, which must be "
        "bit-identical, are not: warn logs and counts it, raise also lets check_for_errors and the next wait "
        "raise ReplicaDivergenceError on the processes that hold them.",
    )

    compare_device_copies: bool = Field(
        False,
        description="At each save, compare the copies of a shard on several devices of one process, too. "
        "Slots store one of them, so this is extra work: each device reads its copies once more and "
        "fingerprints them, by a program that is compiled at the first save.",
    )

    # The agents, one per host: they serve the ramdisk's shards to other hosts, and drain them.
    checkpoint_agent: Literal["auto", "off"] = Field(
        "auto",
        description="auto starts an agent on each host, or uses the one that runs there; off starts none: "
        "shards then travel between slices by broadcast, or else not at all, and drains end with the trainer.",
    )
    checkpoint_agent_bind_address: str = Field(
        "",
        description="Address that the agent of each host listens on. Empty: that of the interface which "
        "reaches process 0.",
    )
    checkpoint_agent_advertise_address: str = Field(
        "", description="Address that others are told. Empty: the one that the agent listens on."
    )
    checkpoint_agent_port: Whole = Field(0, ge=0, le=65535, description="Port of the agents. 0: a free one.")
    checkpoint_agent_token_file: HostPath = Field(
        "",
        description="File with the token that lets clients in, on each host. Empty: the environment variable "
        "EMERGENCY_CKPT_AGENT_TOKEN of the trainer, or else a random token that the job tells its processes.",
    )
    checkpoint_agent_tls_certificate: HostPath = Field(
        "", description="Certificate chain (PEM) of the agent of each host; with the key, agents speak TLS."
    )
    checkpoint_agent_tls_key: HostPath = Field("", description="Private key (PEM) of that certificate.")
    checkpoint_agent_tls_ca: HostPath = Field(
        "",
        description="Certificates (PEM) by which the agents of others are verified, at this path on every "
        "host. Empty: those of the system.",
    )
    checkpoint_agent_idle_seconds: Seconds = Field(
        900.0, gt=0, description="How long an agent stays when no trainer is left and nobody asks it."
    )
    agent_flush_on_trainer_exit: bool = Field(
        True,
        description="When trainers die without closing their managers, the agents drain the newest complete "
        "step into the persistent tier, if it is not there yet.",
    )

    # Joining the job.
    jax_distributed_initialization_timeout: Count = Field(
        300,
        description="Longest wait in seconds of initialize_distributed for the other processes of the job.",
    )
    use_replicator_service: bool = Field(
        False,
        description="The local directory is a GKE multi-tier volume, which tells each host its former process "
        "id in jax-init-info.txt: initialize_distributed waits for that file. (MaxText's earlier name; "
        "enable_multi_tier_checkpointing means the same here.)",
    )

    # Restoring.
    enable_single_replica_ckpt_restoring: bool = Field(
        False,
        description="One slice reads the checkpoint and broadcasts it to the others over the device network, "
        "so that persistent storage is read once and not once per slice.",
    )
    load_full_state_path: PathText = Field(
        "",
        description="A run without checkpoints of its own starts from this checkpoint: parameters, optimizer "
        "state and step.",
    )
    load_parameters_path: PathText = Field(
        "",
        description="A run without checkpoints of its own starts from the parameters of this checkpoint.",
    )
    checkpoint_replica_axis: Index | AxisName = Field(
        0,
        description="Axis of the device mesh, by name or index, along which the state is replicated. The "
        "processes that share one index along it are one slice.",
    )

    # Preemption.
    enable_autocheckpoint: bool = Field(
        False, description="Save to the persistent tier when the job is told that it will be preempted."
    )
    preemption_exit_code: Whole = Field(
        42,
        ge=1,
        le=255,
        description="manager.exit_code, with which the program is to end after a preemption, so that it is "
        "started again. XPK's job sets restart 42 and 127 to 255, and fail with others.",
    )
    autocheckpoint_skip_if_replicated: bool = Field(
        False,
        description="After a notice, save to the ramdisks only, where the hosts that do not go away hold every "
        "shard of the step.",
    )
    preemption_sources: str = Field(
        "auto",
        description="What the agent of each host watches for notices: aws and gce (the metadata services of "
        "these clouds), single ones (aws-spot, aws-rebalance, gce-preempted, gce-maintenance), separated by "
        "commas; auto: what seems to be there; off: nothing.",
    )
    preemption_notice_file: HostPath = Field(
        "",
        description="A file whose appearance on a host is a notice, written by a preStop hook of Kubernetes, "
        "say. It may be empty, or have JSON with deadline or seconds.",
    )
    preemption_allow_imds_v1: bool = Field(
        False,
        description="Speak version 1 of Amazon's instance metadata service where it gives no token for "
        "version 2.",
    )
    preemption_signals: str = Field(
        "SIGTERM",
        description="Which signals to a trainer are notices, separated by commas: SIGTERM and SIGINT say that "
        "the process is to end, SIGUSR1 and SIGUSR2 ask for a save; off: none but the SIGTERM that JAX's "
        "preemption service hears by itself.",
    )
    preemption_grace_seconds: Seconds = Field(
        30.0,
        ge=0,
        description="How long after SIGTERM or SIGINT a process is killed. Set it to what the pod has as "
        "terminationGracePeriodSeconds (30 where it says nothing).",
    )

    # Watching the trainers.
    trainer_stall_factor: Seconds = Field(
        10.0,
        ge=1,
        description="A step that takes so many times the median of recent steps, and longer than "
        "trainer_stall_floor_seconds, is reported by the agent of the host, and which processes are behind.",
    )
    trainer_stall_floor_seconds: Seconds = Field(
        300.0,
        ge=0,
        description="No step that is shorter is reported, and the first one after `restore_or_init`, which is "
        "compiled, has twice this. Longer than any evaluation between two steps. 0 reports none.",
    )
    trainer_stall_restart_seconds: Seconds = Field(
        0.0,
        ge=0,
        description="When a step is reported and takes so much longer still, the agents drain the newest "
        "complete step and end their trainers, so that the job restarts. 0: never.",
    )

    # The format of the persistent tier.
    checkpoint_storage_target_data_file_size_bytes: Whole = Field(
        2_147_483_648,
        ge=0,
        description="Size at which the writer begins a new data file. 0 sets no limit. In buckets 32 MiB at"
        " most, because every object is put by one request and many of them at a time are faster.",
    )
    checkpoint_storage_use_ocdbt: bool = Field(
        True, description="Write arrays into OCDBT stores. Checkpoints are always written so."
    )
    checkpoint_storage_use_zarr3: bool = Field(
        True, description="Write arrays as zarr3. Checkpoints are always written so."
    )
    checkpoint_storage_concurrent_gb: Whole = Field(
        96,
        ge=1,
        description="Gigabytes (10^9 bytes) that one process may have in flight to or from persistent storage.",
    )
    checkpoint_storage_compression: Literal["none", "zstd"] = Field(
        "none", description="Compression of the arrays in the persistent tier."
    )

    # Time limits and logs.
    checkpoint_coordination_timeout_seconds: Seconds = Field(
        120.0,
        gt=0,
        description="Longest wait for other processes to answer; the error names those that did not.",
    )
    checkpoint_drain_timeout_seconds: Seconds = Field(
        1800.0,
        gt=0,
        description="Longest time for copying one step to the persistent tier; after that this try has failed.",
    )
    checkpoint_drain_retry_seconds: Seconds = Field(
        300.0,
        gt=0,
        description="Longest mean pause between a copy to the persistent tier that failed and its next try. "
        "The first is a sixtieth of it, or a fifth where rights, credentials or room are missing.",
    )
    checkpoint_storage_stall_seconds: Seconds = Field(
        60.0,
        gt=0,
        description="A request to the persistent tier of which nothing moves for so long is cut and repeated, "
        "for up to ten times as long. All other limits of requests follow from it.",
    )
    checkpoint_log_format: Literal["text", "json"] = Field(
        "text", description="Log lines as text, or as one JSON object per line."
    )
    enable_checkpoint_cloud_logger: bool = Field(
        False, description="Send checkpoint events to Google Cloud Logging."
    )

    # Multi-tier checkpointing (MaxText's successor of the emergency flags).
    enable_multi_tier_checkpointing: bool = Field(
        False,
        description="The local tier, as with enable_emergency_checkpoint, on a multi-tier volume of GKE. Needs "
        "local_checkpoint_directory, local_checkpoint_period and one backup interval.",
    )
    multi_tier_checkpointing_backup_interval_minutes: Interval = Field(
        None,
        description="The first local step when so many minutes have passed since the newest persistent one is "
        "copied to the persistent tier from the ramdisks. Exclusive with the interval in steps.",
    )
    multi_tier_checkpointing_backup_interval_steps: Interval = Field(
        None,
        description="The first local step at or beyond each multiple of so many steps is copied to the "
        "persistent tier from the ramdisks. Exclusive with the interval in minutes.",
    )
    mtc_data_parallelism: Whole = Field(
        0, ge=0, description="Number of identical replicas in the job. 0 means one per slice."
    )

    # Not flags: what was found beside them, and where each value was written.
    other_keys: Mapping[str, Any] = Field(
        default_factory=dict, exclude=True, repr=False, description="Keys of other programs, as they were read."
    )
    sources: Mapping[str, str] = Field(
        default_factory=dict, exclude=True, repr=False, description="Flag or key to the place that set it."
    )

    def __init__(self, **values: Any) -> None:
        sources = values.get("sources", {})
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self).model_fields, sources)) from None
        problems = checks.contradictions(self)
        if problems:
            raise ConfigError("The flags contradict each other:\n" + "\n".join(f"  - {p}" for p in problems))

    @property
    def checkpoint_directory(self) -> str:
        """Absolute path, or URL, of the run's checkpoints in the persistent tier.

        A string, not a `Path`: a `Path` would damage the URL of an object store.
        """
        if not (self.base_output_directory and self.run_name):
            missing = "run_name" if self.base_output_directory else "base_output_directory"
            raise ConfigError(
                f"There is no directory for persistent checkpoints: {missing} is empty. "
                "It is built as base_output_directory/run_name/checkpoints; set both flags."
            )
        return joined(absolute(self.base_output_directory), self.run_name, "checkpoints")

    @property
    def local_directory(self) -> Path | None:
        """Absolute path of the ramdisk directory; None while the local tier is off."""
        if not self.saves_locally:
            return None
        return Path(os.path.abspath(os.path.expanduser(self.local_checkpoint_directory)))

    @property
    def saves_locally(self) -> bool:
        """Whether the local tier is in use."""
        wanted = self.enable_emergency_checkpoint or self.enable_multi_tier_checkpointing
        return self.enable_checkpointing and wanted

    @property
    def backs_up(self) -> bool:
        """Whether local steps become persistent at an interval of their own."""
        minutes = self.multi_tier_checkpointing_backup_interval_minutes
        return self.saves_locally and bool(minutes or self.multi_tier_checkpointing_backup_interval_steps)

    def flags(self) -> dict[str, Any]:
        """Every flag with its value, in the order of the schema."""
        return {name: getattr(self, name) for name in FLAGS}

    def source_of(self, flag: str) -> str:
        """Where a flag was set: file and line, environment variable, command line, or default."""
        return self.sources.get(flag, "default")

    def replace(self, said_by: str | None = None, /, **changes: Any) -> Self:
        """The same configuration with some flags changed, checked again; `said_by` is their source."""
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        sources = {name: place for name, place in self.sources.items() if name not in changes}
        if said_by is not None:
            sources |= dict.fromkeys(changes, said_by)
        return type(self)(**{**kept, **changes, "other_keys": self.other_keys, "sources": sources})


FLAGS: tuple[str, ...] = tuple(name for name, field in Config.model_fields.items() if not field.exclude)
