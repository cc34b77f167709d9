"""A host goes away, or a process hangs, and no trainer reacts: agents see to the newest step of a real job."""

from __future__ import annotations

from pathlib import Path

from tests.integration.outliving_job import train_and_hang, train_and_stay
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


def test_the_newest_step_is_persistent_in_time_though_all_trainers_hang_and_one_agent_was_told(
    root: Path,
) -> None:
    """The host that goes away writes nothing of what the other one has, too."""
    notice = root / "leaving"
    flags = {
        **ONLY_FIRST_PERSISTENT,
        "enable_autocheckpoint": True,
        "on_process": {"1": {"preemption_notice_file": str(notice)}},
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
    assert "is not written by process 1" in flushing[0]
    assert "draining step 6" in log(root, 0)
    assert "draining step 6" not in log(root, 1)
    assert_restored_without_ramdisks(root, 2, 6)


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
