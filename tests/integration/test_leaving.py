"""SIGTERM at the worst moments: the job leaves at one step, which is durable, and goes on from that one."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.integration.leaving_job import train_and_leave
from tests.integration.processes import Job

MOMENTS = ("compiling", "evaluating", "in a collective", "saving", "step")
STEPS = 10_000


def leave(
    ramdisk: Path, start: int, processes: int, victim: int, moment: str, delay: float, times: int = 1
) -> int:
    """One life after step `start`, in which `victim` gets SIGTERM; returns the step at which all left."""
    with Job(train_and_leave, processes, str(ramdisk), STEPS, {}) as running:
        running.wait_for_line(victim, moment)
        time.sleep(delay)
        said = [line.split()[-1] for p in range(processes) for line in running.lines(p) if " complete " in line]
        for _ in range(times):
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


def test_the_job_comes_back_from_the_step_of_the_notice_wherever_that_meets_it(ramdisk: Path) -> None:
    left_at = 0
    for number, moment in enumerate(MOMENTS):
        left_at = leave(ramdisk, left_at, 2, number % 2, moment, 0.3 * (number % 3), times=1 + number % 2)
    with Job(train_and_leave, 2, str(ramdisk), 2, {}) as running:
        assert running.wait() == [0, 0], running.describe()
        assert [running.result(process)["start"] for process in range(2)] == [left_at] * 2


@pytest.mark.long
def test_fifty_signals_at_random_moments(ramdisk: Path) -> None:
    chance = random.Random()
    left_at = 0
    for number in range(50):
        victim, moment, delay = chance.randrange(4), chance.choice(MOMENTS), chance.random() * 2
        print(f"{number}: {moment} of process {victim}, after {delay:.3f} s")
        left_at = leave(ramdisk, left_at, 4, victim, moment, delay, times=chance.choice((1, 1, 2)))
