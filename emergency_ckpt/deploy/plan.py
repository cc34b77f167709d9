"""A deployment as a whole: the flags of the job, the values around them, and what follows from both.

A `Plan` that exists can be rendered for its target: what contradicts recovery is refused here, with the rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

from emergency_ckpt.config import Config, load_config
from emergency_ckpt.config.names import misspelt
from emergency_ckpt.config.values import read_value
from emergency_ckpt.core.locations import is_url
from emergency_ckpt.deploy import grace
from emergency_ckpt.deploy.names import check_path, mebibytes
from emergency_ckpt.deploy.program import program_words
from emergency_ckpt.deploy.tpu_types import TpuType, tpu_type
from emergency_ckpt.deploy.values import DEFAULT_RESTART_CODES, FIELDS, PREFIX, Deployment
from emergency_ckpt.errors import ConfigError

Target = Literal["xpk", "gcluster", "k8s", "hyperpod"]
TARGETS: tuple[Target, ...] = get_args(Target)

REPLICATED_JOB = "slice-job"
"""XPK's name for the job of each slice; ours is the same, so that pods are named alike."""

_LONGEST_POD_NAME = 63
_FROM_GOOGLE = ("xpk", "gcluster")


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What is rendered. Raises ConfigError where target, flags and values do not go together."""

    target: Target
    config: Config
    values: Deployment

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            raise ConfigError(f"This cannot be deployed with {self.target}:\n{lines}")
        _ = self.run_words

    @property
    def tpu(self) -> TpuType | None:
        return tpu_type(self.values.tpu_type) if self.values.tpu_type else None

    @property
    def hosts_per_slice(self) -> int:
        return self.tpu.hosts if self.tpu else self.values.hosts_per_slice or 1

    @property
    def shape(self) -> tuple[int, int]:
        """Jobs of the job set, and pods of each.

        A job per slice of TPUs; one for all hosts elsewhere, because jax takes a job for all there is.
        """
        pods = self.hosts_per_slice
        return (self.values.slices, pods) if self.tpu else (1, pods * self.values.slices)

    @property
    def kind(self) -> str:
        """Of the job, in Kubernetes' words."""
        return self.values.hyperpod_kind if self.target == "hyperpod" else "JobSet"

    @property
    def ramdisk(self) -> str:
        """Where the ramdisk is mounted: the local directory of the job."""
        return self.config.local_checkpoint_directory

    @property
    def grace(self) -> grace.Grace:
        rule = grace.under_xpk if self.target in _FROM_GOOGLE else grace.with_sidecar
        return rule(self.values.planned_save_seconds)

    @property
    def restart_codes(self) -> tuple[int, ...]:
        """All exit codes after which the job is started again."""
        return tuple(sorted({*DEFAULT_RESTART_CODES, *self.values.restart_exit_codes}))

    @property
    def further_restart_codes(self) -> tuple[int, ...]:
        """Those that XPK does not know by itself."""
        return tuple(code for code in self.restart_codes if code not in DEFAULT_RESTART_CODES)

    @property
    def run_words(self) -> tuple[str, ...]:
        """The command of the program's container: held until drains are over."""
        return (
            "emergency-ckpt",
            "run",
            "--local-directory",
            self.ramdisk,
            "--grace-seconds",
            str(self.grace.hold_seconds),
            "--",
            *program_words(self.config, self.values.command, self.values.program),
        )

    @property
    def uses_host_network(self) -> bool:
        wanted = self.values.host_network
        return self.tpu is not None if wanted is None else wanted

    @property
    def volume(self) -> Literal["csi", "hostpath", "emptydir"]:
        """Where the ramdisk lives in a manifest: GKE has a driver for hosts with TPUs."""
        if self.values.ramdisk_volume is not None:
            return self.values.ramdisk_volume
        return "csi" if self.target == "k8s" and self.values.platform == "gke" and self.tpu else "hostpath"

    @property
    def mtc_bucket(self) -> str | None:
        """The bucket that the multi-tier driver is configured with."""
        if self.values.mtc_bucket:
            return self.values.mtc_bucket
        scheme, _, rest = self.config.base_output_directory.partition("://")
        return rest.partition("/")[0] or None if scheme == "gs" else None


def load_plan(target: Target, file: str | None, words: Sequence[str]) -> Plan:
    """The plan that a configuration file and `key=value` words describe.

    Words and keys that begin with `deploy_` are values of the deployment, everything else is as for a training
    program. Variables of this machine's environment do not count: what is rendered follows from files and
    words.
    """
    ours = [word for word in words if word.startswith(PREFIX)]
    argv = [*([file] if file else []), *(word for word in words if not word.startswith(PREFIX))]
    # run_name may be missing: it is the name of the workload then, which the file may say.
    config = load_config(argv, {"JOBSET_NAME": "unnamed"})
    given = {key: value for key, value in config.other_keys.items() if key.startswith(PREFIX)}
    sources = {key.removeprefix(PREFIX): config.source_of(key) for key in given}
    _refuse_misspelt(config)
    values: dict[str, Any] = {key.removeprefix(PREFIX): value for key, value in given.items()}
    for word in ours:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"command line: {word!r} is not of the form key=value.")
        name = key.removeprefix(PREFIX)
        values[name] = _value_of(text)
        sources[name] = "command line"
    values = {name: value for name, value in values.items() if value is not None}
    deployment = Deployment(sources, **values)
    return Plan(target, load_config(argv, {"JOBSET_NAME": deployment.workload}), deployment)


def _value_of(text: str) -> Any:
    """A value as it was written, for the model to read; YAML for lists, maps and None."""
    read = read_value(text, "command line")
    return read.value if read.value is None or isinstance(read.value, dict | list) else read.text


def _refuse_misspelt(config: Config) -> None:
    foreign = [key for key in config.other_keys if not key.startswith(PREFIX)]
    found = misspelt([*foreign], [PREFIX + name for name in FIELDS])
    if found:
        raise ConfigError(
            "\n".join(
                f"{config.source_of(key)}: {key} is not a value of a deployment. Did you mean {name}?"
                for key, name in found.items()
            )
        )


def _problems(plan: Plan) -> Iterator[str]:
    yield from _about_flags(plan.config)
    yield from _about_names(plan)
    if plan.target in _FROM_GOOGLE:
        yield from _about_google(plan)
    else:
        yield from _about_manifests(plan)


def _about_flags(config: Config) -> Iterator[str]:
    if not config.saves_locally:
        yield (
            "the local tier is off, and without it nothing here is needed. Set "
            "enable_emergency_checkpoint=True (or enable_multi_tier_checkpointing=True), "
            "local_checkpoint_directory and local_checkpoint_period."
        )
        return
    if not is_url(config.base_output_directory):
        yield (
            f"base_output_directory={config.base_output_directory!r} is a directory, and the pods mount none "
            "that they share. Set it to gs://bucket/prefix or s3://bucket/prefix."
        )
    if config.checkpoint_agent == "off":
        yield "checkpoint_agent=off: nobody would drain or serve what a dead program left. Set it to auto."
    directory = config.local_checkpoint_directory
    if not _is_clean(directory):
        yield (
            f"local_checkpoint_directory={directory!r} is where the ramdisk is mounted in every pod: give an "
            "absolute path other than /, of letters, digits, '.', '_' and '-', as in /local."
        )
    for taken in ("/dev", "/proc", "/sys", "/tmp", "/run"):
        if f"{directory}/".startswith(f"{taken}/"):
            yield (
                f"local_checkpoint_directory={directory} lies in {taken}, which pods have for themselves; take "
                "/local."
            )
    notice = config.preemption_notice_file
    if notice and f"{notice}/".startswith(f"{directory}/"):
        yield (
            f"preemption_notice_file={notice} lies on the ramdisk, where it would outlive the pod and send the "
            "next one away again. Leave it empty: the manifests have a place for it."
        )


def _is_clean(path: str) -> bool:
    try:
        check_path(path)
    except ValueError:
        return False
    return True


def _about_names(plan: Plan) -> Iterator[str]:
    values = plan.values
    jobs, pods = plan.shape
    pod = f"{values.workload}-{REPLICATED_JOB}-{jobs - 1}-{pods - 1}-xxxxx"
    if len(pod) > _LONGEST_POD_NAME:
        yield (
            f"deploy_workload={values.workload} is too long: pods would be named {pod}, and Kubernetes takes "
            f"{_LONGEST_POD_NAME} characters. Shorten it by {len(pod) - _LONGEST_POD_NAME}."
        )
    if values.tpu_type and (values.gpus_per_host or values.instance_type or values.hosts_per_slice):
        yield (
            "deploy_tpu_type says machines and hosts: leave out deploy_instance_type, …_gpus_per_host, "
            "…_hosts_per_slice."
        )


def _about_google(plan: Plan) -> Iterator[str]:
    values = plan.values
    for name in ("cluster", "project", "zone"):
        if getattr(values, name) is None:
            yield f"deploy_{name} is missing: {Deployment.model_fields[name].description}"
    if plan.tpu is None:
        yield (
            "deploy_tpu_type is missing: XPK mounts no ramdisk for GPUs; use `emergency-ckpt deploy k8s` for "
            "those."
        )
    if (values.capacity == "reservation") != (values.reservation is not None):
        yield "deploy_capacity=reservation and deploy_reservation=NAME are given together or not at all."
    if plan.target == "xpk" and plan.mtc_bucket is None:
        yield (
            "deploy_mtc_bucket is missing: the multi-tier driver needs a bucket of Google's, even if nothing "
            "uses it."
        )
    for name, text in values.env.items():
        if '"' in text or "\\" in text:
            yield f"deploy_env {name}: XPK writes it between quotes; it may have no '\"' and no backslash."


def _about_manifests(plan: Plan) -> Iterator[str]:
    values, config = plan.values, plan.config
    if values.memory is None:
        yield f"deploy_memory is missing: {Deployment.model_fields['memory'].description}"
    elif mebibytes(values.shm_size) >= mebibytes(values.memory):
        yield (
            f"deploy_shm_size={values.shm_size} counts as memory of the program, and is not below "
            f"deploy_memory={values.memory}."
        )
    if plan.tpu is None and values.instance_type is None:
        yield "deploy_tpu_type or deploy_instance_type is missing: which hosts?"
    if plan.tpu is not None and (plan.target == "hyperpod" or values.platform == "eks"):
        yield "deploy_tpu_type: there are TPUs on GKE only; give deploy_instance_type and deploy_gpus_per_host."
    if plan.volume == "emptydir" and values.restart == "recreate":
        yield (
            "deploy_ramdisk_volume=emptydir goes with its pod, and JobSet makes new pods at every restart: "
            "nothing would ever be restored from it. Use csi or hostpath, or deploy_restart=in_place."
        )
    if plan.volume == "csi" and (plan.target == "hyperpod" or values.platform != "gke"):
        yield "deploy_ramdisk_volume=csi is GKE's multi-tier driver; use hostpath here."
    if plan.volume != "csi" and (config.enable_multi_tier_checkpointing or config.use_replicator_service):
        yield (
            "enable_multi_tier_checkpointing and use_replicator_service wait for a file that only GKE's "
            f"multi-tier volumes have; this ramdisk is {plan.volume}. Set enable_emergency_checkpoint=True and "
            "keep the backup interval."
        )
    if values.gcp_service_account and (values.platform == "eks" or plan.target == "hyperpod"):
        yield "deploy_gcp_service_account is for GKE; give deploy_role_arn."
    if values.role_arn and values.platform == "gke" and plan.target == "k8s":
        yield "deploy_role_arn is for EKS; give deploy_gcp_service_account."
    if plan.target == "hyperpod" and values.hyperpod_kind != "JobSet" and values.restart == "in_place":
        yield (
            "deploy_restart=in_place is a JobSet's affair; HyperPod's operator restarts pods by its own rules."
        )
