"""No value changes what a command means: whatever is rendered parses back to the values."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_ckpt.config import FLAGS, load_config
from emergency_ckpt.config.names import MAXTEXT_FLAGS, MAXTEXT_HANDS_ON, MAXTEXT_WORDS_VARIABLE
from emergency_ckpt.config.values import read_file
from emergency_ckpt.deploy.jobset import render_jobset
from emergency_ckpt.deploy.manifest import text_of
from emergency_ckpt.deploy.program import program_words
from emergency_ckpt.deploy.templates import comment, render
from emergency_ckpt.deploy.xpk import render_gcluster, render_xpk
from emergency_ckpt.errors import ConfigError
from tests.deploy.plans import FOR_XPK, ON_GPUS, config, expanded, plan, refers_to_variables
from tests.deploy.scripts import options_of, words_of

MAXTEXT_BASE = Path(__file__).parents[1] / "config" / "data" / "maxtext_base.yml"
PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp")), max_size=30).filter(
    str.isprintable
)
HOSTILE = st.sampled_from(
    [
        "$(id)",
        "`id`",
        "$$",
        "$",
        "'",
        '"',
        "\\",
        "; id",
        "| id",
        "#",
        "{}",
        "{{ x }}",
        "{% raw %}",
        "%s",
        "-x",
        "",
    ]
)
TEXT = PRINTABLE | HOSTILE | st.lists(HOSTILE | PRINTABLE, max_size=4).map("".join)
WORD = TEXT.filter(lambda word: word not in {"|", "||", "&&", "&", ";", ">", ">>", "<"})
COMMANDS = st.lists(WORD, min_size=1, max_size=4).map(tuple)
VARIABLES = st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True), TEXT, max_size=3)
LEAVES = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | TEXT
OTHER_KEYS = st.dictionaries(
    st.sampled_from(["steps", "dataset_path", "note", "names"]),
    LEAVES | st.lists(LEAVES, max_size=3),
    max_size=4,
)


@given(command=COMMANDS, env=VARIABLES, other_keys=OTHER_KEYS, run_name=TEXT)
@settings(max_examples=60)
def test_a_script_parses_back_to_the_values(
    command: tuple[str, ...], env: dict[str, str], other_keys: dict[str, Any], run_name: str
) -> None:
    env = {name: text for name, text in env.items() if not set(text) & set('"\\')}
    flags = config(other_keys, **({"run_name": run_name} if _is_run_name(run_name) else {}))
    on_xpk = plan("xpk", FOR_XPK, flags, command=command, env=env)
    on_gcluster = plan("gcluster", FOR_XPK, flags, command=command, env=env)
    for made, script, start in (
        (on_xpk, render_xpk(on_xpk), "xpk workload create"),
        (on_gcluster, render_gcluster(on_gcluster), "gcluster job submit"),
    ):
        options = options_of(script, start)
        (line,) = options["--command"]
        assert not refers_to_variables(line)
        assert shlex.split(expanded(line)) == ["exec", *made.run_words]
        assert [expanded(text) for text in options.get("--env", [])] == [f"{k}={v}" for k, v in env.items()]
        # Nothing was added to the other options, nor lost from them.
        assert len(words_of(script, start)) == 3 + sum(map(len, options.values()))


@given(command=COMMANDS, env=VARIABLES, other_keys=OTHER_KEYS)
@settings(max_examples=30)
def test_a_manifest_reads_back_to_the_values(
    command: tuple[str, ...], env: dict[str, str], other_keys: dict[str, Any]
) -> None:
    made = plan("k8s", ON_GPUS, config(other_keys), command=command, env=env)
    (job_set,) = [d for d in yaml.safe_load_all(render_jobset(made)) if d["kind"] == "JobSet"]
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (program,) = pod["containers"]
    assert not any(map(refers_to_variables, program["command"]))
    assert tuple(map(expanded, program["command"])) == made.run_words
    assert {e["name"]: expanded(e["value"]) for e in program["env"] if "value" in e} == env


@given(values=st.dictionaries(TEXT, LEAVES | st.lists(TEXT)))
def test_text_in_manifests_is_never_taken_for_something_else(values: dict[str, Any]) -> None:
    assert yaml.safe_load(text_of([((), values)])) == values


@pytest.mark.parametrize(
    "text", ["1e3", "0o17", "1_000", "yes", "n", "on", "12:30", "0x1F", ".5", "~", "2026-11-26", ""]
)
def test_what_readers_of_yaml_disagree_about_is_quoted(text: str) -> None:
    assert text_of([((), {"value": text})]) == f'value: "{text}"\n'


@given(command=COMMANDS)
@settings(max_examples=25)
def test_a_shell_hands_over_the_words_that_were_meant(
    tmp_path_factory: pytest.TempPathFactory, command: tuple[str, ...]
) -> None:
    directory = tmp_path_factory.getbasetemp() / "shims"
    if not directory.exists():
        directory.mkdir()
        (directory / "xpk").write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
        (directory / "xpk").chmod(0o755)
    made = plan("xpk", FOR_XPK, command=command)
    script = render_xpk(made)
    done = subprocess.run(
        ["bash", "-c", script, "script", "create", "--further", "a b"],
        env={"PATH": f"{directory}:/usr/bin:/bin", "LANG": "C.UTF-8"},
        capture_output=True,
        timeout=20,
        check=True,
    )
    assert done.stderr == b""
    *words, end = done.stdout.decode().split("\0")
    assert end == ""
    assert ["xpk", *words] == [*words_of(script, "xpk workload create"), "--further", "a b"]


def _is_run_name(text: str) -> bool:
    return bool(text) and not text.startswith("/") and ".." not in text.split("/")


@given(
    run_name=TEXT.filter(_is_run_name),
    path=TEXT,
    period=st.integers(0, 10**9),
    keep=st.none() | st.integers(1, 100),
    seconds=st.floats(0.001, 10**6),
    spread=st.booleans(),
    compression=st.sampled_from(["none", "zstd"]),
)
def test_a_program_reads_the_flags_that_the_configuration_has(
    run_name: str, path: str, period: int, keep: int | None, seconds: float, spread: bool, compression: str
) -> None:
    given_flags = config(
        run_name=run_name,
        checkpoint_agent_token_file=path.replace("://", ":/"),
        local_checkpoint_period=period + 1,
        max_num_checkpoints_to_keep=keep,
        checkpoint_drain_timeout_seconds=seconds,
        local_checkpoint_spread=spread,
        checkpoint_storage_compression=compression,
    )
    _, *words = program_words(given_flags, ("train.py",), "own")
    read = load_config(["train.py", *words], {})
    assert read.flags() == given_flags.flags()

    adapted = ("python3", "-m", "emergency_ckpt.maxtext", "-m", "maxtext.train")
    env, variable, *words = program_words(given_flags, adapted, "maxtext")
    assert (env, *words[: len(adapted)]) == ("env", *adapted)
    ours = shlex.split(variable.removeprefix(f"{MAXTEXT_WORDS_VARIABLE}="))
    assert not {word.partition("=")[0] for word in words[len(adapted) :]} - MAXTEXT_FLAGS
    assert load_config(["train.py", *ours, *words[len(adapted) :]], {}).flags() == given_flags.flags()
    # The manager is made of these and of what MaxText hands on.
    assert {word.partition("=")[0] for word in ours} == {*given_flags.sources} - MAXTEXT_HANDS_ON


def test_flags_at_their_defaults_in_the_packaged_file_are_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "own.yml"
    file.write_text("base_config: base.yml\nlocal_checkpoint_max_to_keep: 1\nrun_name: r1\n")
    read = load_config([str(file), "checkpoint_period=10000"], {})
    words = program_words(read, ("train.py",), "own")
    # What somebody wrote is said, also where it is the default; of the packaged file, what differs from that.
    assert words == (
        "train.py",
        "run_name=r1",
        "enable_checkpointing=True",
        "checkpoint_period=10000",
        "local_checkpoint_max_to_keep=1",
    )
    assert len(words) < len(FLAGS)


@given(text=st.text(max_size=40))
def test_a_comment_stays_one(text: str) -> None:
    try:
        lines = comment(text).split("\n")
    except ValueError:
        assert not text.isprintable()
        return
    assert all(line == "#" or line.startswith("# ") for line in lines)


def test_a_template_that_names_what_is_not_there_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="no attribute 'project'"):
        render("xpk_workload_list.sh.j2", values={"cluster": "c"})


def test_maxtext_gets_no_flag_that_it_does_not_know() -> None:
    assert {*read_file(MAXTEXT_BASE)} & {*FLAGS} == MAXTEXT_FLAGS
    given_flags = config(local_checkpoint_copies=2)
    with pytest.raises(ConfigError, match="MaxText's command line refuses local_checkpoint_copies"):
        program_words(given_flags, ("train.py",), "maxtext")
    multi_tier = config(
        enable_multi_tier_checkpointing=True, multi_tier_checkpointing_backup_interval_minutes=30
    )
    program_words(multi_tier, ("train.py",), "maxtext")
    with pytest.raises(ConfigError, match="keep the backup interval"):
        program_words(multi_tier, ("python3", "-m", "emergency_ckpt.maxtext", "-m", "maxtext.train"), "maxtext")
