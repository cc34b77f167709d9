"""What a deployment needs beside the flags of the job: one checked set of values, `deploy_…`.

A `Deployment` that exists has no value that a tool would refuse for its form, or that could change the meaning
of a command or manifest. What belongs together is checked in `plan`, which knows the target and the flags.
"""

from __future__ import annotations

import shlex
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from emergency_ckpt.config.names import did_you_mean
from emergency_ckpt.core.tpu_types import tpu_type
from emergency_ckpt.deploy.names import (
    Bucket,
    CleanPath,
    ExitCode,
    GcpAccount,
    Image,
    Label,
    Quantity,
    RoleArn,
    ShortName,
    Text,
    Variable,
    Word,
    is_secret,
)
from emergency_ckpt.errors import ConfigError

PREFIX = "deploy_"
MOST_SAVE_SECONDS = 3600

DEFAULT_RESTART_CODES = (42, *range(127, 256))
"""XPK's: 42 for "start me again", 127 and above for signals. JAX aborts (134) when a peer is lost."""


def _words(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise ValueError(f"text that a shell would split into words ({error}), or a list of words") from error


def _whole(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number, not a truth value")
    return value


def _codes(value: object) -> object:
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not all(part.isdecimal() for part in parts):
            raise ValueError("exit codes separated by commas, as in 1,3")
        return tuple(map(int, parts))
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


def _known_tpu(value: str) -> str:
    try:
        return tpu_type(value).name
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _no_shell_syntax(words: tuple[str, ...]) -> tuple[str, ...]:
    if not words:
        raise ValueError("at least the name of a program")
    for word in words:
        if word in {"|", "||", "&&", "&", ";", ">", ">>", "<", "2>&1"}:
            raise ValueError(
                f"a program and its arguments, no shell syntax ({word}): with a pipe or a list, SIGTERM "
                "reaches the shell and not the program; put it into a script in the image that ends with "
                "`exec`"
            )
    return words


def _few_codes(codes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(codes)))


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1, le=100_000)]
Command = Annotated[tuple[Text, ...], BeforeValidator(_words), AfterValidator(_no_shell_syntax)]
Codes = Annotated[tuple[ExitCode, ...], BeforeValidator(_codes), AfterValidator(_few_codes)]
KnownTpu = Annotated[str, AfterValidator(_known_tpu)]


class Deployment(BaseModel):
    """The values. Build it with `plan.load_plan`, or directly: `Deployment(workload="w1", …)`.

    Raises ConfigError that names each value and the rule it breaks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    # The job.
    workload: ShortName = Field(
        description="Name of the job on the cluster; also run_name where that is empty."
    )
    namespace: Label = Field("default", description="Namespace of Kubernetes.")
    image: Image = Field(description="Container image; has emergency_ckpt, the program, and bash for XPK.")
    image_pull_secret: Label | None = Field(None, description="Secret with which the image is pulled.")
    command: Command = Field(description="The training program and its first words, as text or as a list.")
    program: Literal["own", "maxtext"] = Field(
        "own",
        description="maxtext: only flags that MaxText has are added to the command, and the others go to "
        "emergency_ckpt.maxtext by a variable, where the command names that; own: all that are set.",
    )
    env: dict[Variable, Text] = Field(default_factory=dict, description="Environment variables of the program.")
    slices: Count = Field(1, description="Slices (replicas of the state); those of TPUs are node pools.")
    tpu_type: KnownTpu | None = Field(None, description="Slice of TPUs, as in v5p-256 or v6e-4x8.")

    # Coming back.
    max_restarts: Count = Field(
        100, description="Restarts of the whole job; none would make all checkpoints of this kind useless."
    )
    restart_exit_codes: Codes = Field(
        (1,),
        description="Exit codes after which the job is started again, beside 42 and 127 to 255. 1 is what "
        "Python ends with when a collective fails because a host was lost.",
    )
    planned_save_seconds: Annotated[float, BeforeValidator(_whole), Field(gt=0, le=MOST_SAVE_SECONDS)] = Field(
        60.0,
        description="Planned time from the notice to a newest step in the persistent tier; the grace periods "
        "follow from it.",
    )
    ramdisk_size: Quantity = Field(description="Ramdisk of each host, as in 60000Mi.")

    # XPK and Cluster Toolkit.
    cluster: ShortName | None = Field(None, description="Name of the GKE cluster.")
    project: Word | None = Field(None, description="Google Cloud project.")
    zone: Label | None = Field(None, description="Zone, as in us-central1-a.")
    gke_version: Word | None = Field(None, description="Version of GKE for a new cluster; None: XPK's choice.")
    cpu_machine_type: Word = Field("e2-standard-16", description="Machines of the new cluster's default pool.")
    mtc_bucket: Bucket | None = Field(
        None, description="Bucket that the multi-tier driver is configured with; None: base_output_directory's."
    )
    capacity: Literal["on-demand", "spot", "flex", "reservation"] = Field(
        "on-demand", description="Of the nodes that XPK makes; elsewhere it only says what to expect of them."
    )
    reservation: Word | None = Field(None, description="Its name, with capacity=reservation.")
    priority: Literal["very-low", "low", "medium", "high", "very-high"] = Field("medium", description="XPK's.")

    # Manifests.
    platform: Literal["gke", "eks"] = Field("gke", description="Whose Kubernetes.")
    instance_type: Word | None = Field(None, description="Machine type of the hosts, where they have no TPUs.")
    gpus_per_host: Annotated[Whole, Field(ge=0, le=64)] = Field(0, description="nvidia.com/gpu of each host.")
    efa_per_host: Annotated[Whole, Field(ge=0, le=128)] = Field(0, description="vpc.amazonaws.com/efa of each.")
    hosts_per_slice: Count | None = Field(
        None, description="Hosts of a slice, where the TPU type does not say."
    )
    memory: Quantity | None = Field(None, description="Memory of the program, without the ramdisk.")
    agent_memory: Quantity = Field("8Gi", description="Memory of the agent; drains are copied through it.")
    shm_size: Quantity = Field("8Gi", description="/dev/shm of the program, within its memory.")
    ramdisk_volume: Literal["csi", "hostpath", "emptydir"] | None = Field(
        None, description="csi: GKE's multi-tier driver; hostpath: a directory in the host's memory."
    )
    ramdisk_host_path: CleanPath = Field("/dev/shm/emergency-ckpt", description="With hostpath, on the host.")
    restart: Literal["recreate", "in_place"] = Field(
        "recreate", description="recreate: JobSet makes new pods; in_place: containers restart in their pods."
    )
    service_account: Label = Field("emergency-ckpt", description="Account of the pods, made by the manifest.")
    gcp_service_account: GcpAccount | None = Field(None, description="Google account that it stands for.")
    role_arn: RoleArn | None = Field(None, description="Role of AWS that it stands for.")
    host_network: bool | None = Field(None, description="None: on for TPUs, off elsewhere.")
    token_secret: Label | None = Field(
        None, description="Secret with the agents' token; None: by the workload."
    )
    queue: Label | None = Field(None, description="LocalQueue of Kueue.")
    hyperpod_kind: Literal["JobSet", "HyperPodPyTorchJob"] = Field(
        "JobSet", description="What is rendered for HyperPod: a JobSet, or its training operator's kind."
    )

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        if secret := next((name for name, text in env.items() if text and is_secret(name)), None):
            raise ValueError(
                f"no secrets, and {secret} looks like one: rights belong to the account of the pods, other "
                "secrets into a Secret that the image's program reads"
            )
        return env

    def __init__(self, sources: dict[str, str] | None = None, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error, sources or {})) from None


FIELDS: tuple[str, ...] = tuple(Deployment.model_fields)


def _explain(error: ValidationError, sources: dict[str, str]) -> str:
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0])
        key, where = PREFIX + name, sources.get(name, "given in Python")
        if problem["type"] == "extra_forbidden":
            hint = did_you_mean(key, [PREFIX + field for field in FIELDS])
            line = f"{key}: there is no such value ({where}).{hint}"
        elif problem["type"] == "missing":
            line = f"{key} is missing: {Deployment.model_fields[name].description}"
        else:
            reason = str(problem.get("ctx", {}).get("error") or problem["msg"]).removeprefix("Input should be ")
            line = f"{key}: {problem['input']!r} cannot be used ({where}). Expected: {reason.rstrip('.')}."
        lines.setdefault(name, line)
    return "The deployment cannot be rendered:\n" + "\n".join(f"  - {line}" for line in lines.values())
