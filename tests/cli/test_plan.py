"""`emergency-ckpt plan`: its three forms say the same, its flags load, and what is impossible is refused."""

from __future__ import annotations

import argparse
import json
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from emergency_ckpt.cli.main import main
from emergency_ckpt.cli.plan import add_arguments
from emergency_ckpt.cli.planning.quantities import parse_bytes, parse_count
from emergency_ckpt.cli.planning.report import flags_line
from emergency_ckpt.cli.planning.request import read_request
from emergency_ckpt.config import load_config
from emergency_ckpt.core.forecast.job_plan import make_plan
from emergency_ckpt.errors import ConfigError
from tests.test_import_rules import run_command

GUIDE = ["plan", "--parameters", "70e9", "--hosts-per-slice", "32", "--slices", "2", "--step-seconds", "5"]
V5E = ["plan", "--parameters", "70B", "--machine", "ct5lp-hightpu-4t", "--slices", "4", "--step-seconds", "5"]


@pytest.fixture(autouse=True)
def _no_overrides_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOBSET_NAME", raising=False)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def test_the_guides_example_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *GUIDE, "--slots", "2", "--tpu-type", "v6e-128")
    assert plan["ramdisk"]["size"] == "60000Mi"
    assert plan["ramdisk"]["needed_bytes"] == pytest.approx(60.375e9, abs=2)
    assert plan["machine"]["name"] == "ct6e-standard-4t"
    assert plan["job"]["chips"] == 256
    assert any("local saves wait" in note for note in plan["notes"])


def test_a_slice_takes_as_long_to_repair_as_a_slice_does_however_small(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["plan", "--parameters", "1B", "--hosts-per-slice", "2", "--slices", "2", "--step-seconds", "5"]
    plan = planned(capsys, *words, "--repair-slice-seconds", "9000")
    assert {each["what"] for each in plan["losses"] if each["seconds"] > 9000} == {"a slice", "all hosts"}


def test_the_table_and_the_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*GUIDE, "--store", "s3", "max_num_checkpoints_to_keep=5"]
    plan = planned(capsys, *words)
    assert main(words) == 0
    shown = capsys.readouterr().out
    for said in (
        plan["ramdisk"]["size"],
        f"{plan['goodput']:.2%}",
        f"{plan['monthly_cost']['total']:,.2f}",
        f"{plan['periods']['local_steps']:,} steps",
        "two hosts at the same place of two slices",
    ):
        assert said in shown
    assert plan["losses"][0]["source"] == "own"
    assert plan["losses"][-1]["source"] == "persistent"
    # Every assumption is named, with who said so.
    assert all(each["source"] for each in plan["assumptions"])


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).map(str.strip)


@settings(max_examples=30, deadline=None)
@example("None", "/ramdisk/x", 1, 1, False, None)
@example("#\U0001da8c", "/ramdisk/0", 1, 1, False, None)
@given(
    NAMES.filter(lambda name: bool(name) and not name.startswith("/") and ".." not in name.split("/")),
    NAMES.map(lambda name: f"/ramdisk/{name}".rstrip()),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
    st.none() | st.integers(1, 9),
)
def test_the_flags_load_to_what_was_planned(
    name: str, directory: str, kept: int, copies: int, spreads: bool, kept_persistent: int | None
) -> None:

    config = load_config([], {}).replace(
        run_name=name,
        local_checkpoint_directory=directory,
        base_output_directory="s3://bucket/a b;$(c)",
        local_checkpoint_max_to_keep=kept,
        local_checkpoint_copies=copies,
        local_checkpoint_spread=spreads,
        max_num_checkpoints_to_keep=kept_persistent,
    )
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    plan = make_plan(read_request(parser.parse_args(GUIDE[1:]), config).request)
    loaded = load_config(shlex.split(flags_line(plan, config)), {})
    assert loaded.saves_locally
    assert (loaded.run_name, loaded.local_checkpoint_directory) == (name, directory)
    assert loaded.base_output_directory == "s3://bucket/a b;$(c)"
    assert loaded.local_checkpoint_period == plan.periods.local
    assert loaded.checkpoint_period == plan.periods.persistent
    assert loaded.local_checkpoint_max_to_keep == kept
    assert loaded.local_checkpoint_copies == copies
    assert loaded.local_checkpoint_spread is spreads
    assert loaded.max_num_checkpoints_to_keep == kept_persistent


@pytest.mark.parametrize("words", [[], ["run_name=r", "checkpoint_period=4_000"]])
def test_printed_flags_are_one_line_that_loads_and_plans_the_same(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*GUIDE, *words, "--flags"]) == 0
    shown = capsys.readouterr()
    (line,) = shown.out.splitlines()
    load_config(["base.yml", *shlex.split(line)], {})
    assert "ramdisk per host: 90000Mi" in shown.err
    before, after = planned(capsys, *GUIDE, *words), planned(capsys, *GUIDE, *shlex.split(line))
    assert before["periods"] == after["periods"]
    assert before["ramdisk"] == after["ramdisk"]


def test_backups_stay_backups(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "run_name=r",
        "base_output_directory=gs://b/r",
        "local_checkpoint_directory=/local",
        "local_checkpoint_period=20",
        "enable_multi_tier_checkpointing=True",
        "multi_tier_checkpointing_backup_interval_minutes=30",
        "checkpoint_period=0",
    ]
    plan = planned(capsys, *GUIDE, *words)
    assert plan["periods"]["persistent_steps"] == 360
    assert main([*GUIDE, *words, "--flags"]) == 0
    loaded = load_config(shlex.split(capsys.readouterr().out), {})
    assert (loaded.checkpoint_period, loaded.multi_tier_checkpointing_backup_interval_steps) == (0, 360)


@pytest.mark.parametrize(
    ("words", "steps", "flags"),
    [
        # The one that comes first, whether or not there is another.
        ([], 60, {"checkpoint_period": 0, "multi_tier_checkpointing_backup_interval_steps": 60}),
        (
            ["checkpoint_period=1000"],
            60,
            {"checkpoint_period": 1000, "multi_tier_checkpointing_backup_interval_minutes": 5},
        ),
        (["checkpoint_period=50"], 50, {"checkpoint_period": 50}),
        # A backup is of a local step: the first one after five minutes, which are 60 steps.
        (["local_checkpoint_period=40"], 80, {"multi_tier_checkpointing_backup_interval_steps": 80}),
    ],
)
def test_backups_beside_a_persistent_period_count(
    words: list[str], steps: int, flags: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*GUIDE, "multi_tier_checkpointing_backup_interval_minutes=5", *words]
    plan = planned(capsys, *words)
    assert plan["periods"]["persistent_steps"] == steps
    assert flags.items() <= plan["flags"].items()
    assert main([*words, "--flags"]) == 0
    line = capsys.readouterr().out
    assert planned(capsys, *GUIDE, *shlex.split(line))["periods"] == plan["periods"]


def test_a_local_period_is_chosen_that_a_given_persistent_one_is_a_multiple_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = planned(capsys, *GUIDE, "checkpoint_period=1000")
    assert plan["periods"]["local_steps"] == 250
    assert not any("multiple" in note for note in plan["notes"])
    alone = planned(capsys, *GUIDE, "checkpoint_period=997")  # a prime: no period near the best one
    assert any("no multiple" in note for note in alone["notes"])


def test_the_first_command_of_the_page_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    command = page.partition("    emergency-ckpt ")[2].partition("\n\n")[0]
    assert main(shlex.split(command.replace("\\\n", " "))) == 0
    assert "persistent tier per month" in capsys.readouterr().out
    assert main([*shlex.split(command.replace("\\\n", " ")), "--flags"]) == 0
    assert "replace run_name, base_output_directory, local_checkpoint_directory" in capsys.readouterr().err


def test_a_ramdisk_that_does_not_fit_is_refused_with_one_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*V5E, "--hosts-per-slice", "16"]
    said = refused(capsys, *words)
    assert "does not fit" in said
    assert "The nearest plan that fits: --slots 2" in said
    assert "it fits from 19 hosts per slice on" in said
    assert planned(capsys, *words, "--slots", "2")["ramdisk"]["slots"] == 2
    assert main([*V5E, "--hosts-per-slice", "19"]) == 0
    assert main([*V5E, "--hosts-per-slice", "18"]) == 2


def test_the_next_size_of_slices_that_fits_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--parameters", "70B", "--slices", "4", "--step-seconds", "5"]
    assert "fits from 19 hosts per slice on: --tpu-type v5litepod-128" in refused(
        capsys, *words, "--tpu-type", "v5litepod-64"
    )
    assert main([*words, "--tpu-type", "v5litepod-128"]) == 0


def test_where_fewer_slots_are_not_enough_slices_share_the_state(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*V5E, "--hosts-per-slice", "9"]
    said = refused(capsys, *words)
    nearest = "local_checkpoint_copies=2 local_checkpoint_spread=True --slots 2"
    assert f"The nearest plan that fits: {nearest}" in said
    more = refused(capsys, *words, "local_checkpoint_max_to_keep=2")
    assert f"The nearest plan that fits: local_checkpoint_max_to_keep=1 {nearest}" in more
    assert main([*words, *nearest.split()]) == 0


@pytest.mark.parametrize(("flag", "steps"), [("checkpoint_period", 3), ("local_checkpoint_period", 1)])
def test_a_period_that_is_shorter_than_the_save_is_refused_with_one_that_is_not(
    flag: str, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *GUIDE, f"{flag}={steps}")
    least = said.strip().rpartition(f"{flag}=")[2]
    assert planned(capsys, *GUIDE, f"{flag}={least}")["flags"][flag] == int(least) == steps + 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tpu-type", "v6e-100"], "followed by one of the topologies 1x1"),
        (["--tpu-type", "v6e-128", "--chips-per-host", "8"], "contradicts --chips-per-host 8"),
        (["--chips-per-host", "0"], "a job has one at least"),
        (["--tpu-type", "v6e-256"], "contradicts --hosts-per-slice 32"),
        (["--machine", "p5.48xlrge"], "Did you mean p5.48xlarge"),
        (["--machine-memory", "448 gigs"], "expected bytes such as 448GB"),
        (["--slots", "7"], "the nearest is 3"),
        (["--host-mtbf-hours", "1e-300"], "0.001 or more, or inf"),
        (["--restart-seconds", "-1"], "expected 0 to 2,592,000"),
        (["--device-rate", "1"], "or the rates that it is assumed from"),
        (["--store-rate", "0"], "out of range"),
        (["--step-seconds", "nan"], "how long a train step takes"),
        (["--step-seconds", "1e-12", "--simulate"], "how long a train step takes, 1e-06"),
        (["--host-mtbf-hours", "0.01", "--simulate"], "up to 5,000,000 are simulated. The nearest that can be"),
        (["--simulate", "--runs", "1"], "an interval needs two"),
        (["--simulate", "--days", "1e9"], "expected above 0"),
        (["--hosts-per-slice", "0"], "a job has one at least"),
        (["--slices", "1000000"], "3125 such slices"),
        (["local_checkpoint_copies=3", "--sharded-over-slices"], "set it to 2 at most"),
        (["checkpoint_perod=3"], "Did you mean checkpoint_period"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *GUIDE, *words)


@given(st.integers(1, 2**40), st.sampled_from([("Mi", 2**20), ("GB", 10**9), ("", 1), ("KiB", 1024)]))
def test_bytes_are_read_as_they_are_written(number: int, unit: tuple[str, int]) -> None:
    if number * unit[1] < 2**53:
        assert parse_bytes(f"{number}{unit[0]}") == number * unit[1]
    assert parse_count("1.5T") == 1.5e12
    for wrong in ("", "B", "-1GB", "1 2", "1e400", "0", "٣GB"):
        with pytest.raises(ConfigError):
            parse_bytes(wrong)


def test_a_state_without_shardings_is_exact_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        "--state",
        "tests.cli.described_states:plain",
        "--hosts-per-slice",
        "4",
        "--step-seconds",
        "1",
    ]
    plan = planned(capsys, *words)
    assert plan["state"]["total_bytes"] == 12_000_004
    assert plan["state"]["host_bytes"] == 3_000_001


def test_a_state_with_shardings_is_exact_for_the_fullest_host(capsys: pytest.CaptureFixture[str]) -> None:
    """Two slices of two hosts of four devices: a host holds half of w and of b, all of s and of step."""
    words = ["plan", "--state", "tests.cli.described_states:sharded", "--hosts-per-slice", "2", "--slices", "2"]
    plan = planned(capsys, *words, "--step-seconds", "1")
    total = 4 * (8192 * 4096 + 8192 + 1024 + 1)
    assert plan["state"]["total_bytes"] == total
    # In pages of 4 KiB: w four shards of 16 MiB, b two shards of 8 KiB, s and step a page each.
    assert plan["state"]["host_bytes"] == 4 * 2**24 + 2 * 8192 + 2 * 4096
    assert "by its shardings" in plan["assumptions"][0]["source"]
    spread = planned(capsys, *words, "--step-seconds", "1", "local_checkpoint_spread=True")
    assert spread["state"]["slot_bytes"] < 0.6 * plan["state"]["slot_bytes"]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("no_colon", "expected module:function"),
        ("no.such.module:f", "no such function to import"),
        ("tests.cli.described_states:absent", "no such function to import"),
        ("tests.cli.described_states:number", "it is a int, not a function"),
        ("tests.cli.described_states:broken", "raised RuntimeError: no such model"),
        ("tests.cli.described_states:sharded", "the job has 3 slices of 2 hosts"),
        ("builtins:dict", "has no arrays"),
    ],
)
def test_what_is_no_description_of_a_state_is_refused(
    named: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--state", named, "--hosts-per-slice", "2", "--slices", "3", "--step-seconds", "1"]
    assert said in refused(capsys, *words)


def test_a_simulation_is_printed_and_drawn_in_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.html"
    words = [
        *GUIDE,
        "--simulate",
        "--days",
        "20",
        "--runs",
        "4",
        "--host-mtbf-hours",
        "500",
        "--plot",
        str(plot),
    ]
    plan = planned(capsys, *words)
    assert [each["policy"] for each in plan["simulation"]] == [
        "persistent only",
        "Orbax emergency",
        "emergency_ckpt",
    ]
    ours = plan["simulation"][-1]
    assert 0 < ours["goodput"]["half_width"] < 0.1
    # The closed formula knows nothing of failures during restarts.
    assert ours["goodput"]["mean"] == pytest.approx(plan["goodput"], abs=0.02)
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "95 % confidence interval" in shown
    assert "the simulation also assumes" in shown
    text = plot.read_text()
    drawings = text.split("<svg")[1:]
    assert len(drawings) == 2
    for drawing in drawings:
        ElementTree.fromstring("<svg" + drawing.partition("</svg>")[0] + "</svg>")
    assert "http" not in text
    assert "src=" not in text
    assert "cannot be written" in refused(capsys, *words, "--plot", str(tmp_path))


def test_a_plan_and_a_simulation_need_no_jax(tmp_path: Path) -> None:
    *shown, heavy = run_command(
        *GUIDE, "--simulate", "--days", "2", "--runs", "2", "--plot", str(tmp_path / "p")
    )
    assert any(line.startswith("ramdisk per host") for line in shown)
    assert heavy == ""


DEPLOYED = """\
base_config: gke_multislice.yml
base_output_directory: gs://bucket/jobs
deploy_workload: r1
deploy_cluster: c1
deploy_project: p1
deploy_zone: us-central1-a
deploy_image: registry.example/team/trainer:1
"""


@pytest.fixture
def deployed(tmp_path: Path) -> str:
    """A file for `emergency-ckpt deploy`: 2 slices of v5p-256, by its preset."""
    file = tmp_path / "my.yml"
    file.write_text(DEPLOYED)
    return str(file)


def test_a_file_of_a_deployment_says_the_shape_and_options_and_words_another_one(
    deployed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", deployed, "--parameters", "70B", "--step-seconds", "5"]
    plan = planned(capsys, *words)
    assert (plan["job"]["slices"], plan["job"]["hosts_per_slice"]) == (2, 32)
    assert plan["machine"]["name"] == "ct5p-hightpu-4t"
    assert plan["flags"]["run_name"] == "r1"
    assert planned(capsys, *words, "deploy_slices=4")["job"]["slices"] == 4
    assert planned(capsys, *words, "deploy_slices=4", "--slices", "3")["job"]["slices"] == 3
    assert planned(capsys, *words, "--hosts-per-slice", "8")["machine"] is None
    on_gpus = planned(
        capsys, *words, "deploy_tpu_type=null", "deploy_hosts_per_slice=8", "deploy_instance_type=p5.48xlarge"
    )
    assert (on_gpus["job"]["hosts_per_slice"], on_gpus["machine"]["name"]) == (8, "p5.48xlarge")


def test_what_a_plan_says_of_a_deployment_deploys(
    deployed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", deployed, "--parameters", "140B", "--step-seconds", "5", "--slices", "4"]
    plan = planned(capsys, *words)
    assert main([*words, "--deploy-flags"]) == 0
    line = shlex.split(capsys.readouterr().out)
    assert line[-len(plan["deployment"]) :] == [f"{name}={value}" for name, value in plan["deployment"].items()]
    assert main(["deploy", "xpk", "--config", deployed, *line]) == 0
    script = capsys.readouterr().out
    assert "--num-slices=4" in script
    assert f"--mtc-ramdisk-size={plan['ramdisk']['size']}" in script
    assert len(plan["notes"]) == 1, "the file has another size"
    assert planned(capsys, "plan", deployed, "--parameters", "140B", "--step-seconds", "5", *line) == plan | {
        "notes": []
    }


def test_a_deployment_that_a_plan_finds_too_small_is_pointed_out(
    deployed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", deployed, "--parameters", "70B", "--step-seconds", "5"]
    assert planned(capsys, *words)["notes"] == []
    (note,) = planned(capsys, *words, "deploy_ramdisk_size=60000Mi")["notes"]
    assert "deploy_ramdisk_size=60000Mi is less than the 90000Mi of this plan" in note
    assert planned(capsys, *words, "deploy_ramdisk_size=60000Mi", "--slots", "2")["notes"] != [note]
    (note,) = planned(capsys, *words, "deploy_planned_save_seconds=10")["notes"]
    assert "a pod may be gone before its step is in the persistent tier" in note
    (note,) = planned(capsys, *words, "--persistent-lag-seconds", "4000", "checkpoint_period=4000")["notes"]
    assert "longer than any grace period" in note
    assert (
        "deploy_planned_save_seconds"
        not in planned(capsys, *words, "--persistent-lag-seconds", "4000", "checkpoint_period=4000")[
            "deployment"
        ]
    )
    assert "Did you mean deploy_slices" in refused(capsys, *words, "deploy_slicez=3")
    assert "there is no such value" in refused(capsys, *words, "deploy_sources=3")
    assert "cannot be used" in refused(capsys, *words, "deploy_slices=0")


def test_words_may_stand_before_and_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "base.yml", *GUIDE[1:], "checkpoint_period=1000"]
    assert planned(capsys, *words)["periods"]["persistent_steps"] == 1000
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--nonsense"])
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


def test_grace_periods_do_not_get_shorter_by_what_a_plan_assumes(
    deployed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", deployed, "--parameters", "1B", "--step-seconds", "1"]
    seconds = "deploy_planned_save_seconds"
    assert planned(capsys, *words)["deployment"][seconds] == 60
    assert planned(capsys, *words, f"{seconds}=90")["deployment"][seconds] == 90
    assert planned(capsys, *words, "--persistent-lag-seconds", "200")["deployment"][seconds] > 200


@pytest.mark.parametrize(
    ("file", "options", "target"),
    [
        ("", ["--hosts-per-slice", "8", "--machine", "a3-highgpu-8g"], "k8s"),
        ("deploy_tpu_type: null\ndeploy_hosts_per_slice: 8\n", ["--tpu-type", "v5p-128"], "xpk"),
    ],
)
def test_another_kind_of_hosts_than_the_file_has_deploys_as_well(
    file: str, options: list[str], target: str, deployed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(deployed).write_text(DEPLOYED + file)
    assert (
        main(["plan", deployed, "--parameters", "70B", "--step-seconds", "5", *options, "--deploy-flags"]) == 0
    )
    line = shlex.split(capsys.readouterr().out)
    assert main(["deploy", target, "--config", deployed, *line]) == 0


def test_files_may_be_called_like_values_and_have_keys_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deploy_my.yml"
    file.write_text(DEPLOYED + "deploy_target: prod\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("M_DEPLOY_SLICES", "7")  # As little as for `deploy`.
    words = ["plan", "deploy_my.yml", "--parameters", "70B", "--step-seconds", "5"]
    assert planned(capsys, *words)["job"]["slices"] == 2
    file.write_text(DEPLOYED)
    assert main(["deploy", "xpk", "--config", "deploy_my.yml"]) == 0


ON_HYPERPOD = """\
base_config: hyperpod.yml
base_output_directory: s3://bucket/jobs
deploy_workload: r1
deploy_image: registry.example/team/trainer:1
"""


def test_the_names_of_sagemaker_stay_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "my.yml").write_text(ON_HYPERPOD)
    words = ["plan", str(file), "--parameters", "7B", "--step-seconds", "5"]
    for more in ([], ["--machine", "ml.p5.48xlarge", "--hosts-per-slice", "2"]):
        plan = planned(capsys, *words, *more)
        assert (plan["machine"]["name"], plan["job"]["chips"]) == ("p5.48xlarge", 32)
        assert plan["deployment"]["deploy_instance_type"] == "ml.p5.48xlarge"
    assert main([*words, "--deploy-flags"]) == 0
    line = shlex.split(capsys.readouterr().out)
    assert main(["deploy", "hyperpod", "--config", str(file), *line]) == 0
    assert "ml.p5.48xlarge" in capsys.readouterr().out
    unknown = planned(capsys, *words, "deploy_instance_type=ml.p5.48xlarg")
    assert unknown["deployment"]["deploy_instance_type"] == "ml.p5.48xlarg"
    assert any("Did you mean" in note and "p5.48xlarge" in note for note in unknown["notes"])


def test_what_the_pods_of_a_deployment_need_comes_off_the_memory_of_a_host(
    deployed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", deployed, "--parameters", "70B", "--step-seconds", "5"]
    roomy, tight = (planned(capsys, *words, f"deploy_memory={size}") for size in ("100Gi", "200Gi"))
    assert roomy["ramdisk"]["available_bytes"] - tight["ramdisk"]["available_bytes"] == 100 * 2**30
    assert "does not fit" in refused(capsys, *words, "deploy_memory=400Gi")
    assert any(
        "are free for it" in note for note in planned(capsys, *words, "deploy_ramdisk_size=400Gi")["notes"]
    )


def test_files_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["plan", "my.ym", *GUIDE[1:]], ["flags", "my.ym"]):
        assert "'my.ym' is neither a configuration file" in refused(capsys, *words)


def test_advice_is_given_where_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    often = ["--host-mtbf-hours", "inf", "--process-mtbf-hours", "inf", "--job-mtbf-hours", "10"]
    for more, helps in (([], False), (["--sharded-over-slices"], True)):
        notes = planned(capsys, *GUIDE, *often, *more)["notes"]
        assert any("leave nothing on the ramdisks" in note for note in notes), notes
        assert any("local_checkpoint_copies=2 would leave more" in note for note in notes) is helps
    notes = planned(capsys, *GUIDE, "local_checkpoint_period=3")["notes"]
    assert any("the periods that are set cost" in note for note in notes)
