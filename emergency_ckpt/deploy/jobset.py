"""A job as a JobSet with what its pods need: account, rights, network policy, and a Secret that a person makes.

JobSet makes all pods anew when one fails; exit codes that no restart mends fail the job.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

from emergency_ckpt.deploy.checks import REPLICATED_JOB
from emergency_ckpt.deploy.manifest import Document, numbers, text_of
from emergency_ckpt.deploy.notes import about_recovery
from emergency_ckpt.deploy.plan import Plan
from emergency_ckpt.deploy.pods import CSI_DRIVER, PROGRAM, TOKEN_KEY, pod_spec, token_secret

JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
_EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"


def render_jobset(plan: Plan, *, new_token: bool = False) -> str:
    """The documents for `kubectl apply`; with `new_token`, a Secret with a random token among them."""
    return text_of([*_documents(plan, new_token)])


def _documents(plan: Plan, new_token: bool) -> Iterator[Document]:
    (paragraphs, account), *others = supporting(plan, new_token)
    yield [*header(plan), "", *paragraphs], account
    yield from others
    yield _about_job(plan), job_set(plan)


def header(plan: Plan) -> Iterator[str]:
    """What the reader of the file should know, and do before it is applied."""
    values = plan.values
    where = "HyperPod (EKS)" if plan.target == "hyperpod" else values.platform.upper()
    hosts = plan.hosts_per_slice * values.slices
    yield f"{values.workload}: {values.slices} slices, {hosts} hosts, as a {plan.kind} for {where}."
    yield ""
    if plan.target == "hyperpod":
        yield (
            "- UNTRIED on HyperPod: labels and kinds are those of its documentation; no such cluster was at "
            "hand when this was written."
        )
    controller = " and JobSet's controller 0.6 or later (BlockingRecreate)" if plan.kind == "JobSet" else ""
    yield f"- Needs Kubernetes 1.29 or later (sidecars){controller}."
    yield from about_recovery(plan)
    secret = token_secret(plan)
    yield (
        f"- The agents' token is the key {TOKEN_KEY} of the Secret {secret}. Make it once, before: kubectl "
        f"create secret generic {secret} -n {values.namespace} "
        f'--from-literal={TOKEN_KEY}="$(openssl rand -hex 32)"'
    )
    if plan.volume == "csi":
        yield (
            f"- The ramdisk is made by GKE's driver {CSI_DRIVER}: the cluster needs the addon "
            "HighScaleCheckpointing and a CheckpointConfiguration whose inMemoryVolumeSize is "
            f"{values.ramdisk_size}."
        )
    elif plan.volume == "hostpath":
        yield (
            f"- The ramdisk is {values.ramdisk_host_path} of each host and outlives pods and job: it must lie "
            f"on a tmpfs with room for {values.ramdisk_size} (/dev/shm has half of the memory unless it is "
            "mounted anew). The next job evicts what is there; remove it by hand where none follows."
        )
    else:
        yield (
            "- The ramdisk goes with the pod: containers restart in place, with pauses that grow to five "
            "minutes, and a host that is lost takes its copy along. Other slices and the persistent tier have "
            "it."
        )
    if plan.uses_host_network:
        yield (
            "- Pods are in the network of their hosts, where a NetworkPolicy protects nothing, so there is "
            "none here: let a firewall see to it that only hosts of the cluster reach each other. Agents "
            "serve holders of the token."
        )
    if plan.tpu is None and plan.kind == "JobSet":
        yield "- jax finds its peers by Kubernetes' API: the image needs jax[k8s]."


def supporting(plan: Plan, new_token: bool) -> Iterator[Document]:
    """Everything but the job."""
    values = plan.values
    yield ["Who the pods are; the bucket's rights belong to it."], _account(plan)
    if plan.tpu is None and plan.kind == "JobSet":
        yield ["By which jax finds its peers: reading is enough."], _role(plan)
        yield [], _binding(plan)
    if new_token:
        yield (
            ["The token that lets clients of agents in. Keep this file to yourself."],
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": _metadata(plan, token_secret(plan)),
                "type": "Opaque",
                "stringData": {TOKEN_KEY: secrets.token_hex(32)},
            },
        )
    if not plan.uses_host_network and plan.kind == "JobSet":
        name = f"{values.workload}-only-its-own"
        yield ["Only pods of this job reach each other; out they may go."], _network_policy(plan, name)


def _about_job(plan: Plan) -> list[str]:
    if plan.values.restart == "in_place":
        return [
            "Containers restart in their pods. A job whose container failed too often is made anew by JobSet."
        ]
    return ["When a pod fails, all are made anew; exit codes that are not in the list end the job."]


def job_set(plan: Plan) -> dict[str, Any]:
    """The JobSet."""
    values = plan.values
    replicas, pods = plan.shape
    metadata = _metadata(plan, values.workload)
    if values.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": values.queue}
    if plan.tpu:
        metadata["annotations"] = {_EXCLUSIVE: "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": _failure_policy(plan),
            "replicatedJobs": [
                {"name": REPLICATED_JOB, "replicas": replicas, "template": {"spec": _job(plan, pods)}}
            ],
        },
    }


def _failure_policy(plan: Plan) -> dict[str, Any]:
    policy: dict[str, Any] = {"maxRestarts": plan.values.max_restarts, "restartStrategy": "BlockingRecreate"}
    if plan.values.restart == "recreate":
        rule = {"name": "noRestartMendsIt", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
        policy["rules"] = [rule]
    return policy


def _job(plan: Plan, pods: int) -> dict[str, Any]:
    job: dict[str, Any] = {"completionMode": "Indexed", "parallelism": pods, "completions": pods}
    if plan.values.restart == "recreate":
        codes = {"containerName": PROGRAM, "operator": "NotIn", "values": numbers(plan.restart_codes)}
        job |= {"backoffLimit": 0, "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]}}
    else:
        job["backoffLimit"] = min(plan.values.max_restarts * pods, 2**31 - 1)
    return job | {"template": {"spec": pod_spec(plan)}}


def _metadata(plan: Plan, name: str) -> dict[str, Any]:
    return {"name": name, "namespace": plan.values.namespace}


def _account(plan: Plan) -> dict[str, Any]:
    values = plan.values
    metadata = _metadata(plan, values.service_account)
    if values.gcp_service_account:
        metadata["annotations"] = {"iam.gke.io/gcp-service-account": values.gcp_service_account}
    if values.role_arn:
        metadata["annotations"] = {"eks.amazonaws.com/role-arn": values.role_arn}
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}


def _role(plan: Plan) -> dict[str, Any]:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": _metadata(plan, f"{plan.values.service_account}-peers"),
        "rules": [
            {"apiGroups": [""], "resources": ["pods", "services"], "verbs": ["get", "list"]},
            {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list"]},
        ],
    }


def _binding(plan: Plan) -> dict[str, Any]:
    name = f"{plan.values.service_account}-peers"
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": _metadata(plan, name),
        "subjects": [{"kind": "ServiceAccount", **_metadata(plan, plan.values.service_account)}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
    }


def _network_policy(plan: Plan, name: str) -> dict[str, Any]:
    own = {"podSelector": {"matchLabels": pod_labels(plan)}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(plan, name),
        "spec": {**own, "policyTypes": ["Ingress"], "ingress": [{"from": [own]}]},
    }


def pod_labels(plan: Plan) -> dict[str, str]:
    """By which the pods of this job are known; JobSet sets its label by itself."""
    if plan.kind == "JobSet":
        return {JOBSET_LABEL: plan.values.workload}
    return {"emergency-ckpt/workload": plan.values.workload}
