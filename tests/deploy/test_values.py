"""What cannot work is refused, by name and with the rule; presets and overrides come to a plan."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from emergency_ckpt.cli.main import main
from emergency_ckpt.config import Config
from emergency_ckpt.deploy.grace import under_xpk, with_sidecar
from emergency_ckpt.deploy.plan import TARGETS, Target, load_plan
from emergency_ckpt.deploy.values import FIELDS, PREFIX, Deployment
from emergency_ckpt.errors import ConfigError
from tests.deploy.plans import FOR_XPK, JOB, ON_GPUS, ON_TPUS, config, plan

ROOT = Path(__file__).parents[2]
MAXTEXT_BASE = ROOT / "tests" / "config" / "data" / "maxtext_base.yml"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"workload": "W1"}, "small letters"),
        ({"workload": "w-"}, "no '-' at the end"),
        ({"workload": "w" * 41}, "at most 40 characters"),
        ({"namespace": "a_b"}, "small letters"),
        ({"image": "a b"}, "REGISTRY/PATH:TAG"),
        ({"image": "a;reboot"}, "REGISTRY/PATH:TAG"),
        ({"command": ""}, "at least the name of a program"),
        ({"command": "echo 'a"}, "No closing quotation"),
        ({"command": "python train.py | tee log"}, "SIGTERM reaches the shell"),
        ({"command": ("a\nb",)}, "not printable"),
        ({"command": ("a\u2028b",)}, "not printable"),
        ({"env": {"A B": "1"}}, "no digit first"),
        ({"env": {"A": "1\n2"}}, "not printable"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, "no secrets"),
        ({"max_restarts": 0}, "greater than or equal to 1"),
        ({"max_restarts": True}, "not a truth value"),
        ({"restart_exit_codes": "1,x"}, "exit codes separated by commas"),
        ({"restart_exit_codes": (0,)}, "greater than or equal to 1"),
        ({"planned_save_seconds": 0}, "greater than 0"),
        ({"planned_save_seconds": "nan"}, "greater than 0"),
        ({"ramdisk_size": "60G"}, "as in 60000Mi or 64Gi"),
        ({"ramdisk_size": "0Mi"}, "as in 60000Mi or 64Gi"),
        ({"tpu_type": "v9-8"}, "the families are v4, v5litepod, v5p, v6e, tpu7x"),
        ({"tpu_type": "v5e-16"}, "v5e is named v5litepod there"),
        ({"tpu_type": "v5p-100"}, "three multiples of 4"),
        ({"tpu_type": "v6e-3x3"}, "1x1, 2x2, 2x4"),
        ({"mtc_bucket": "gs://b"}, "without gs:// and path"),
        ({"role_arn": "arn:aws:iam::1:role/x"}, "arn:aws:iam::ACCOUNT:role/NAME"),
        ({"gcp_service_account": "x"}, "iam.gserviceaccount.com"),
        ({"ramdisk_host_path": "/a/../b"}, "an absolute path"),
        ({"slises": 2}, "Did you mean deploy_slices"),
    ],
)
def test_a_value_that_a_tool_would_refuse_is_refused_with_the_rule(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Deployment(**{**JOB, **changes})
    assert rule in str(refused.value)
    assert f"{PREFIX}{next(iter(changes))}" in str(refused.value)


MULTI_TIER: Mapping[str, Any] = {
    "enable_multi_tier_checkpointing": True,
    "multi_tier_checkpointing_backup_interval_minutes": 30,
}


@pytest.mark.parametrize(
    ("target", "values", "flags", "rule"),
    [
        ("xpk", FOR_XPK, {"enable_emergency_checkpoint": False}, "the local tier is off"),
        ("xpk", FOR_XPK, {"base_output_directory": "/mnt/x"}, "is a directory, and the pods mount none"),
        ("xpk", FOR_XPK, {"base_output_directory": "gs://b/x"}, "no valid bucket"),
        ("xpk", FOR_XPK, {"checkpoint_agent": "off"}, "nobody would drain"),
        ("xpk", FOR_XPK, {"local_checkpoint_directory": "/dev/shm/x"}, "lies in /dev"),
        ("xpk", FOR_XPK, {"local_checkpoint_directory": "/a b"}, "an absolute path other than /"),
        ("xpk", FOR_XPK, {"local_checkpoint_directory": "ramdisk"}, "an absolute path other than /"),
        ("k8s", ON_TPUS, {"preemption_notice_file": "/local/x"}, "would outlive the pod"),
        ("xpk", {**FOR_XPK, "workload": "w" * 40, "tpu_type": "v5p-4096", "slices": 1000}, {}, "is too long"),
        ("xpk", {**FOR_XPK, "zone": None}, {}, "deploy_zone is missing"),
        ("xpk", {**FOR_XPK, "tpu_type": None}, {}, "XPK mounts no ramdisk for GPUs"),
        ("xpk", {**FOR_XPK, "capacity": "reservation"}, {}, "given together or not at all"),
        ("xpk", FOR_XPK, {"base_output_directory": "s3://bucket/x"}, "deploy_mtc_bucket is missing"),
        ("xpk", {**FOR_XPK, "env": {"A": 'a"b'}}, {}, "between quotes"),
        (
            "xpk",
            {**FOR_XPK, "program": "maxtext"},
            {"local_checkpoint_copies": 2},
            "MaxText's command line refuses",
        ),
        ("xpk", FOR_XPK, {"preemption_exit_code": 3}, "does not restart the job"),
        ("xpk", FOR_XPK, {"preemption_grace_seconds": 111}, "but the pod has 110 s to end"),
        ("k8s", {**ON_TPUS, "memory": None}, {}, "deploy_memory is missing"),
        ("k8s", {**ON_TPUS, "memory": "4Gi"}, {}, "is not below deploy_memory"),
        ("k8s", {**ON_TPUS, "tpu_type": None}, {}, "which hosts?"),
        ("k8s", {**ON_TPUS, "gpus_per_host": 8}, {}, "says machines and hosts"),
        ("k8s", {**ON_TPUS, "platform": "eks"}, {}, "TPUs on GKE only"),
        ("k8s", {**ON_TPUS, "ramdisk_volume": "emptydir"}, {}, "JobSet makes new pods at every restart"),
        ("k8s", {**ON_GPUS, "ramdisk_volume": "csi"}, {}, "GKE's multi-tier driver"),
        ("k8s", ON_GPUS, MULTI_TIER, "wait for a file that only GKE's multi-tier volumes have"),
        ("k8s", {**ON_GPUS, "gcp_service_account": "a@p.iam.gserviceaccount.com"}, {}, "give deploy_role_arn"),
        ("k8s", {**ON_TPUS, "role_arn": "arn:aws:iam::123456789012:role/r"}, {}, "is for EKS"),
        (
            "hyperpod",
            {**ON_GPUS, "hyperpod_kind": "HyperPodPyTorchJob", "restart": "in_place"},
            {},
            "by its own rules",
        ),
    ],
)
def test_what_would_not_recover_is_refused_with_the_rule(
    target: Target, values: Mapping[str, Any], flags: dict[str, Any], rule: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(target, values, config(**flags))
    assert rule in str(refused.value)


def test_secrets_and_endless_lists_of_keys_do_not_get_into_a_command() -> None:
    with pytest.raises(ConfigError, match="hf_access_token looks like a secret"):
        plan("xpk", FOR_XPK, config({"hf_access_token": "hf_x"}))
    plan("xpk", FOR_XPK, config({"hf_access_token": "", "tokenizer_path": "x", "eos_token": "</s>"}))
    with pytest.raises(ConfigError, match="more than 100000 characters"):
        plan("xpk", FOR_XPK, config({f"key_{i}": "x" * 100 for i in range(1000)}))


def test_grace_periods_grow_with_the_planned_save_and_each_fits_into_the_next() -> None:
    for seconds in (1, 20, 60.5, 600):
        for grace in (under_xpk(seconds), with_sidecar(seconds)):
            assert seconds < grace.hold_seconds <= max(30, seconds * 1.5 + 1) < grace.pod_seconds
    assert (under_xpk(60).hold_seconds, under_xpk(60).pod_seconds) == (90, 110)


ADAPTED = ("python3", "-m", "emergency_ckpt.maxtext", "-m", "maxtext.train")


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ({}, 90.0),
        ({"planned_save_seconds": 10}, 30.0),
        ({"capacity": "spot"}, 15.0),
        ({"program": "maxtext"}, None),
        ({"program": "maxtext", "command": ADAPTED}, 90.0),
    ],
)
def test_a_program_reckons_with_the_time_that_its_pod_has(
    values: dict[str, Any], seconds: float | None
) -> None:
    words = plan("xpk", {**FOR_XPK, **values}).run_words
    said = [flag for word in words for flag in word.split() if "preemption_grace_seconds=" in flag]
    assert [float(flag.rpartition("=")[2]) for flag in said] == ([] if seconds is None else [seconds])
    told = plan("xpk", {**FOR_XPK, "capacity": "spot"}, config(preemption_grace_seconds=20)).run_words
    assert "preemption_grace_seconds=20.0" in told
    # Amazon's machines are gone after two minutes.
    of_amazon = plan("k8s", {**ON_GPUS, "capacity": "spot", "planned_save_seconds": 300}).run_words
    assert "preemption_grace_seconds=120.0" in of_amazon


# Files and words.

ANSWERS = {
    "xpk": (
        "gke_multislice.yml",
        "deploy_cluster=c",
        "deploy_project=p",
        "deploy_zone=z",
        "base_output_directory=gs://bucket/j",
    ),
    "k8s": ("spot_s3.yml", "base_output_directory=s3://bucket/j"),
    "hyperpod": ("hyperpod.yml", "base_output_directory=s3://bucket/j"),
}
REST = ("deploy_workload=r1", "deploy_image=r.example/i:1")


@pytest.mark.parametrize("target", ANSWERS)
def test_a_preset_needs_only_what_nobody_else_can_know(target: Target) -> None:
    file, *words = ANSWERS[target]
    made = load_plan(target, file, [*words, *REST])
    assert made.config.saves_locally
    assert made.config.enable_autocheckpoint
    assert made.config.run_name == "r1"
    assert (ROOT / "configs" / file).resolve() == ROOT / "emergency_ckpt" / "config" / file
    with pytest.raises(ConfigError, match="deploy_image is missing"):
        load_plan(target, file, [*words, "deploy_workload=r1"])


def test_the_preset_for_slices_of_tpus_serves_google_s_tools_and_manifests_alike() -> None:
    file, *words = ANSWERS["xpk"]
    plans = [load_plan(target, file, [*words, *REST]) for target in ("xpk", "gcluster", "k8s")]
    assert len({made.run_words[made.run_words.index("--") :] for made in plans}) == 1


def test_words_count_more_than_the_file_and_messages_say_where_a_value_stands(tmp_path: Path) -> None:
    file = tmp_path / "my.yml"
    file.write_text(
        "base_config: gke_multislice.yml\nbase_output_directory: gs://bucket/j\nsteps: 120\n"
        "deploy_workload: from-file\ndeploy_image: r.example/i:1\ndeploy_program: own\n"
        "deploy_cluster: c\ndeploy_project: p\ndeploy_zone: z\ndeploy_command: [python3, 'a b']\n"
    )
    words = [
        "deploy_slices=4",
        "local_checkpoint_period=5",
        "deploy_env={A: 1, B: x y}",
        "deploy_restart_exit_codes=1,3",
    ]
    made = load_plan("xpk", str(file), words)
    values = made.values
    assert (values.workload, values.slices, values.max_restarts) == ("from-file", 4, 100)
    assert (values.env, values.restart_exit_codes) == ({"A": "1", "B": "x y"}, (1, 3))
    program = made.run_words[made.run_words.index("--") + 1 :]
    assert program[:2] == ("python3", "a b")
    assert {"run_name=from-file", "local_checkpoint_period=5", "steps=120"} <= {*program}
    assert not any(PREFIX in word for word in program)
    with pytest.raises(ConfigError, match=rf"{file}:4"):
        load_plan("xpk", str(_changed(file, "from-file", "From")), [])
    with pytest.raises(ConfigError, match=r"deploy_slices: '0' cannot be used \(command line\)"):
        load_plan("xpk", str(_changed(file, "From", "from")), ["deploy_slices=0"])


def _changed(file: Path, old: str, new: str) -> Path:
    file.write_text(file.read_text().replace(old, new))
    return file


def test_variables_of_this_machine_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    file, *words = ANSWERS["k8s"]
    monkeypatch.setenv("M_LOCAL_CHECKPOINT_PERIOD", "7")
    monkeypatch.setenv("JOBSET_NAME", "elsewhere")
    made = load_plan("k8s", file, [*words, *REST])
    assert (made.config.local_checkpoint_period, made.config.run_name) == (20, "r1")


def test_no_key_of_maxtext_is_taken_for_one_of_a_deployment(tmp_path: Path) -> None:
    names = {*yaml.safe_load(MAXTEXT_BASE.read_text())}
    names |= {*(MAXTEXT_BASE.parent / "maxtext_other_keys.txt").read_text().split()}
    assert not names & {PREFIX + name for name in FIELDS}
    file = tmp_path / "all.yml"
    file.write_text(
        "\n".join(f"{name}: 1" for name in sorted(names - {*Config.model_fields}))
        + "\nbase_config: spot_s3.yml\n"
    )
    _, *words = ANSWERS["k8s"]
    load_plan("k8s", str(file), [*words, *REST])


def test_the_command_writes_a_script_that_can_be_run_and_a_token_that_only_its_owner_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, *words = ANSWERS["xpk"]
    script, manifest = tmp_path / "r1.sh", tmp_path / "r1.yaml"
    assert main(["deploy", "xpk", "--config", file, *words, *REST, "--output", str(script)]) == 0
    assert stat.S_IMODE(script.stat().st_mode) & 0o700 == 0o700
    checked = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=20)
    assert (checked.returncode, "usage: " in checked.stderr) == (2, True)
    file, *words = ANSWERS["k8s"]
    manifest.touch(0o644)
    assert (
        main(["deploy", "k8s", *words, "--new-token", "--config", file, "--output", str(manifest), *REST]) == 0
    )
    assert stat.S_IMODE(manifest.stat().st_mode) == 0o600
    capsys.readouterr()
    assert main(["deploy", "xpk", "--new-token", *words, *REST]) == 2
    assert "has no place for a Secret" in capsys.readouterr().err
    assert main(["deploy", "k8s", *words, *REST, "deploy_slices"]) == 2
    assert "nor of the form key=value" in capsys.readouterr().err
    assert main(["deploy", "k8s", "--config", "my.ym"]) == 2
    assert "'my.ym' is neither a configuration file (.yml, .yaml)" in capsys.readouterr().err
    assert main(["deploy", "k8s", "--doc"]) == 0
    documented = capsys.readouterr().out
    assert all(f"{PREFIX}{name} (" in documented for name in FIELDS)


def test_every_target_is_rendered_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for target in TARGETS:
        file, *words = ANSWERS["xpk" if target == "gcluster" else target]
        assert main(["deploy", target, "--config", file, *words, *REST]) == 0
        assert "r.example/i:1" in capsys.readouterr().out


def test_whether_an_agent_runs_is_said_by_an_exit_code(ramdisk: Path) -> None:
    words = [sys.executable, "-m", "emergency_ckpt.cli.main", "agent", "--local-directory", str(ramdisk)]
    assert subprocess.run([*words, "--check"], timeout=30).returncode == 1
    agent = subprocess.Popen([*words, "--bind", "127.0.0.1"], stderr=subprocess.PIPE, text=True)
    try:
        assert agent.stderr is not None
        assert any("serves" in line for line in agent.stderr)
        assert subprocess.run([*words, "--check"], timeout=30).returncode == 0
    finally:
        agent.terminate()
        agent.communicate(timeout=60)
    assert subprocess.run([*words, "--check"], timeout=30).returncode == 1


@pytest.mark.parametrize(
    ("target", "values", "changes", "named"),
    [
        ("xpk", FOR_XPK, {"ramdisk_size": "9000Gi"}, "deploy_ramdisk_size=9000Gi: more than the"),
        ("k8s", ON_GPUS, {"ramdisk_size": "1700Gi"}, "deploy_ramdisk_size=1700Gi, deploy_memory=400Gi"),
        ("k8s", ON_GPUS, {"memory": "2040Gi"}, "host of p5.48xlarge"),
        ("hyperpod", {**ON_GPUS, "instance_type": "ml.p5.48xlarge"}, {"ramdisk_size": "3000Gi"}, "p5.48xlarge"),
        ("xpk", FOR_XPK, {"platform": "eks"}, "deploy_platform=eks: xpk is for GKE"),
    ],
)
def test_what_no_host_has_room_for_is_refused(
    target: Target, values: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        plan(target, values, **changes)


def test_a_pod_on_a_spot_machine_is_told_what_time_it_has() -> None:
    assert plan("k8s", ON_GPUS, planned_save_seconds=300, capacity="spot").notice_seconds == 120
    assert plan("k8s", ON_GPUS, planned_save_seconds=300).notice_seconds == 450
