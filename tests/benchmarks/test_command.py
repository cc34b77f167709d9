"""The benchmark command runs to its end and measures everything, for both managers. No figure is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.facts import REPOSITORY
from benchmarks.plan import Plan
from benchmarks.targets import LENGTHENING, ORBAX, OURS, TARGETS

BOTH = {
    "first_open_seconds",
    "first_save_sealed_seconds",
    "save_blocked_seconds",
    "save_sealed_seconds",
    "save_complete_seconds",
    "idle_call_seconds",
    "restore_seconds",
    "restart_seconds",
    LENGTHENING,
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


SMALL = ("--size-mib", "2", "--repeats", "1", "--loop-steps", "1", "--memory-saves", "20")


@pytest.mark.long
@pytest.mark.slow
def test_the_sections_that_are_asked_for_are_measured(tmp_path: Path):
    written = tmp_path / "figures.json"
    done = run(*SMALL, "--only", "save,plan", "--plan-processes", "4,8", "--json", str(written))
    assert done.returncode == 0, done.stderr
    figures = json.loads(written.read_text())
    for contender in (OURS, ORBAX):
        measured = figures["summary"][contender].keys()
        assert measured >= {name for name in BOTH if "save" in name}
        assert "restore_seconds" not in measured
    assert {each["processes"] for each in figures["plans"]} == {4, 8}


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_small_run_measures_everything_for_both_managers(tmp_path: Path):
    written = tmp_path / "figures.json"
    done = run(*SMALL, "--plan-processes", "4,8", "--json", str(written))
    assert done.returncode == 0, done.stderr
    figures = json.loads(written.read_text())
    for contender in (OURS, ORBAX):
        assert figures["summary"][contender].keys() >= BOTH
        assert figures["samples_of_the_job"][contender]["loop_incomplete_saves"] == [0.0]
    assert len(figures["samples_by_process"]) == 2
    assert figures["samples_of_the_job"][OURS]["memory_saves"] == [2.0, 10.0, 20.0]
    assert [each["target"] for each in figures["targets"]] == [target.title for target in TARGETS]
    ours = figures["samples_of_the_job"][OURS]
    assert ours["intact_fetched_bytes"] == ours["slice_lost_fetched_beside_bytes"] == [0]
    assert ours["slice_lost_fetched_bytes"] == [figures["state_bytes_per_process"]]
    assert {each["streams"] for each in figures["fetches"]} == {1, 2, 4, 8}
    assert {each["processes"] for each in figures["plans"]} == {4, 8}
    # Two loops of one step may take equally long, of which there is no ratio.
    unknown = [each["target"] for each in figures["targets"] if each["reached"] is None]
    assert [title for title in unknown if not title.startswith("train loop")] == []
    assert figures["environment"]["packages"]["orbax-checkpoint"]
    assert f"again: {figures['command']}" in done.stdout


def test_an_unknown_section_is_refused_by_name():
    done = run("--only", "save,speed")
    assert done.returncode == 2
    assert "speed" in done.stderr


def test_a_size_that_does_not_fit_is_refused_before_anything_starts():
    done = run("--size-mib", str(2**30))
    assert done.returncode == 1
    assert "choose a smaller size" in done.stderr


def test_a_plan_comes_through_the_command_line_of_the_processes():
    plan = Plan(16, 3, ("save", "restore"), 5, 100, "/dev/shm/somewhere")
    assert Plan.from_json(plan.to_json()) == plan
