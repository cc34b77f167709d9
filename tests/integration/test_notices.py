"""Notices that reach one of several processes: all know of them, and leave at one step, which is durable."""

from __future__ import annotations

import signal
from pathlib import Path

from emergency_ckpt.cli.main import main
from tests.integration.notice_job import GRACE_SECONDS, train_until_told
from tests.integration.processes import Job


def test_a_notice_to_one_process_makes_all_leave_at_one_durable_step(ramdisk: Path) -> None:
    go = ramdisk / "go"
    go.touch()
    with Job(train_until_told, 2, str(ramdisk)) as running:
        running.wait_for_line(1, "step 5")
        running.signal(1, signal.SIGTERM)
        assert running.wait() == [0, 0], running.describe()
        results = [running.result(process) for process in range(2)]
    step = results[0]["left_at"]
    assert results[1]["left_at"] == step
    assert all(result["steps"][-1] == step for result in results)
    assert (ramdisk / f"bucket/job/checkpoints/{step}/default").is_dir()
    # JAX's handler took it, and does not say where.
    assert [result["heard"] for result in results] == [[], []]
    of_jax = [None, "signal", "terminate", GRACE_SECONDS - 1]
    assert [result["of_job"] for result in results] == [[of_jax]] * 2

    # The next life is told by a person, on the host of process 1, before any step was asked about, as in a
    # first compilation.
    go.unlink()
    with Job(train_until_told, 2, str(ramdisk)) as running:
        for process in range(2):
            assert running.wait_for_line(process, "restored").endswith(str(step))
        assert main(["save-now", str(ramdisk / "ramdisk_1"), "--detail", "maintenance at noon"]) == 0
        running.wait_for_line(1, "notice from request")
        running.wait_for_line(0, "process 1 of the job heard from request")
        go.touch()
        assert running.wait() == [0, 0], running.describe()
        results = [running.result(process) for process in range(2)]
    left_at = results[0]["left_at"]
    assert left_at > step
    assert all(result["left_at"] == result["steps"][-1] == left_at for result in results)
    assert [result["heard"] for result in results] == [[], [["request", "save", "maintenance at noon"]]]
    assert [result["of_job"] for result in results] == [[[1, "request", "save", None]]] * 2

    # In the third one the program has a handler of its own, so that JAX hears nothing; and it is compiling.
    go.unlink()
    with Job(train_until_told, 2, str(ramdisk), 1) as running:
        for process in range(2):
            assert running.wait_for_line(process, "restored").endswith(str(left_at))
        running.signal(1, signal.SIGTERM)
        running.wait_for_line(1, "notice from signal: this host goes away")
        running.wait_for_line(0, "process 1 of the job heard from signal")
        go.touch()
        assert running.wait() == [0, 0], running.describe()
        results = [running.result(process) for process in range(2)]
    assert results[0]["left_at"] == results[1]["left_at"] > left_at
    assert [result["heard"] for result in results] == [[], [["signal", "terminate", "SIGTERM"]]]
    assert [result["of_job"] for result in results] == [[[1, "signal", "terminate", GRACE_SECONDS]]] * 2
    assert [result["called"] for result in results] == [[], [signal.SIGTERM]], "the program's own handler, too"
