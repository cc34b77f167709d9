"""Scripts around XPK and its successor: create a cluster, create, list and delete the workload.

The form of the command is what SIGTERM needs to get through XPK's wrapper: one program that takes the place of
the subshell, without a pipe or a list.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from emergency_ckpt.deploy.notes import about_recovery
from emergency_ckpt.deploy.plan import Plan
from emergency_ckpt.deploy.templates import for_kubernetes, render

XPK_VERSION = "1.16.0"
"""The version that the tests run."""


def render_xpk(plan: Plan) -> str:
    """A script with the commands `cluster-create`, `create`, `list` and `delete`."""
    return render("xpk.sh.j2", **_names(plan)) + "\n"


def render_gcluster(plan: Plan) -> str:
    """A script with the commands `submit`, `list` and `cancel` of Cluster Toolkit. Untried, and says so."""
    return render("gcluster.sh.j2", **_names(plan)) + "\n"


def command_line(plan: Plan) -> str:
    """What XPK puts into its wrapper, `(COMMAND) & PID=$!`: with `exec` the program gets its signals."""
    return for_kubernetes(f"exec {shlex.join(plan.run_words)}")


def _names(plan: Plan) -> dict[str, Any]:
    values = plan.values
    is_xpk = plan.target == "xpk"
    tool = f"XPK {XPK_VERSION}" if is_xpk else "Cluster Toolkit (gcluster)"
    return {
        "title": f"{values.workload}: {values.slices} x {values.tpu_type} on {values.cluster}, with {tool}.",
        "notes": [*(_about_xpk(plan) if is_xpk else _about_gcluster(plan)), *about_recovery(plan)],
        "values": values,
        "tpu": plan.tpu,
        "capacity": f"--reservation={values.reservation}" if values.reservation else f"--{values.capacity}",
        "mtc_bucket": plan.mtc_bucket,
        "ramdisk": plan.ramdisk,
        "ramdisk_directory": plan.ramdisk.removeprefix("/"),  # XPK mounts at `/` + this
        "restart_codes": plan.restart_codes,
        "further_restart_codes": plan.further_restart_codes,
        "pod_seconds": plan.grace.pod_seconds,
        "env": [for_kubernetes(f"{name}={text}") for name, text in values.env.items()],
        "command": command_line(plan),
    }


def _about_xpk(plan: Plan) -> Iterator[str]:
    yield f"- Written for XPK {XPK_VERSION}: pip install xpk=={XPK_VERSION}, in an environment of its own."
    yield (
        "- XPK puts pods into the network of their hosts, where a NetworkPolicy protects nothing: let a "
        "firewall see to it that only hosts of the cluster reach each other. Agents serve holders of the "
        "job's token only."
    )
    yield (
        "- XPK has no place for a preStop hook, a sidecar or a memory limit: the word that a pod has to go is "
        "SIGTERM, the agent is started by the program, and what the ramdisk holds is taken from the memory of "
        "the host."
    )


def _about_gcluster(plan: Plan) -> Iterator[str]:
    yield (
        "- UNTRIED: these flags are those of Cluster Toolkit's documentation and source; the program itself "
        "was not at hand when this was written. Look at what it would apply first: submit "
        "--dry-run-out=job.yaml"
    )
    yield (
        "- The cluster is made by a blueprint of Cluster Toolkit and needs the addons HighScaleCheckpointing "
        "and GcsFuseCsiDriver, and a CheckpointConfiguration whose inMemoryVolumeSize is "
        f"{plan.values.ramdisk_size}."
    )
