"""A host goes away, or a process hangs, and no trainer reacts: agents see to the newest step of a real job."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.agent.served import wait_until_gone
from tests.integration.notice_job import train_until_told
from tests.integration.outliving_job import agent_pid, train_and_hang, train_and_stay
from tests.integration.processes import Job
from tests.integration.test_outliving import (
    ONLY_FIRST_PERSISTENT,
    assert_restored_without_ramdisks,
    committed,
    log,
    root,
    wait_for,
)

__all__ = ["root"]  # A fixture.


@pytest.mark.parametrize("told", [[1], [0, 1]], ids=str)
def test_the_newest_step_is_persistent_in_time_though_all_trainers_hang(root: Path, told: list[int]) -> None:
    """Agents that hear at the same time drain once. A host that goes away writes nothing that others have."""
    notice = root / "leaving"
    hears = {"preemption_notice_file": str(notice)}
    flags = {
        **ONLY_FIRST_PERSISTENT,
        "enable_autocheckpoint": True,
        "on_process": {str(process): hears for process in told},
    }
    with Job(train_and_stay, 2, str(root), 6, flags, {}) as job:
        for process in range(2):
            job.wait_for_line(process, "complete 6")
        assert committed(root) == [1]
        notice.write_text('{"seconds": 8}')
        wait_for(lambda: committed(root) == [1, 6], root)
        assert not job.failed
    flushing = [line for p in range(2) for line in log(root, p).splitlines() if "flushing step 6" in line]
    assert len(flushing) == 1
    assert "s are left" in flushing[0]
    if told == [0, 1]:
        assert all("draining step 6" in log(root, process) for process in range(2))
        return
    assert "is not written by process 1" in flushing[0]
    assert "draining step 6" in log(root, 0)
    assert "draining step 6" not in log(root, 1)
    assert_restored_without_ramdisks(root, 2, 6)


@pytest.mark.long
def test_a_job_that_hangs_is_told_who_is_behind_and_ended_with_its_newest_step_persistent(root: Path) -> None:
    flags = {
        **ONLY_FIRST_PERSISTENT,
        "trainer_stall_floor_seconds": 5,
        "trainer_stall_restart_seconds": 2,
    }
    with Job(train_and_hang, 2, str(root), 6, flags) as job:
        job.wait_for_line(1, "hangs")
        assert all(job.wait())
    assert committed(root) == [1, 4]
    assert "behind: process 1, at step 5, while others are at step 6" in log(root, 0) + log(root, 1)
    assert "hangs" in log(root, 0)
    assert "so that the job restarts" in log(root, 0) + log(root, 1)
    assert_restored_without_ramdisks(root, 2, 4)


def test_an_agent_that_gets_sigterm_has_its_job_leave_and_drains_the_step_of_that(root: Path) -> None:
    with Job(train_until_told, 2, str(root), ONLY_FIRST_PERSISTENT) as job:
        (root / "go").touch()
        job.wait_for_line(1, "step 5")
        pid = agent_pid(root, 1)
        os.kill(pid, signal.SIGTERM)
        assert job.wait() == [0, 0], job.describe()
        results = [job.result(process) for process in range(2)]
    wait_until_gone(pid)
    step = results[0]["left_at"]
    assert results[1]["left_at"] == step
    ((source, kind, detail),) = results[1]["heard"]
    assert (source, kind) == ("agent", "terminate")
    assert "got SIGTERM" in detail
    assert committed(root)[-1] == step
    assert f"draining step {step} " in log(root, 1)
    assert "does it itself" not in "\n".join(job.lines(1))
