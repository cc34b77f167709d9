"""What contradicts recovery, or does not go together: one sentence for each, with the rule.

Only what no single value tells is looked at here; the form of values is `values`' affair.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from emergency_ckpt.config import Config
from emergency_ckpt.config.load import is_given
from emergency_ckpt.core.locations import is_url
from emergency_ckpt.core.machines import MIB, gke_reserved_bytes
from emergency_ckpt.deploy.names import check_path, mebibytes
from emergency_ckpt.deploy.values import Deployment
from emergency_ckpt.errors import ConfigError
from emergency_ckpt.persistent.object_store.urls import parse_url

if TYPE_CHECKING:
    from emergency_ckpt.deploy.plan import Plan

FROM_GOOGLE = ("xpk", "gcluster")
"""Targets that are tools for GKE alone."""

REPLICATED_JOB = "slice-job"
"""XPK's name for the job of each slice; ours is the same, so that pods are named alike."""

_LONGEST_POD_NAME = 63


def problems(plan: Plan) -> Iterator[str]:
    """Why the plan cannot be rendered; nothing where it can."""
    yield from _about_flags(plan.config)
    yield from _about_leaving(plan)
    yield from _about_names(plan)
    yield from _about_memory(plan)
    if plan.target in FROM_GOOGLE:
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
    else:
        try:
            parse_url(config.base_output_directory)
        except ConfigError as error:
            yield f"base_output_directory: {error}"
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


def _about_leaving(plan: Plan) -> Iterator[str]:
    config = plan.config
    if not config.enable_autocheckpoint:
        return
    if plan.kind == "JobSet" and config.preemption_exit_code not in plan.restart_codes:
        yield (
            f"preemption_exit_code={config.preemption_exit_code} does not restart the job: 42, 127 to 255 and "
            "deploy_restart_exit_codes do."
        )
    if (
        is_given(config, "preemption_grace_seconds")
        and config.preemption_grace_seconds > plan.grace.pod_seconds
    ):
        yield (
            f"preemption_grace_seconds={config.preemption_grace_seconds:g}, but the pod has "
            f"{plan.grace.pod_seconds} s to end. Leave it out, or set deploy_planned_save_seconds to what the "
            "save takes."
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


def _about_memory(plan: Plan) -> Iterator[str]:
    values, machine = plan.values, plan.machine
    if machine is None:
        return
    asked = {"ramdisk_size": values.ramdisk_size}
    if plan.target not in FROM_GOOGLE:  # Those limit no memory.
        asked |= {"memory": values.memory, "agent_memory": values.agent_memory}
    given = {f"deploy_{name}={size}": mebibytes(size) for name, size in asked.items() if size}
    kept = gke_reserved_bytes(machine.memory_bytes) if machine.is_on_gke else 0
    most = (machine.memory_bytes - kept) // MIB
    if sum(given.values()) > most:
        yield (
            f"{', '.join(given)}: more than the {most}Mi that pods have of a host of {machine.name}, all"
            " together. `emergency-ckpt plan` says how large the ramdisk must be."
        )


def _about_google(plan: Plan) -> Iterator[str]:
    values = plan.values
    if values.platform != "gke":
        yield f"deploy_platform={values.platform}: {plan.target} is for GKE; use `emergency-ckpt deploy k8s`."
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
