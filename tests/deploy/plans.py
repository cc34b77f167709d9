"""Plans to render, made without files; each has what its target needs, and can be changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from emergency_ckpt.config import Config
from emergency_ckpt.deploy.plan import Plan, Target
from emergency_ckpt.deploy.values import Deployment

FLAGS: Mapping[str, Any] = {
    "run_name": "r1",
    "base_output_directory": "gs://bucket/jobs",
    "enable_checkpointing": True,
    "enable_emergency_checkpoint": True,
    "enable_autocheckpoint": True,
    "local_checkpoint_directory": "/local",
    "local_checkpoint_period": 20,
}
JOB: Mapping[str, Any] = {
    "workload": "w1",
    "image": "registry.example/team/trainer:1",
    "command": ("python3", "train.py"),
    "ramdisk_size": "60000Mi",
    "slices": 2,
}
ON_TPUS: Mapping[str, Any] = {**JOB, "tpu_type": "v5p-64", "memory": "200Gi"}
ON_GPUS: Mapping[str, Any] = {
    **JOB,
    "platform": "eks",
    "instance_type": "p5.48xlarge",
    "gpus_per_host": 8,
    "efa_per_host": 32,
    "hosts_per_slice": 4,
    "memory": "400Gi",
}
FOR_XPK: Mapping[str, Any] = {**ON_TPUS, "cluster": "c1", "project": "p1", "zone": "us-central1-a"}


def config(other_keys: Mapping[str, Any] | None = None, **flags: Any) -> Config:
    given = {**FLAGS, **flags}
    return Config(**given, other_keys=dict(other_keys or {}), sources=dict.fromkeys(given, "a test"))


def plan(target: Target, values: Mapping[str, Any], flags: Config | None = None, **changes: Any) -> Plan:
    return Plan(target, flags or config(), Deployment(**{**values, **changes}))


def expanded(text: str) -> str:
    """What Kubernetes makes of a text in `command` or `env`: `$$` is `$`; `$(NAME)` of no variable stays."""
    return re.sub(r"\$(\$|\([^)]*\))", lambda found: "$" if found[1] == "$" else found[0], text)


def refers_to_variables(text: str) -> bool:
    """Whether Kubernetes would look for a variable in it."""
    return "$(" in text.replace("$$", "")
