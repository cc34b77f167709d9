"""SIGTERM at the worst moments: the job leaves at one step, which is durable, and goes on from that one."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from emergency_ckpt.agent.record import agent_directory, read_record
from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from emergency_ckpt.cli.main import main
from tests.integration.leaving_job import train_and_leave
from tests.integration.processes import Job
from tests.integration.test_outliving import wait_for

MOMENTS = ("compiling", "in a collective", "draining", "evaluating", "saving")
OF_EACH_RUN = MOMENTS[1:3]
STEPS = 10_000


def leave(
    ramdisk: Path,
    start: int,
    processes: int,
    victim: int,
    moment: str,
    delay: float,
    again: float | None = None,
) -> int:
    """One life after step `start`, in which `victim` gets SIGTERM, and once more so many seconds later.

    Returns the step at which all left.
    """
    with Job(train_and_leave, processes, str(ramdisk), STEPS, {}) as running:
        running.wait_for_line(victim, moment)
        time.sleep(delay)
        said = [line.split()[-1] for p in range(processes) for line in running.lines(p) if " complete " in line]
        running.signal(victim, signal.SIGTERM)
        print(f"met at: {running.lines(victim)[-1]:.80}")
        if again is not None:
            time.sleep(again)
            running.signal(victim, signal.SIGTERM)
        assert running.wait() == [0] * processes, running.describe()
        results = [running.result(process) for process in range(processes)]
        told = running.describe()
    newest = max((int(step) for step in said if step != "None"), default=0)
    first = results[0]
    assert all(result["leaves"] for result in results), told
    assert {(result["start"], result["left_at"]) for result in results} == {(start, first["left_at"])}
    assert first["left_at"] >= max(newest, start + 1)
    assert first["left_at"] in first["committed"], "it is durable before the job leaves"
    return first["left_at"]


def assert_goes_on_from(ramdisk: Path, step: int, processes: int) -> None:
    """The job starts once more, and has the state of that step, bit for bit."""
    with Job(train_and_leave, processes, str(ramdisk), 2, {}) as running:
        assert running.wait() == [0] * processes, running.describe()
        assert [running.result(process)["start"] for process in range(processes)] == [step] * processes


def test_the_job_comes_back_from_the_step_of_the_notice_wherever_that_meets_it(ramdisk: Path) -> None:
    left_at = 0
    for number, moment in enumerate(OF_EACH_RUN):
        again = 0.0 if number % 2 else None
        left_at = leave(ramdisk, left_at, 2, number % 2, moment, 0.3 * (number % 3), again)
    assert_goes_on_from(ramdisk, left_at, 2)


@pytest.mark.long
def test_a_wish_for_a_save_is_met_each_time_and_a_notice_after_it_still_counts(ramdisk: Path) -> None:
    notice = ramdisk / "notice"
    flags: dict[str, Any] = {
        "on_process": {"1": {"preemption_notice_file": str(notice)}},
        "autocheckpoint_skip_if_replicated": True,
        "local_checkpoint_period": 100_000,
        "checkpoint_period": 100_000,
    }
    with Job(train_and_leave, 2, str(ramdisk), STEPS, flags) as running:
        running.wait_for_line(0, "step 2 ")
        for number in range(2):
            assert main(["save-now", str(ramdisk / "ramdisk_1")]) == 0
            running.wait_for_line(0, f"reaction {number + 1}")
        # Of two slices with the same state one goes away: the other one has all of it.
        notice.write_text('{"seconds": 100}')
        assert running.wait() == [0, 0], running.describe()
        results = [running.result(process) for process in range(2)]
        running.wait_for_line(0, "autocheckpoint_skip_if_replicated")
    assert results[0]["reacted"] == results[1]["reacted"]
    wishes, last = results[0]["reacted"][:-1], results[0]["reacted"][-1]
    assert len(wishes) == 2
    assert last == results[0]["left_at"] == results[0]["complete"]
    assert set(wishes) < set(results[0]["committed"])
    assert last not in results[0]["committed"], "the ramdisk of the slice that stays is enough"
    assert results[0]["heard"] == []
    assert results[1]["heard"] == [["request", "save"], ["request", "save"], ["file", "terminate"]]

    # Where it is to be in the persistent tier, too, the host that stays writes all of it.
    notice.unlink()
    with Job(
        train_and_leave, 2, str(ramdisk), STEPS, {**flags, "autocheckpoint_skip_if_replicated": False}
    ) as running:
        running.wait_for_line(0, "compiled")
        notice.write_text('{"seconds": 100}')
        assert running.wait() == [0, 0], running.describe()
        results = [running.result(process) for process in range(2)]
    assert results[0]["start"] == last
    assert results[0]["left_at"] in results[0]["committed"]
    assert results[0]["drained"] > 0 == results[1]["drained"]


@pytest.mark.long
def test_where_the_time_is_over_the_job_leaves_and_the_agent_goes_on(ramdisk: Path) -> None:
    flags = {"preemption_grace_seconds": 4}
    with Job(train_and_leave, 1, str(ramdisk), STEPS, flags, devices_per_process=2) as running:
        running.wait_for_line(0, "step 5 ")
        record = read_record(agent_directory(ramdisk / "ramdisk_0"))
        assert record is not None
        os.kill(record.pid, signal.SIGSTOP)  # The store takes for ever, as far as the trainer can see.
        try:
            running.signal(0, signal.SIGTERM)
            assert running.wait() == [0], running.describe()
            result = running.result(0)
            running.wait_for_line(0, "the time is over")
        finally:
            os.kill(record.pid, signal.SIGCONT)
    assert result["leaves"]
    assert result["left_at"] not in result["committed"]
    wait_for(lambda: (ramdisk / f"bucket/job/checkpoints/{result['left_at']}").is_dir(), ramdisk)
    with Job(train_and_leave, 1, str(ramdisk), 2, {}, devices_per_process=2) as running:
        assert running.wait() == [0], running.describe()
        assert running.result(0)["start"] == result["left_at"]


@pytest.mark.long
def test_where_the_notified_host_dies_too_early_the_step_before_is_what_is_drained(ramdisk: Path) -> None:
    notice = ramdisk / "notice"
    flags: dict[str, Any] = {
        "on_process": {"1": {"preemption_notice_file": str(notice)}},
        "local_checkpoint_period": 2,
        "checkpoint_period": 100_000,
    }
    with Job(train_and_leave, 2, str(ramdisk), STEPS, flags, heartbeat_seconds=10) as running:
        running.wait_for_line(1, "in a collective")  # The others wait for this process.
        notice.write_text('{"seconds": 100}')
        running.wait_for_line(1, "notice from file")
        said = [line.split()[-1] for p in range(2) for line in running.lines(p) if " complete " in line]
        running.kill(1)
        assert running.wait()[1] == -signal.SIGKILL, "nobody waits without a limit"
    newest = max(int(step) for step in said if step != "None")

    def is_drained() -> bool:
        steps = (ramdisk / "bucket/job/checkpoints").iterdir()
        return any(int(path.name) >= newest for path in steps if path.name.isdigit())

    wait_for(is_drained, ramdisk)
    remove_tree(ramdisk / "ramdisk_1")
    with Job(train_and_leave, 2, str(ramdisk), 2, {}) as running:
        assert running.wait() == [0, 0], running.describe()
        assert running.result(0)["start"] >= newest


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_fifty_signals_at_random_moments(ramdisk: Path) -> None:
    """Each moment ten times: at once or some time later, with one signal, two at once, or a late second one."""
    chance = random.Random()
    kinds = [(moment, again) for moment in MOMENTS for again in (None, None, 0.0, 0.0, 1.5)] * 2
    chance.shuffle(kinds)
    left_at = 0
    for number, (moment, again) in enumerate(kinds):
        victim, delay = chance.randrange(4), chance.choice((0.0, chance.random() * 2))
        print(f"{number}: {moment} of process {victim}, after {delay:.3f} s, again after {again}", flush=True)
        left_at = leave(ramdisk, left_at, 4, victim, moment, delay, again)
    assert_goes_on_from(ramdisk, left_at, 4)
