"""What cannot be launched is refused before anything starts, with the option to change in the message."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.cli.launch import JobSpec, KillSpec
from emergency_ckpt.cli.launcher.spec import parse_exit_codes
from emergency_ckpt.errors import ConfigError


def spec(**changes: Any) -> JobSpec:
    return JobSpec(**{"command": (sys.executable,), "slices": 2, "processes_per_slice": 2, **changes})


@given(
    target=st.sampled_from(["slice", "process"]),
    indices=st.sets(st.integers(0, 1000), min_size=1),
    step=st.integers(0, 10**9),
)
def test_a_kill_reads_back_from_its_own_text(target: Any, indices: set[int], step: int) -> None:
    kill = KillSpec(target, tuple(sorted(indices)), step)
    assert KillSpec.parse(str(kill)) == kill


@pytest.mark.parametrize(
    "text", ["", "slice=1", "slice@step=3", "host=1@step=3", "slice=-1@step=3", "slice=1@step="]
)
def test_a_kill_that_is_not_understood_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="slice=1@step=30"):
        KillSpec.parse(text)


def test_exit_codes_are_numbers_and_signals_and_pauses_grow_up_to_the_longest() -> None:
    assert parse_exit_codes("42, 143,SIGKILL") == {42, 143, 137}
    for text in ("", "0", "256", "SIGNOTHING", "-1", "42;43"):
        with pytest.raises(ConfigError, match="as in 42,143,SIGKILL"):
            parse_exit_codes(text)
    grown = spec(restarts=9, restart_delay_seconds=2, backoff=3, max_restart_delay_seconds=60)
    assert [grown.restart_delay(lives) for lives in (1, 2, 3, 4, 5, 10**6)] == [2, 6, 18, 54, 60, 60]
    assert spec(restart_delay_seconds=3600).restart_delay(1) == 3600


def test_a_slice_is_killed_with_all_its_processes() -> None:
    assert KillSpec.parse("slice=0,2@step=5").processes(processes_per_slice=2) == (0, 1, 4, 5)
    assert KillSpec.parse("process=3,1@step=5").processes(processes_per_slice=2) == (1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slices": 0}, "--slices is 0; it must be at least 1"),
        ({"processes_per_slice": -1}, "--processes-per-slice is -1"),
        ({"devices_per_process": 0}, "--devices-per-process is 0"),
        ({"restarts": -1}, "--restarts is -1; it cannot be negative"),
        ({"restart_delay_seconds": -1}, "--restart-delay is -1"),
        ({"grace_seconds": -1}, "--grace is -1"),
        ({"time_limit_seconds": 0}, "--time-limit is 0"),
        ({"kills": (KillSpec("slice", (2,), 1),)}, "names slice 2, but the job has 2, numbered from 0"),
        ({"kills": (KillSpec("process", (4,), 1),)}, "names process 4, but the job has 4"),
        ({"wipe_ramdisk": True}, "--wipe-ramdisk wipes the directories of killed processes"),
        ({"backoff": 0.5}, "--backoff is 0.5"),
        ({"max_restart_delay_seconds": 0}, "--max-restart-delay is 0"),
        ({"restart_on": frozenset({42})}, "add --restarts N"),
        ({"command": ()}, "give it after --"),
        ({"command": ("no-such-program",)}, "'no-such-program' is not an executable"),
    ],
)
def test_a_job_that_cannot_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(**changes)


def test_placeholders_are_replaced_for_each_process_and_other_braces_stay() -> None:
    command = (sys.executable, "dir={ramdisk}/x", "{process}-{slice}-{attempt}", '{"a": {}}', "{other}")
    made = spec(command=command).command_of(3, Path("/r/process_3"), 1)
    assert made == [sys.executable, "dir=/r/process_3/x", "3-1-1", '{"a": {}}', "{other}"]


def test_what_replaces_a_placeholder_is_not_looked_at_again() -> None:
    made = spec(command=(sys.executable, "{ramdisk}")).command_of(0, Path("/r/{process}"), 0)
    assert made[1] == "/r/{process}"
