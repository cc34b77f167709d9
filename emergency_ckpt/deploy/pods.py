"""The pod of one host: the program, the agent as a native sidecar, and the ramdisk between them.

The ramdisk outlives the pod (or the pod outlives its containers), the place of notices never does; what is on
the ramdisk counts as memory of whoever touches it first, so both containers may use that much.
"""

from __future__ import annotations

from typing import Any

from emergency_ckpt.agent.options import TOKEN_VARIABLE
from emergency_ckpt.deploy.grace import AGENT_FINISH_SECONDS
from emergency_ckpt.deploy.names import mebibytes
from emergency_ckpt.deploy.plan import Plan
from emergency_ckpt.deploy.templates import for_kubernetes

PROGRAM, AGENT = "program", "checkpoint-agent"
NOTICES = "/run/emergency-ckpt"
NOTICE_FILE = f"{NOTICES}/leaving"
"""On a volume of the pod: on the ramdisk, a notice would be found by the next pod, which would leave again."""

CSI_DRIVER = "multitier-checkpoint.csi.storage.gke.io"
TOKEN_KEY = "token"


def pod_spec(plan: Plan) -> dict[str, Any]:
    """The `spec` of the pods' template."""
    spec: dict[str, Any] = {
        "serviceAccountName": plan.values.service_account,
        "restartPolicy": "Never" if plan.values.restart == "recreate" else "OnFailure",
        "terminationGracePeriodSeconds": plan.grace.pod_seconds,
        "nodeSelector": _node_selector(plan),
        "tolerations": _tolerations(plan),
        "initContainers": [_agent(plan)],
        "containers": [_program(plan)],
        "volumes": [_ramdisk(plan), _notices(), _shm(plan)],
    }
    if plan.uses_host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if plan.values.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": plan.values.image_pull_secret}]
    return spec


def token_secret(plan: Plan) -> str:
    return plan.values.token_secret or f"{plan.values.workload}-agent-token"


def _program(plan: Plan) -> dict[str, Any]:
    accelerators = _accelerators(plan)
    memory = f"{mebibytes(plan.values.memory or '') + mebibytes(plan.values.ramdisk_size)}Mi"
    container: dict[str, Any] = {
        "name": PROGRAM,
        "image": plan.values.image,
        "command": [for_kubernetes(word) for word in plan.run_words],
        "env": [
            *({"name": name, "value": for_kubernetes(text)} for name, text in plan.values.env.items()),
            _token(plan),
        ],
        "resources": {
            "requests": {"memory": memory, **accelerators},
            "limits": {"memory": memory, **accelerators},
        },
        "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", _notice_command(plan)]}}},
        "volumeMounts": [
            {"name": "ramdisk", "mountPath": plan.ramdisk},
            {"name": "notices", "mountPath": NOTICES},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if plan.tpu:
        container["securityContext"] = {"privileged": True}
    return container


def _agent(plan: Plan) -> dict[str, Any]:
    config = plan.config
    options = {
        "--local-directory": plan.ramdisk,
        "--bind": "$(POD_IP)",
        "--port": str(config.checkpoint_agent_port),
        "--finish-seconds": str(AGENT_FINISH_SECONDS),
        "--preemption-sources": for_kubernetes(config.preemption_sources),
        "--preemption-file": NOTICE_FILE,
        "--tls-certificate": for_kubernetes(config.checkpoint_agent_tls_certificate),
        "--tls-key": for_kubernetes(config.checkpoint_agent_tls_key),
        "--tls-ca": for_kubernetes(config.checkpoint_agent_tls_ca),
    }
    limit = mebibytes(plan.values.agent_memory) + mebibytes(plan.values.ramdisk_size)
    return {
        "name": AGENT,
        "image": plan.values.image,
        "restartPolicy": "Always",  # which makes a container that is started first a sidecar
        "command": [
            "emergency-ckpt",
            "agent",
            *(word for option, value in options.items() if value for word in (option, value)),
        ],
        "env": [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            *({"name": name, "value": for_kubernetes(text)} for name, text in plan.values.env.items()),
            _token(plan),
        ],
        # The program starts after this: a manager that found no agent would start its own.
        "startupProbe": {
            "exec": {"command": ["emergency-ckpt", "agent", "--check", "--local-directory", plan.ramdisk]},
            "periodSeconds": 2,
            "timeoutSeconds": 20,
            "failureThreshold": 90,
        },
        "resources": {
            "requests": {"memory": f"{mebibytes(plan.values.agent_memory)}Mi"},
            "limits": {"memory": f"{limit}Mi"},
        },
        "volumeMounts": [
            {"name": "ramdisk", "mountPath": plan.ramdisk},
            {"name": "notices", "mountPath": NOTICES},
        ],
    }


def _notice_command(plan: Plan) -> str:
    notice = f'{{"seconds": {plan.notice_seconds}, "detail": "preStop"}}'
    return f"echo '{notice}' > {NOTICE_FILE}"


def _token(plan: Plan) -> dict[str, Any]:
    reference = {"name": token_secret(plan), "key": TOKEN_KEY}
    return {"name": TOKEN_VARIABLE, "valueFrom": {"secretKeyRef": reference}}


def _ramdisk(plan: Plan) -> dict[str, Any]:
    sources: dict[str, dict[str, Any]] = {
        "csi": {"csi": {"driver": CSI_DRIVER}},
        "hostpath": {"hostPath": {"path": plan.values.ramdisk_host_path, "type": "DirectoryOrCreate"}},
        "emptydir": {"emptyDir": {"medium": "Memory", "sizeLimit": plan.values.ramdisk_size}},
    }
    return {"name": "ramdisk", **sources[plan.volume]}


def _notices() -> dict[str, Any]:
    return {"name": "notices", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}


def _shm(plan: Plan) -> dict[str, Any]:
    return {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": plan.values.shm_size}}


def _accelerators(plan: Plan) -> dict[str, int]:
    if plan.tpu:
        return {"google.com/tpu": plan.tpu.chips_per_host}
    counts = {"nvidia.com/gpu": plan.values.gpus_per_host, "vpc.amazonaws.com/efa": plan.values.efa_per_host}
    return {name: count for name, count in counts.items() if count}


def _node_selector(plan: Plan) -> dict[str, str]:
    if plan.tpu:
        return {
            "cloud.google.com/gke-tpu-accelerator": plan.tpu.accelerator,
            "cloud.google.com/gke-tpu-topology": plan.tpu.topology,
        }
    selector = {"node.kubernetes.io/instance-type": plan.values.instance_type or ""}
    if plan.target == "hyperpod":
        selector["sagemaker.amazonaws.com/node-health-status"] = "Schedulable"
    return selector


def _tolerations(plan: Plan) -> list[dict[str, str]]:
    return [{"key": name, "operator": "Exists", "effect": "NoSchedule"} for name in _accelerators(plan)]
