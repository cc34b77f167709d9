"""Agents outlive trainers: drains go on, and the newest step is drained when nobody is left to ask for it.

Real processes that are killed and stopped; what was committed is restored with all ramdisks gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.record import LOG, agent_directory, read_record
from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from emergency_ckpt.persistent.store import PersistentStore
from tests.agent.served import agents_of, start, wait_until_gone
from tests.integration.outliving_job import agent_pid, train_and_stay
from tests.integration.processes import REPOSITORY, Job, run_job
from tests.integration.training_job import train

NO_FLUSH = {"agent_flush_on_trainer_exit": False}
ONLY_FIRST_PERSISTENT = {"checkpoint_period": 1000, "save_checkpoint_on_completion": False}


@pytest.fixture
def root(ramdisk: Path) -> Iterator[Path]:
    """Of a job with up to two processes; its agents end with the test."""
    yield ramdisk
    for process in range(2):
        for agent in agents_of(ramdisk / f"ramdisk_{process}"):
            agent.send_signal(signal.SIGCONT)
            agent.kill()
            wait_until_gone(agent.pid)


def committed(root: Path) -> list[int]:
    return [step.step_id.step for step in PersistentStore(root / "bucket/job/checkpoints").steps()]


def status(root: Path, process: int) -> dict[str, Any]:
    record = read_record(agent_directory(root / f"ramdisk_{process}"))
    assert record is not None
    with PeerClient(record.endpoint, dial=record.dial) as client:
        return client.status()


def log(root: Path, process: int) -> str:
    return (agent_directory(root / f"ramdisk_{process}") / LOG).read_text()


def wait_for(condition: Callable[[], bool], root: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = [log(root, p) for p in range(2) if (root / f"ramdisk_{p}").exists()]
        assert time.monotonic() < deadline, "\n".join(["nothing came of it", *logs])
        time.sleep(0.05)


def alone(call: str) -> list[str]:
    """The words of a command that is a job of one process."""
    return [sys.executable, "-c", f"from tests.integration import outliving_job as job; job.{call}"]


def train_and_kill(
    root: Path, processes: int, until: int, flags: dict[str, Any], stopped: dict[int, int], drains: int = 0
) -> None:
    """Kills all trainers once `until` is complete, and process 0's agent runs so many drains."""
    stopped_at = {str(process): step for process, step in stopped.items()}
    with Job(train_and_stay, processes, str(root), until, flags, stopped_at) as job:
        for process in range(processes):
            job.wait_for_line(process, f"complete {until}")
        if drains:
            wait_for(lambda: status(root, 0)["drains"] == drains, root)
        for process in range(processes):
            job.signal(process, signal.SIGKILL)
        job.wait()


def assert_restored_without_ramdisks(root: Path, processes: int, step: int) -> None:
    for process in range(processes):
        for agent in agents_of(root / f"ramdisk_{process}"):
            agent.kill()
            wait_until_gone(agent.pid)
        remove_tree(root / f"ramdisk_{process}")
    for process, life in enumerate(run_job(train, processes, str(root), processes, step, {})):
        assert (life["start"], life["source"]) == (step, "persistent")
        assert life["extras"] == {"data": {"position": 100 * step + process}}


def test_a_drain_that_runs_when_its_trainers_are_killed_goes_on_to_the_commit(root: Path) -> None:
    """The committing agent stands still while all parts come in and the trainers are killed."""
    with Job(train_and_stay, 2, str(root), 10, NO_FLUSH, {"1": 10}) as job:
        for process in range(2):
            job.wait_for_line(process, "complete 10")
        wait_for(lambda: status(root, 0)["drains"] == 1, root)
        os.kill(agent_pid(root, 0), signal.SIGSTOP)
        os.kill(agent_pid(root, 1), signal.SIGCONT)
        wait_for(lambda: bool(list(root.glob("bucket/job/checkpoints/10*/*parts/1.json"))), root)
        for process in range(2):
            job.signal(process, signal.SIGKILL)
        job.wait()
    assert committed(root) == [1]
    os.kill(agent_pid(root, 0), signal.SIGCONT)
    wait_for(lambda: committed(root) == [1, 10], root)
    assert "flushing" not in log(root, 0) + log(root, 1)
    assert_restored_without_ramdisks(root, 2, 10)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_newest_step_is_drained_when_all_trainers_are_killed(root: Path, processes: int) -> None:
    train_and_kill(root, processes, 6, ONLY_FIRST_PERSISTENT, {})
    wait_for(lambda: committed(root) == [1, 6], root)
    wait_for(lambda: not any(status(root, p)["flushes"] for p in range(processes)), root)
    assert sum("flushing" in log(root, process) for process in range(processes)) == 1
    assert_restored_without_ramdisks(root, processes, 6)


def test_the_container_command_holds_until_the_newest_step_is_drained(root: Path) -> None:
    local = root / "ramdisk_0"
    local.mkdir()
    words = [sys.executable, "-m", "emergency_ckpt.cli.main", "run", "--local-directory", str(local)]
    command = alone(f"train_and_die({str(root)!r}, 6, {ONLY_FIRST_PERSISTENT})")
    done = subprocess.run([*words, "--", *command], timeout=120, cwd=REPOSITORY)
    assert done.returncode == 128 + signal.SIGKILL
    assert committed(root) == [1, 6]
    assert_restored_without_ramdisks(root, 1, 6)


def test_of_a_life_that_was_killed_with_its_agent_before_it_restored_the_step_before_is_drained(
    root: Path,
) -> None:
    """By the agent that is started next, without a trainer."""
    (root / "ramdisk_0").mkdir()
    for call in (
        f"train_and_die({str(root)!r}, 6, {ONLY_FIRST_PERSISTENT | NO_FLUSH})",
        f"start_and_die({str(root)!r}, {ONLY_FIRST_PERSISTENT})",
    ):
        assert subprocess.run(alone(call), timeout=120, cwd=REPOSITORY).returncode == -signal.SIGKILL
        assert committed(root) == [1]
    start(root / "ramdisk_0")
    wait_for(lambda: committed(root) == [1, 6], root)
    assert_restored_without_ramdisks(root, 1, 6)


def test_a_later_life_of_the_run_keeps_the_agents_from_draining(root: Path) -> None:
    store = PersistentStore(root / "bucket/job/checkpoints")
    train_and_kill(root, 2, 6, ONLY_FIRST_PERSISTENT, {0: 6, 1: 6})
    newest = store.newest_generation()
    assert newest is not None
    store.mint_generation(newest.number, None)
    for process in range(2):
        os.kill(agent_pid(root, process), signal.SIGCONT)
    wait_for(lambda: "flush after the end of its trainer: nothing is done" in log(root, 0), root)
    assert committed(root) == [1]
    assert not list(Path(store.files.locate()).glob("*tmp*"))


def test_without_the_committing_agent_another_one_drains_the_step(root: Path) -> None:
    """The drain that was running is never seen; the copies of the other slice are whole."""
    train_and_kill(root, 2, 10, {}, {1: 10}, drains=1)
    os.kill(agent_pid(root, 0), signal.SIGKILL)
    assert committed(root) == [1]
    os.kill(agent_pid(root, 1), signal.SIGCONT)
    wait_for(lambda: committed(root) == [1, 10], root)
    assert_restored_without_ramdisks(root, 2, 10)


@pytest.mark.long
def test_a_drain_whose_parts_never_come_is_taken_over_by_the_agents_that_are_left(root: Path) -> None:
    train_and_kill(root, 2, 10, {}, {1: 10}, drains=1)
    os.kill(agent_pid(root, 1), signal.SIGKILL)
    wait_for(lambda: committed(root) == [1, 10], root)
    wait_for(lambda: status(root, 0)["drains"] == 0, root)
    assert_restored_without_ramdisks(root, 2, 10)


def test_a_manager_that_was_closed_leaves_nothing_to_drain(root: Path) -> None:
    run_job(train, 2, str(root), 2, 6, ONLY_FIRST_PERSISTENT)
    assert committed(root) == [1]
    for process in range(2):
        wait_for(lambda: status(root, process)["trainers"] == 0, root)  # noqa: B023
        assert status(root, process)["flushes"] == status(root, process)["drains"] == 0
        assert "died" not in log(root, process)


def test_an_agent_that_dies_in_the_middle_of_a_drain_is_replaced_by_its_trainer(root: Path) -> None:
    with Job(train_and_stay, 2, str(root), 10, NO_FLUSH, {"1": 10}) as job:
        for process in range(2):
            job.wait_for_line(process, "complete 10")
        wait_for(lambda: status(root, 0)["drains"] == 1, root)
        killed = agent_pid(root, 1)
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: committed(root) == [1, 10], root)
        # By another agent, that the trainer started, or by the trainer itself.
        assert agent_pid(root, 1) != killed or "the trainer does it itself" in "\n".join(job.lines(1))
