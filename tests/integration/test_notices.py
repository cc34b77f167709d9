"""Notices that reach one of several processes: all leave at one step, which is durable."""

from __future__ import annotations

import signal
from pathlib import Path

from emergency_ckpt.cli.main import main
from tests.integration.notice_job import train_until_told
from tests.integration.processes import Job
from tests.integration.training_job import train_until_preempted


def test_a_notice_to_one_process_makes_all_leave_at_one_durable_step(ramdisk: Path) -> None:
    with Job(train_until_preempted, 2, str(ramdisk)) as running:
        running.wait_for_line(1, "step 5")
        running.signal(1, signal.SIGTERM)
        assert running.wait() == [0, 0], running.describe()
        results = [running.result(process) for process in range(2)]
    step = results[0]["left_at"]
    assert results[1]["left_at"] == step
    assert all(result["steps"][-1] == step for result in results)
    assert (ramdisk / f"bucket/job/checkpoints/{step}/default").is_dir()

    # The next life is told by a person, on the host of process 1, before any step was asked about, as in a
    # first compilation.
    with Job(train_until_told, 2, str(ramdisk)) as running:
        for process in range(2):
            assert running.wait_for_line(process, "restored").endswith(str(step))
        assert main(["save-now", str(ramdisk / "ramdisk_1"), "--detail", "maintenance at noon"]) == 0
        running.wait_for_line(1, "notice from request")
        (ramdisk / "go").touch()
        assert running.wait() == [0, 0], running.describe()
        results = [running.result(process) for process in range(2)]
    left_at = results[0]["left_at"]
    assert left_at > step
    assert all(result["left_at"] == result["steps"][-1] == left_at for result in results)
    assert [result["heard"] for result in results] == [[], [["request", "save", "maintenance at noon"]]]
