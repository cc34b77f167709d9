"""The helper that starts jobs for tests: results come back, failures and leftovers do not stay hidden."""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

import jax
import psutil
import pytest

from tests.agent.served import wait_until_gone
from tests.integration.processes import Job, run_job

LIMIT = timedelta(seconds=60)


def describe_place(greeting):
    return [greeting, jax.process_index(), jax.process_count(), jax.device_count(), os.environ.get("EXTRA", "")]


def describe_chances():
    return [hash("text"), random.random(), uuid.uuid4().hex, os.getpid()]


def fail_in_one(directory: str):
    said = Path(directory) / "said"
    if jax.process_index() == 1:
        while not said.exists():
            time.sleep(0.01)
        time.sleep(1)  # What the other one says has a second to get through.
        raise RuntimeError("no luck")
    print("waits for ever", flush=True)
    said.touch()
    signal.pause()


def start_a_child_and_wait():
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    print("child", child.pid, flush=True)
    signal.pause()


@pytest.mark.parametrize("environment", [None, {"EXTRA": "x"}], ids=["forked", "started"])
def test_each_process_returns_its_result(environment: dict[str, str] | None):
    found = run_job(describe_place, 2, "hello", devices_per_process=2, environment=environment)
    extra = environment["EXTRA"] if environment else ""
    assert found == [["hello", 0, 2, 4, extra], ["hello", 1, 2, 4, extra]]


def test_processes_of_one_job_have_hashes_and_chances_of_their_own():
    found = run_job(describe_chances, 2)
    assert all(one != other for one, other in zip(*found, strict=True)), found


def test_a_failure_ends_the_job_and_shows_all_output(tmp_path: Path):
    with pytest.raises(AssertionError, match=r"(?s)waits for ever.*RuntimeError: no luck"):
        run_job(fail_in_one, 2, str(tmp_path))


def test_signals_lines_and_leftovers():
    with Job(start_a_child_and_wait, 2) as job:
        children = [int(job.wait_for_line(p, "child", LIMIT).split()[1]) for p in range(2)]
        job.kill(1, LIMIT)
        assert not job.all_ended
        assert job.failed
        assert all(psutil.pid_exists(child) for child in children)
        processes = [process.pid for process in job.processes]
    for pid in processes:
        assert not psutil.pid_exists(pid)
    for child in children:
        wait_until_gone(child)


def test_a_line_that_never_comes_is_reported_with_the_output():
    expected = r"(?s)process 0 ended without printing 'never'.*return code 0"
    with (
        Job(describe_place, 1, "hello", environment={"EXTRA": ""}) as job,
        pytest.raises(AssertionError, match=expected),
    ):
        job.wait_for_line(0, "never", LIMIT)
