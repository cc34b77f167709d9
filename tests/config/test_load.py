"""Loading as MaxText's programs are called: what wins, what is inherited, what is refused and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from emergency_ckpt.config import FLAGS, Config, load_config
from emergency_ckpt.config.load import PACKAGED_BASE
from emergency_ckpt.config.values import read_file
from emergency_ckpt.errors import ConfigError

DATA = Path(__file__).parent / "data"
MAXTEXT_BASE = str(DATA / "maxtext_base.yml")
NOTHING: Mapping[str, str] = {}


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


# The packaged file.


def test_the_packaged_file_has_every_flag_once_in_the_order_of_the_schema() -> None:
    assert sorted(read_file(PACKAGED_BASE)) == sorted(FLAGS)


def test_the_packaged_file_is_the_defaults_with_checkpointing_on() -> None:
    assert load_config([], NOTHING).flags() == Config(enable_checkpointing=True).flags()


def test_the_packaged_file_comments_every_flag() -> None:
    lines = PACKAGED_BASE.read_text().splitlines()
    bare: list[str] = []
    for number, line in enumerate(lines):
        if line.partition(":")[0] in FLAGS:
            above = next(
                earlier for earlier in reversed(lines[:number]) if earlier.partition(":")[0] not in FLAGS
            )
            if not above.startswith("# "):
                bare.append(line)
    assert bare == []


def test_the_repository_shows_the_packaged_file_as_its_configs() -> None:
    shown = Path(__file__).parents[2] / "configs" / "base.yml"
    assert shown.read_text() == PACKAGED_BASE.read_text()


# The calling form.


@pytest.mark.parametrize("program", [["train.py"], [""], ["/usr/bin/train"], []])
def test_the_name_of_the_program_may_stand_first_or_be_missing(tmp_path: Path, program: list[str]) -> None:
    file = write(tmp_path / "a.yml", "checkpoint_period: 5\n")
    config = load_config([*program, file, "run_name=r"], NOTHING)
    assert (config.checkpoint_period, config.run_name) == (5, "r")
    assert load_config([*program, "run_name=r"], NOTHING).checkpoint_period == 10_000


def test_a_program_name_may_be_none_as_in_calls_from_tests() -> None:
    assert load_config([None, MAXTEXT_BASE], NOTHING).enable_checkpointing  # type: ignore[list-item]


def test_a_bare_name_that_is_not_here_means_the_packaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(["base.yml"], NOTHING).source_of("run_name").startswith(str(PACKAGED_BASE))
    write(tmp_path / "base.yml", "run_name: here\n")
    assert load_config(["base.yml"], NOTHING).run_name == "here"


def test_a_missing_file_is_refused_with_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*nowhere\.yml.*Looked for"):
        load_config([str(tmp_path / "nowhere.yml")], NOTHING)


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("run_name", "'run_name' is not of the form key=value"),
        ("second.yml", "'second.yml' is not of the form key=value"),
        ("local_checkpoint_perod=5", "no flag local_checkpoint_perod.* Did you mean local_checkpoint_period"),
        ("--run_name=r", r"Flags are written without dashes\. Did you mean run_name"),
        ("stepz=5", "no flag stepz.* Did you mean steps"),
        ("base_config=other.yml", "base_config belongs into a file"),
        ("run_name.x=5", "no flag run_name.x"),
        ("=5", "no flag"),
    ],
)
def test_a_word_that_means_nothing_is_refused(word: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config([MAXTEXT_BASE, word], NOTHING)


# What wins.


def test_later_wins_base_file_environment_command_line(tmp_path: Path) -> None:
    write(
        tmp_path / "base.yml",
        "checkpoint_period: 1\nlocal_checkpoint_max_to_keep: 1\nrun_name: a\nmtc_data_parallelism: 1\n",
    )
    file = write(
        tmp_path / "own.yml",
        "base_config: base.yml\nlocal_checkpoint_max_to_keep: 2\nrun_name: b\nmtc_data_parallelism: 2\n",
    )
    config = load_config(
        [file, "mtc_data_parallelism=4"], {"M_RUN_NAME": "c", "M_MTC_DATA_PARALLELISM": "3", "PATH": "/bin"}
    )
    assert config.checkpoint_period == 1
    assert config.local_checkpoint_max_to_keep == 2
    assert config.run_name == "c"
    assert config.mtc_data_parallelism == 4
    assert [config.source_of(flag) for flag in ("checkpoint_period", "local_checkpoint_max_to_keep")] == [
        f"{tmp_path}/base.yml:1",
        f"{tmp_path}/own.yml:2",
    ]
    assert config.source_of("run_name") == "environment variable M_RUN_NAME"
    assert config.source_of("mtc_data_parallelism") == "command line"
    assert config.source_of("enable_checkpointing") == "default"


def test_the_last_of_two_equal_words_wins() -> None:
    assert load_config(["run_name=a", "run_name=b"], NOTHING).run_name == "b"


def test_the_environment_of_the_process_is_used_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M_RUN_NAME", "from-process")
    assert load_config([]).run_name == "from-process"


def test_the_name_of_the_jobset_is_the_run_name_where_none_is_set(tmp_path: Path) -> None:
    environ = {"JOBSET_NAME": "job-7"}
    config = load_config([MAXTEXT_BASE], environ)
    assert (config.run_name, config.source_of("run_name")) == ("job-7", "environment variable JOBSET_NAME")
    assert load_config([MAXTEXT_BASE, "run_name=own"], environ).run_name == "own"
    assert load_config([write(tmp_path / "a.yml", "{}")], environ).run_name == "job-7"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("M_CHECKPOINT_PEROD", "no flag checkpoint_perod.* Did you mean checkpoint_period"),
        ("M_checkpoint_period", "write it in upper case, M_CHECKPOINT_PERIOD"),
        ("M_UNHEARD_OF", "no flag unheard_of.*Unset it"),
    ],
)
def test_an_environment_variable_that_names_no_key_is_refused(name: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config([], {name: "5"})


@pytest.mark.parametrize("name", ["M_", "MAX_STEPS", "m_run_name", "M_mixed_Case"])
def test_other_environment_variables_are_left_alone(name: str) -> None:
    assert load_config([], {name: "5"}).flags() == load_config([], NOTHING).flags()


# Inheritance.


def test_a_base_is_looked_for_beside_the_file_then_above_then_in_the_package(tmp_path: Path) -> None:
    file = write(tmp_path / "configs/jobs/deep/own.yml", "base_config: shared/base.yml\n")
    write(tmp_path / "configs/shared/base.yml", "run_name: above\n")
    assert load_config([file], NOTHING).run_name == "above"
    write(tmp_path / "configs/jobs/deep/shared/base.yml", "run_name: beside\n")
    assert load_config([file], NOTHING).run_name == "beside"


def test_without_any_other_the_packaged_file_is_the_base(tmp_path: Path) -> None:
    file = write(tmp_path / "own.yml", "base_config: base.yml\nsteps: 5\n")
    config = load_config([file, "steps=6"], NOTHING)
    assert config.enable_checkpointing
    assert config.other_keys == {"steps": 6}


def test_a_file_without_a_base_stands_on_the_defaults_of_the_schema(tmp_path: Path) -> None:
    assert load_config([write(tmp_path / "own.yml", "run_name: r\nbase_config: None\n")], NOTHING).flags() == (
        Config(run_name="r").flags()
    )


def test_a_chain_of_bases_is_followed_to_its_end(tmp_path: Path) -> None:
    write(tmp_path / "c.yml", "run_name: c\ncheckpoint_period: 3\n")
    write(tmp_path / "b.yml", "base_config: c.yml\nrun_name: b\n")
    config = load_config([write(tmp_path / "a.yml", "base_config: b.yml\n")], NOTHING)
    assert (config.run_name, config.checkpoint_period) == ("b", 3)


@pytest.mark.parametrize("own", ["a.yml", "../{name}/a.yml"])
def test_a_file_that_inherits_from_itself_is_refused(tmp_path: Path, own: str) -> None:
    file = write(tmp_path / "a.yml", f"base_config: {own.format(name=tmp_path.name)}\n")
    with pytest.raises(ConfigError, match=r"circle: .*a\.yml -> .*a\.yml"):
        load_config([file], NOTHING)


def test_two_files_that_inherit_from_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "b.yml", "base_config: a.yml\n")
    with pytest.raises(ConfigError, match=r"circle: .*a\.yml -> .*b\.yml -> .*a\.yml"):
        load_config([write(tmp_path / "a.yml", "base_config: b.yml\n")], NOTHING)


def test_a_base_that_is_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"base_config in .*a\.yml:1: expected a file name"):
        load_config([write(tmp_path / "a.yml", "base_config: [b.yml]\n")], NOTHING)


# Values.


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("checkpoint_period=20_000", 20_000),
        ("checkpoint_period=1e3", 1000),
        ("checkpoint_period='7'", 7),
        ("max_num_checkpoints_to_keep=None", None),
        ("max_num_checkpoints_to_keep=3", 3),
        ("enable_checkpointing=False", False),
        ("enable_checkpointing=true", True),
        ("local_checkpoint_slot_wait_seconds=1e-3", 0.001),
        ("local_checkpoint_slot_wait_seconds=5", 5.0),
        ("run_name=2024_01", "2024_01"),
        ("run_name=1e3", "1e3"),
        ("run_name=True", "True"),
        ("run_name=a=b", "a=b"),
        ("run_name='quoted name'", "quoted name"),
        ("run_name=None", ""),
        ("run_name=", ""),
        ("checkpoint_storage_compression=None", "none"),
        ("checkpoint_log_format=JSON", "json"),
        ("checkpoint_replica_axis=1", 1),
        ("checkpoint_replica_axis=data", "data"),
        ("local_checkpoint_directory=/local dir", "/local dir"),
    ],
)
def test_a_value_means_the_same_in_a_file_the_environment_and_the_command_line(
    tmp_path: Path, word: str, value: object
) -> None:
    flag, _, text = word.partition("=")
    file = write(tmp_path / "a.yml", f"{flag}: {text}\n")
    for config in (
        load_config([file], NOTHING),
        load_config([], {f"M_{flag.upper()}": text}),
        load_config([word], NOTHING),
    ):
        assert getattr(config, flag) == value
        assert type(getattr(config, flag)) is type(value)


@pytest.mark.parametrize(
    ("place", "argv", "environ"),
    [
        ("a.yml:2", ["{file}"], {}),
        ("environment variable M_CHECKPOINT_PERIOD", [], {"M_CHECKPOINT_PERIOD": "soon"}),
        ("command line", ["checkpoint_period=soon"], {}),
    ],
)
def test_a_wrong_value_is_refused_with_the_place_where_it_was_written(
    tmp_path: Path, place: str, argv: list[str], environ: dict[str, str]
) -> None:
    file = write(tmp_path / "a.yml", "\ncheckpoint_period: soon\n")
    with pytest.raises(
        ConfigError, match=rf"checkpoint_period: expected a whole .* found 'soon' \(.*{place}\)"
    ):
        load_config([word.format(file=file) for word in argv], environ)


def test_a_contradiction_names_the_places_of_both_flags(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yml", "enable_checkpointing: True\ncheckpoint_period: 100\n")
    with pytest.raises(ConfigError) as caught:
        load_config([file, "checkpoint_period=0"], NOTHING)
    assert f"enable_checkpointing=True ({file}:1)" in str(caught.value)
    assert "checkpoint_period=0 (command line)" in str(caught.value)


# Files of other programs.


def test_a_complete_base_file_of_maxtext_loads_as_it_is() -> None:
    config = load_config([MAXTEXT_BASE], NOTHING)
    assert config.flags() == Config(enable_checkpointing=True).flags()
    assert len(config.other_keys) > 650
    assert not set(config.other_keys) & set(FLAGS)
    assert config.other_keys["steps"] == 150_001
    assert config.other_keys["learning_rate"] == 3e-5
    assert config.other_keys["local_sa_block_q"] is None
    assert config.other_keys["mlp_activations"] == ["silu", "linear"]
    assert config.other_keys["logical_axis_rules"][1] == ["activation_vocab", "tensor"]


def test_a_job_of_the_maxtext_guide_is_configured_by_its_own_command_line() -> None:
    config = load_config(
        [
            "src/maxtext/trainers/pre_train/train.py",
            MAXTEXT_BASE,
            "base_output_directory=/shared/out",
            "dataset_path=/data",
            "steps=120",
            "per_device_batch_size=6",
            "enable_checkpoint_cloud_logger=True",
            "checkpoint_period=100",
            "enable_emergency_checkpoint=True",
            "local_checkpoint_period=20",
            "local_checkpoint_directory=//local",
            "run_name=guide",
        ],
        NOTHING,
    )
    assert config.saves_locally
    assert config.checkpoint_directory == "/shared/out/guide/checkpoints"
    assert (config.checkpoint_period, config.local_checkpoint_period) == (100, 20)
    assert config.other_keys["per_device_batch_size"] == 6


def test_keys_of_other_programs_can_be_overridden_nested_ones_with_dots(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yml", "steps: 5\nrl: {beta: 0.1, grpo: {n: 2}}\nlora: None\n")
    config = load_config([file, "rl.grpo.n=4", "rl.new=x", "lora.rank=8"], {"M_STEPS": "6"})
    assert config.other_keys == {
        "steps": 6,
        "rl": {"beta": 0.1, "grpo": {"n": 4}, "new": "x"},
        "lora": {"rank": 8},
    }
    assert config.source_of("steps") == "environment variable M_STEPS"


def test_a_misspelt_flag_in_a_file_is_refused_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    text = Path(MAXTEXT_BASE).read_text()
    line = text.splitlines().index("local_checkpoint_period: 0") + 1
    file = write(tmp_path / "a.yml", text.replace("local_checkpoint_period: 0", "local_chekpoint_period: 5"))
    with pytest.raises(ConfigError) as caught:
        load_config([file], NOTHING)
    assert f"{file}:{line}: local_chekpoint_period is not a flag. Did you mean local_checkpoint_period?" in str(
        caught.value
    )


def test_a_misspelt_flag_is_refused_although_the_base_sets_the_right_one(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yml", f"base_config: {MAXTEXT_BASE}\nlocal_checkpoint_dir: /local\n")
    with pytest.raises(ConfigError, match="Did you mean local_checkpoint_directory"):
        load_config([file], NOTHING)


def test_a_key_of_another_program_that_is_alike_passes_the_way_the_message_says(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yml", "checkpoint_directory: /mine\n")
    with pytest.raises(ConfigError, match="another program, set local_checkpoint_directory in this file too"):
        load_config([file], NOTHING)
    file = write(tmp_path / "a.yml", "checkpoint_directory: /mine\nlocal_checkpoint_directory: ''\n")
    assert load_config([file], NOTHING).other_keys == {"checkpoint_directory": "/mine"}
