"""`emergency-ckpt flags` prints what was loaded, in a form that loads to the same again."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_ckpt.cli.flags import effective_lines
from emergency_ckpt.cli.main import main
from emergency_ckpt.config import FLAGS, load_config

MAXTEXT_BASE = Path(__file__).parents[1] / "config" / "data" / "maxtext_base.yml"


@pytest.fixture(autouse=True)
def _no_overrides_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOBSET_NAME", raising=False)


def printed(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["flags", *words]) == 0
    return out.getvalue()


def test_every_flag_is_printed_with_its_value_and_its_source() -> None:
    lines = printed("checkpoint_period=7", "run_name=r").splitlines()
    assert [line.partition(":")[0] for line in lines] == list(FLAGS)
    assert lines[FLAGS.index("checkpoint_period")].split() == [
        "checkpoint_period:",
        "7",
        "#",
        "command",
        "line",
    ]
    assert lines[FLAGS.index("mtc_data_parallelism")].split("#")[1].rpartition(":")[0].endswith("base.yml")


# Text of any sort, as a name or a path may hold it.
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


@settings(max_examples=25)
@given(
    text=TEXTS,
    axis=st.one_of(st.integers(0, 5), TEXTS.filter(bool)),
    period=st.integers(1, 10**9),
    keep=st.none() | st.integers(1, 9),
    seconds=st.floats(1e-9, 1e9),
    choice=st.sampled_from(["none", "zstd"]),
)
def test_what_is_printed_loads_to_the_same_configuration(
    text: str, axis: int | str, period: int, keep: int | None, seconds: float, choice: str
) -> None:
    config = load_config([], {}).replace(
        load_full_state_path=text,
        checkpoint_replica_axis=axis,
        checkpoint_period=period,
        max_num_checkpoints_to_keep=keep,
        checkpoint_drain_timeout_seconds=seconds,
        checkpoint_storage_compression=choice,
    )
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "printed.yml"
        file.write_text("\n".join(effective_lines(config)), encoding="utf-8")
        assert load_config([str(file)], {}).flags() == config.flags()


def test_flags_without_effect_and_advice_follow_as_comments() -> None:
    shown = printed("enable_checkpoint_cloud_logger=True")
    assert "\n# Note: enable_checkpoint_cloud_logger=True (command line) does nothing yet" in shown


def test_keys_of_other_programs_are_listed_on_request_by_name_only() -> None:
    assert "keys of other programs are kept aside; --other lists them." in printed(str(MAXTEXT_BASE))
    lines = printed("--other", str(MAXTEXT_BASE), "hf_access_token=secret").splitlines()
    assert len(lines) > 650
    assert any(line.startswith(f"steps  # {MAXTEXT_BASE}:") for line in lines)
    assert "hf_access_token  # command line" in lines


def test_the_documentation_explains_every_flag() -> None:
    blocks = printed("--doc").strip().split("\n\n")
    assert [block.partition(":")[0] for block in blocks] == list(FLAGS)
    assert all("Takes " in block for block in blocks)


def test_the_page_of_the_documentation_is_the_one_that_the_schema_gives() -> None:
    page = printed("--page")
    assert (Path(__file__).parents[2] / "docs" / "flags.md").read_text() == page, "run `make docs`"
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert rows == list(dict.fromkeys(rows))
    assert set(rows) == set(FLAGS)
