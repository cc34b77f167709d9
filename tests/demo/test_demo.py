"""The whole demo as a user runs it, small: real processes, a real SIGKILL, and equal ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emergency_ckpt.cli.main import main


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_loses_a_slice_and_comes_to_the_same_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["demo", "--steps", "25", "--slices", "2", "--processes-per-slice", "1", "--kill-step", "8"]
    status = main([*words, "--directory", str(tmp_path / "runs"), "--json", str(tmp_path / "summary.json")])
    shown = capsys.readouterr().out
    assert status == 0, shown
    assert "bit for bit" in shown
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["agrees"]
    reached, restored = summary["step_reached"], summary["step_restored"]
    assert 8 <= reached < 25
    # Within the local period of 5, and one more where the newest save was still on its way.
    assert reached - 10 < restored <= reached
    assert summary["sources"] == ["own slot", "process 0"]
    assert summary["steps_lost"] == reached - restored
    # Step 1 is to be persistent; on a slow machine it may still be on its way.
    assert summary["steps_lost_persistent_only"] in (reached - 1, reached)
    assert summary["final_loss"] < summary["first_loss"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["interrupted", "uninterrupted"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kill-step", "60"], "--kill-step is 60; expected 1 to 59"),
        (["--kill-step", "0"], "--kill-step is 0"),
        (["--steps", "0"], "--steps is 0"),
        (["--processes-per-slice", "0"], "--processes-per-slice is 0"),
        (["--json", "/nowhere/summary.json"], "there is no directory /nowhere"),
    ],
)
def test_impossible_plans_are_refused_before_anything_starts(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *words, "--directory", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_directory_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("precious")
    assert main(["demo", "--directory", str(tmp_path)]) == 2
    assert "is in use" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"
