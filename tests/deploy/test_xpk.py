"""Every command that is rendered for XPK, run by the real XPK, and the JobSet that it makes of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from emergency_ckpt.core.tpu_types import FAMILIES, tpu_type
from emergency_ckpt.deploy.plan import Plan
from emergency_ckpt.deploy.xpk import XPK_VERSION, render_xpk
from emergency_ckpt.errors import ConfigError
from tests.deploy.plans import FOR_XPK, config, expanded, plan, refers_to_variables
from tests.deploy.real_xpk import run_python, run_script

ODD = ("it's", 'a "quoted" $HOME', "$(id) $$ `id`", "a;b|c&d>e", "\\", "#", "é ☃", "--x=y z")
MULTI_TIER = config(
    enable_emergency_checkpoint=False,
    enable_multi_tier_checkpointing=True,
    multi_tier_checkpointing_backup_interval_minutes=30,
    local_checkpoint_directory="/mnt/ramdisk",
)
DRY = ("--dry-run", "--skip-validation")


def created(made: Plan, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JobSet that XPK would apply, and the container of the program in it."""
    said = run_script(render_xpk(made), ["create", *DRY, "--output-manifest-file=job.yaml"], directory)
    assert said.endswith("exit code 0"), said
    job_set = yaml.safe_load((directory / "job.yaml").read_text())
    (replicated,) = job_set["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return job_set, container


def program_of(script: str) -> str:
    """What XPK runs in the background of its wrapper, as Kubernetes hands it to bash."""
    (line,) = [line.strip() for line in script.splitlines() if line.strip().endswith("& PID=$!;")]
    assert not refers_to_variables(line)
    return expanded(line).removeprefix("(").removesuffix(") & PID=$!;")


@pytest.mark.parametrize(
    ("made", "driver"),
    [
        (plan("xpk", FOR_XPK, command=("python3", "train.py", *ODD), env={"A": "x $(B) $$"}), "multitier"),
        (plan("xpk", FOR_XPK, MULTI_TIER, program="maxtext", tpu_type="v6e-4x8", slices=4), "multitier"),
    ],
    ids=["emergency", "multi-tier"],
)
def test_the_job_set_that_xpk_makes_lets_the_job_come_back(made: Plan, driver: str, tmp_path: Path) -> None:
    job_set, container = created(made, tmp_path)
    spec = job_set["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert job_set["metadata"]["name"] == made.values.workload
    assert (replicated["replicas"], job["parallelism"]) == made.shape
    assert container["image"] == made.values.image

    # The ramdisk is where the flags say, by a driver whose volumes outlive pods.
    (mount,) = [
        m for m in container["volumeMounts"] if m["mountPath"] == made.config.local_checkpoint_directory
    ]
    (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
    assert volume["csi"]["driver"] == f"{driver}-checkpoint.csi.storage.gke.io"

    # It is started again, also after the exit codes of a lost peer, and has the time to save.
    assert spec["failurePolicy"]["maxRestarts"] == made.values.max_restarts > 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert set(rule["onExitCodes"]["values"]) == set(made.restart_codes) >= {1, 42, 134, 137, 143}
    assert pod["terminationGracePeriodSeconds"] == made.grace.pod_seconds > made.grace.hold_seconds + 10
    assert made.grace.hold_seconds > made.values.planned_save_seconds

    # One program that takes the subshell's place, with the words that were meant.
    *_, script = container["command"]
    assert shlex.split(program_of(script)) == ["exec", *made.run_words]
    assert {e["name"]: expanded(e["value"]) for e in container["env"] or ()} == made.values.env
    assert f"local_checkpoint_directory={mount['mountPath']}" in made.run_words


def test_xpk_takes_the_commands_to_list_and_delete(tmp_path: Path) -> None:
    script = render_xpk(plan("xpk", FOR_XPK, namespace="team"))
    listed = run_script(script, ["list", *DRY], tmp_path)
    assert f"xpk v{XPK_VERSION}" in listed
    assert listed.endswith("exit code 0"), listed
    deleted = run_script(script, ["delete", *DRY], tmp_path)
    assert "w1" in deleted
    assert deleted.endswith("exit code 0"), deleted


def test_xpk_makes_a_cluster_with_the_driver_as_far_as_it_goes_without_one(tmp_path: Path) -> None:
    made = plan("xpk", FOR_XPK, gke_version="1.33.1-gke.1", capacity="reservation", reservation="r-1")
    script = render_xpk(made)
    refused = run_script(script, ["cluster-create", *DRY], tmp_path)
    assert "Planned GKE Version: 1.33.1-gke.1" in refused  # of which only a cloud knows whether it exists
    # Without a cloud it knows the version 0; it stops where it has to speak to the new cluster.
    said = run_script(script, ["cluster-create", *DRY, "--gke-version=0"], tmp_path, "n\n" * 20)
    assert "HighScaleCheckpointing=ENABLED,GcsFuseCsiDriver=ENABLED" in said
    assert "--machine-type=e2-standard-16" in said
    assert "Creating 2 node pool or pools of v5p-64" in said
    assert "Setting up MTC bucket IAM permissions" not in said
    assert "setup_k8s_env" in said
    assert "Invalid kube-config file" in said


def test_tpu_types_are_those_of_xpk(tmp_path: Path) -> None:
    code = """
import json
from xpk.core.system_characteristics import UserFacingNameToSystemCharacteristics as all_types
print(json.dumps({name: [t.topology, t.vms_per_slice, t.chips_per_vm, t.gke_accelerator, t.gce_machine_type]
                  for name, t in all_types.items() if t.accelerator_type.name == "TPU"}))
"""
    theirs = json.loads(run_python(code, tmp_path))
    known = 0
    for name, facts in theirs.items():
        try:
            ours = tpu_type(name)
        except ConfigError:
            family, _, size = name.partition("-")
            assert family not in FAMILIES or _is_unusual(size, facts[0]), name
            continue
        known += 1
        assert [ours.topology, ours.hosts, ours.chips_per_host, ours.accelerator, ours.machine] == facts, name
    assert known > 1200


def _is_unusual(size: str, topology: str) -> bool:
    """Whether XPK's name has nothing to do with a usual topology: a count, sides out of order, or one chip."""
    sides = [int(side) for side in topology.split("x")]
    return size.isdecimal() or sides != sorted(sides) or sides == [1, 1, 1]


def test_a_signal_to_xpks_wrapper_reaches_the_program_and_its_exit_code_comes_back(
    tmp_path: Path, ramdisk: Path
) -> None:
    program = """
import json, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
print("argv", json.dumps(sys.argv[1:]), flush=True)
print("ready", flush=True)
while True:
    signal.pause()
"""
    file = tmp_path / "program.py"
    file.write_text(program)
    made = plan("xpk", FOR_XPK, command=("python3", str(file), *ODD))
    _, container = created(made, tmp_path)
    *shell, script = container["command"]
    # What a machine of a test cannot have: a mount at /local, and the time for `sleep 5`.
    script = expanded(script).replace("--local-directory /local", f"--local-directory {ramdisk}")
    shims = tmp_path / "shims"
    shims.mkdir()
    for name, line in {
        "sleep": "exec /bin/sleep 0.1",
        "python3": f'exec {sys.executable} "$@"',
        "emergency-ckpt": f'exec {sys.executable} -m emergency_ckpt.cli.main "$@"',
    }.items():
        (shims / name).write_text(f"#!/bin/sh\n{line}\n")
        (shims / name).chmod(0o755)
    process = subprocess.Popen(
        [*shell, script],
        env={**os.environ, "PATH": f"{shims}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line.strip())
            if line.strip() == "ready":
                break
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    (said,) = [line for line in lines if line.startswith("argv ")]
    assert json.loads(said.removeprefix("argv ")) == list(made.run_words[made.run_words.index("--") + 3 :])
    assert "EXIT_CODE=42" in rest
    assert process.returncode == 42
