"""Manifests are of their kinds, and what a job needs to come back is in them."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from emergency_ckpt.agent import options as agent_options
from emergency_ckpt.cli import run as run_command
from emergency_ckpt.deploy.hyperpod import render_hyperpod
from emergency_ckpt.deploy.jobset import render_jobset
from emergency_ckpt.deploy.names import mebibytes
from emergency_ckpt.deploy.plan import Plan
from tests.deploy.plans import ON_GPUS, ON_TPUS, config, expanded, plan
from tests.deploy.schemas import check

S3 = config(base_output_directory="s3://bucket/jobs")
ON_HYPERPOD: Mapping[str, Any] = {**ON_GPUS, "instance_type": "ml.p5.48xlarge"}
PLANS = {
    "gke": plan(
        "k8s", ON_TPUS, gcp_service_account="a@p.iam.gserviceaccount.com", queue="team", env={"A": "1e3"}
    ),
    "gke, multi-tier, one slice of one host": plan(
        "k8s",
        ON_TPUS,
        config(enable_multi_tier_checkpointing=True, multi_tier_checkpointing_backup_interval_steps=100),
        slices=1,
        tpu_type="v6e-1",
        memory="16Gi",
        ramdisk_size="10000Mi",
        host_network=False,
    ),
    "gke with GPUs": plan("k8s", {**ON_GPUS, "platform": "gke", "efa_per_host": 0}, image_pull_secret="pull"),
    "eks": plan("k8s", ON_GPUS, S3, role_arn="arn:aws:iam::123456789012:role/trainer", capacity="spot"),
    "eks, in place": plan("k8s", ON_GPUS, S3, ramdisk_volume="emptydir", restart="in_place"),
    "eks in the hosts' network": plan("k8s", ON_GPUS, S3, host_network=True, efa_per_host=0),
    "hyperpod": plan("hyperpod", ON_HYPERPOD, S3),
    "hyperpod's own kind": plan("hyperpod", ON_HYPERPOD, S3, hyperpod_kind="HyperPodPyTorchJob"),
}
ALL = pytest.mark.parametrize("made", PLANS.values(), ids=PLANS)


def rendered(made: Plan) -> str:
    return (render_hyperpod if made.target == "hyperpod" else render_jobset)(made)


def documents(made: Plan) -> dict[str, Any]:
    """By kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(rendered(made))}


def pod_of(made: Plan) -> dict[str, Any]:
    spec = documents(made)[made.kind]["spec"]
    if made.kind == "JobSet":
        return spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return spec["replicaSpecs"][0]["template"]["spec"]


def containers_of(made: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """The program's and the agent's."""
    pod = pod_of(made)
    (program,), (agent,) = pod["containers"], pod["initContainers"]
    return program, agent


@ALL
def test_every_document_is_of_its_kind(made: Plan) -> None:
    for document in documents(made).values():
        check(document)


def test_the_schemas_refuse_what_is_not_of_the_kind() -> None:
    wrong = (AssertionError, jsonschema.ValidationError, kubernetes_validate.ValidationError)
    policy = documents(PLANS["eks"])["NetworkPolicy"]
    policy["spec"]["ingres"] = []
    job_set = documents(PLANS["eks"])["JobSet"]
    job_set["spec"]["maxRestarts"] = 3
    job_set_of_wrong_pods = documents(PLANS["eks"])["JobSet"]
    job = job_set_of_wrong_pods["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["template"]["spec"]["containers"][0]["preStop"] = {}
    hyperpod = documents(PLANS["hyperpod's own kind"])["HyperPodPyTorchJob"]
    hyperpod["spec"]["runPolicy"]["maxRestarts"] = 3
    for document in (policy, job_set, job_set_of_wrong_pods, hyperpod):
        with pytest.raises(wrong):
            check(document)


@ALL
def test_what_is_on_the_ramdisk_outlives_what_is_restarted(made: Plan) -> None:
    pod = pod_of(made)
    program, agent = containers_of(made)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for container in (program, agent):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts[made.config.local_checkpoint_directory] == "ramdisk"
    if pod["restartPolicy"] == "Never":  # new pods at every restart
        assert "emptyDir" not in volumes["ramdisk"]
    else:
        assert volumes["ramdisk"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "60000Mi"}


@ALL
def test_memory_limits_have_room_for_the_ramdisk(made: Plan) -> None:
    program, agent = containers_of(made)
    ramdisk = mebibytes(made.values.ramdisk_size)
    limits = [mebibytes(container["resources"]["limits"]["memory"]) for container in (program, agent)]
    assert limits[0] == mebibytes(made.values.memory or "") + ramdisk
    assert limits[1] == mebibytes(made.values.agent_memory) + ramdisk
    requested = [mebibytes(container["resources"]["requests"]["memory"]) for container in (program, agent)]
    assert sum(requested) == ramdisk + mebibytes(made.values.memory or "") + mebibytes(made.values.agent_memory)


@ALL
def test_program_and_agent_are_started_with_words_that_they_take(made: Plan) -> None:
    program, agent = containers_of(made)
    words = [expanded(word) for word in program["command"]]
    assert tuple(words) == made.run_words
    parser = argparse.ArgumentParser()
    run_command.add_arguments(parser)
    at = words.index("--")
    run = parser.parse_args(words[2:at])
    assert run.local_directory == [Path(made.config.local_checkpoint_directory)]
    assert words[at + 1 : at + 3] == ["python3", "train.py"]

    parser = argparse.ArgumentParser()
    agent_options.add_arguments(parser)
    given = [word.replace("$(POD_IP)", "10.0.0.7") for word in agent["command"]]
    assert given[:2] == ["emergency-ckpt", "agent"]
    parsed = parser.parse_args(given[2:])
    options = agent_options.options_of(parsed)
    assert parsed.local_directory == run.local_directory[0]
    assert (options.bind, options.idle_seconds) == ("10.0.0.7", None)
    assert agent["restartPolicy"] == "Always"

    # Each part of the end fits into the next.
    grace = pod_of(made)["terminationGracePeriodSeconds"]
    assert (
        made.values.planned_save_seconds
        < run.grace_seconds
        < run.grace_seconds + options.finish_seconds
        < grace
    )


@ALL
def test_both_take_their_token_from_the_same_secret_which_is_not_in_the_file(made: Plan) -> None:
    tokens = []
    for container in containers_of(made):
        env = {variable["name"]: variable for variable in container["env"]}
        tokens.append(env["EMERGENCY_CKPT_AGENT_TOKEN"]["valueFrom"]["secretKeyRef"])
    assert tokens[0] == tokens[1] == {"name": "w1-agent-token", "key": "token"}
    assert "Secret" not in documents(made)


def test_a_new_token_is_another_each_time_and_only_where_it_is_asked_for() -> None:
    found = []
    for _ in range(2):
        text = render_jobset(PLANS["eks"], new_token=True)
        (secret,) = [d for d in yaml.safe_load_all(text) if d["kind"] == "Secret"]
        check(secret)
        found.append(secret["stringData"]["token"])
    assert len(set(found)) == 2
    assert all(len(token) == 64 for token in found)


@ALL
def test_a_pod_that_has_to_go_writes_a_notice_that_dies_with_it(made: Plan, tmp_path: Path) -> None:
    program, agent = containers_of(made)
    file = agent["command"][agent["command"].index("--preemption-file") + 1]
    directory = str(Path(file).parent)
    for container in (program, agent):
        (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == directory]
        (volume,) = [volume for volume in pod_of(made)["volumes"] if volume["name"] == mount["name"]]
        assert "emptyDir" in volume
    hook = program["lifecycle"]["preStop"]["exec"]["command"]
    assert file in hook[-1]
    subprocess.run(
        [*hook[:-1], hook[-1].replace(file, shlex.quote(str(tmp_path / "leaving")))], check=True, timeout=10
    )
    assert json.loads((tmp_path / "leaving").read_text())["seconds"] == made.grace.hold_seconds


@ALL
def test_a_network_policy_is_there_where_it_protects_something(made: Plan) -> None:
    found = documents(made)
    pod = pod_of(made)
    if pod.get("hostNetwork"):
        assert "NetworkPolicy" not in found
        assert "a NetworkPolicy protects nothing" in rendered(made).replace("\n#  ", "")
    elif made.kind == "JobSet":
        policy = found["NetworkPolicy"]["spec"]
        assert policy["policyTypes"] == ["Ingress"]
        assert policy["ingress"] == [{"from": [{"podSelector": policy["podSelector"]}]}]
        assert policy["podSelector"]["matchLabels"] == {"jobset.sigs.k8s.io/jobset-name": "w1"}


@ALL
def test_jobs_are_restarted_after_the_exit_codes_of_lost_hosts(made: Plan) -> None:
    spec = documents(made)[made.kind]["spec"]
    if made.kind != "JobSet":
        assert spec["runPolicy"]["jobMaxRetryCount"] == made.values.max_restarts
        return
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (*made.shape, made.shape[1])
    assert replicated["replicas"] * job["parallelism"] == made.values.slices * made.hosts_per_slice
    assert job["completionMode"] == "Indexed"
    policy = spec["failurePolicy"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (made.values.max_restarts, "BlockingRecreate")
    if made.values.restart == "recreate":
        (rule,) = job["podFailurePolicy"]["rules"]
        assert set(rule["onExitCodes"]["values"]) == set(made.restart_codes) >= {1, 42, 134, 137, 143}
        assert rule["onExitCodes"]["containerName"] == containers_of(made)[0]["name"]
        assert (rule["onExitCodes"]["operator"], job["backoffLimit"]) == ("NotIn", 0)
    else:
        # Kubernetes takes exit codes into account only where pods are never restarted.
        assert "podFailurePolicy" not in job
        assert job["backoffLimit"] == made.values.max_restarts * made.shape[1]


def test_hosts_are_chosen_by_what_they_are() -> None:
    tpus, gpus, hyperpod = (pod_of(PLANS[name]) for name in ("gke", "eks", "hyperpod"))
    assert tpus["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x4x4",
    }
    assert tpus["containers"][0]["resources"]["limits"]["google.com/tpu"] == 4
    assert gpus["nodeSelector"] == {"node.kubernetes.io/instance-type": "p5.48xlarge"}
    assert gpus["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert gpus["containers"][0]["resources"]["limits"]["vpc.amazonaws.com/efa"] == 32
    assert hyperpod["nodeSelector"]["sagemaker.amazonaws.com/node-health-status"] == "Schedulable"


def test_accounts_stand_for_the_clouds_own() -> None:
    accounts = [documents(PLANS[name])["ServiceAccount"]["metadata"]["annotations"] for name in ("gke", "eks")]
    assert accounts == [
        {"iam.gke.io/gcp-service-account": "a@p.iam.gserviceaccount.com"},
        {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/trainer"},
    ]


def test_what_was_not_tried_says_so() -> None:
    for name, made in PLANS.items():
        assert ("UNTRIED" in rendered(made)) == name.startswith("hyperpod")
