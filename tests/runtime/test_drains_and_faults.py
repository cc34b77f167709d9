"""Drains of two processes where single requests or callbacks fail: no step is lost, and no word of its end."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from emergency_ckpt.agent.drain import DrainJob, Runner, Verdict
from emergency_ckpt.agent.draining import Stop
from emergency_ckpt.agent.orders import Share
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import CoordinationTimeoutError, PeerFailedError
from emergency_ckpt.jaxio.coordination import InMemoryCluster, InMemoryCoordinator
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.runtime.board import CoordinatedBoard
from tests.runtime.two_drains import SOON, Two, two_processes

Change = Callable[[DrainJob, InMemoryCluster], DrainJob]


@dataclasses.dataclass
class Fault:
    """Of the request with this number, from 0, for keys that end so: instead of it, or of its answer."""

    ending: str
    error: Exception
    number: int = 0
    is_done: bool = False


class Faulty(InMemoryCoordinator):
    def __init__(self, cluster: InMemoryCluster, process: int, fault: Fault) -> None:
        super().__init__(cluster, process, 2)
        self._fault = fault

    def _meet(self, key: str, *, is_done: bool) -> None:
        fault = self._fault
        if key.endswith(fault.ending) and is_done == fault.is_done:
            fault.number -= 1
            if fault.number == -1:
                raise fault.error

    def put_once(self, key: str, value: bytes) -> bytes:
        self._meet(key, is_done=False)
        stands = super().put_once(key, value)
        self._meet(key, is_done=True)
        return stands

    def get(self, key: str, timeout: timedelta) -> bytes:
        self._meet(key, is_done=False)
        return super().get(key, timeout)

    def try_get(self, key: str) -> bytes | None:
        self._meet(key, is_done=False)
        return super().try_get(key)

    def entries(self, prefix: str) -> dict[str, bytes]:
        self._meet(prefix, is_done=False)
        return super().entries(prefix)


def over(fault: Fault) -> Change:
    return lambda job, cluster: dataclasses.replace(
        job, board=CoordinatedBoard(Faulty(cluster, job.process, fault))
    )


def assert_all_went_well(two: Two) -> None:
    assert two.committed == [1]
    for process in two.processes:
        assert process.worker.take_errors() == []
        assert process.worker.newest_committed == StepId(1, 1)
        assert not process.worker.busy


@pytest.mark.parametrize("is_done", [False, True])
def test_a_call_that_fails_in_whatever_way_loses_no_step_and_stands_if_it_was_heard(
    is_done: bool, ramdisk: Path, tmp_path: Path
) -> None:
    unsaid = over(Fault("/call", ValueError("no answer"), is_done=is_done))
    with two_processes(ramdisk, tmp_path, {0: unsaid}) as two:
        two.save_and_drain(1)
        two.wait()
        (error,) = two.processes[0].worker.take_errors()
        assert "cannot be found out: ValueError: no answer" in str(error)
        assert_all_went_well(two)


@dataclasses.dataclass
class Beside:
    """Carries out shares once the gate is open; one that `opens` it does so while it waits for others."""

    runner: Runner
    gate: threading.Event
    opens: bool

    def run(self, share: Share, slot: SealedSlot, stop: Stop) -> int:
        def ask() -> str | None:
            try:
                return stop()
            finally:
                self.gate.set()

        if not self.opens:
            assert self.gate.wait(SOON.total_seconds())
        return self.runner.run(share, slot, ask)


@pytest.mark.parametrize("ending", ["/verdict", "/left"])
@pytest.mark.parametrize("number", [0, 1])
def test_an_attempt_outlives_a_request_that_is_lost(
    ending: str, number: int, ramdisk: Path, tmp_path: Path
) -> None:
    gate = threading.Event()

    def unlucky(job: DrainJob, cluster: InMemoryCluster) -> DrainJob:
        lost = over(Fault(ending, PeerFailedError("lost"), number))(job, cluster)
        return dataclasses.replace(lost, runner=Beside(job.runner, gate, opens=True))

    def late(job: DrainJob, _: InMemoryCluster) -> DrainJob:
        return dataclasses.replace(job, runner=Beside(job.runner, gate, opens=False))

    with two_processes(ramdisk, tmp_path, {0: unlucky, 1: late}) as two:
        two.save_and_drain(1)
        two.wait()
        assert_all_went_well(two)


class LateBoard(CoordinatedBoard):
    """Its first wait is over in the moment in which the verdict comes, and the committer goes on."""

    is_late = True

    def wait(self, attempt: Attempt, timeout: timedelta) -> Verdict:
        if self.is_late:
            self.is_late = False
            self.await_call(attempt.generation.number, attempt.ordinal + 1, timeout)
            raise CoordinationTimeoutError("nobody has said so")
        return super().wait(attempt, timeout)


def test_a_verdict_that_comes_when_it_is_no_longer_waited_for_is_believed(
    ramdisk: Path, tmp_path: Path
) -> None:
    def late(job: DrainJob, cluster: InMemoryCluster) -> DrainJob:
        return dataclasses.replace(job, board=LateBoard(cluster.coordinator(1)))

    with two_processes(ramdisk, tmp_path, {1: late}) as two:
        first, second = two.processes
        two.save_and_drain(1)
        assert first.worker.wait(SOON)
        two.save_and_drain(2)
        two.wait()
        assert two.committed == [1, 2]
        assert second.worker.take_errors() == []
        assert second.counted("drains_failed") == 0


def test_a_commit_stands_whatever_follows_it(ramdisk: Path, tmp_path: Path) -> None:
    def no_retention() -> None:
        raise ValueError("no such step")

    def ill_followed(job: DrainJob, _: InMemoryCluster) -> DrainJob:
        return dataclasses.replace(job, on_commit=no_retention, after_commit=lambda: sys.exit(3))

    with two_processes(ramdisk, tmp_path, {0: ill_followed, 1: ill_followed}) as two:
        for number in (1, 2):
            two.save_and_drain(number)
            two.wait()
        assert two.committed == [1, 2]
        for process in two.processes:
            assert process.worker.newest_committed == StepId(1, 2)
            assert process.counted("drains_failed") == 0
            assert "callback after it failed: SystemExit: 3" in str(process.worker.take_errors()[-1])


def test_a_step_that_is_deleted_does_not_count_as_committed(ramdisk: Path, tmp_path: Path) -> None:
    with two_processes(ramdisk, tmp_path) as two:
        two.save_and_drain(1)
        two.wait()
        with two.quiet():
            two.delete(1)
        assert [process.worker.newest_committed for process in two.processes] == [None, None]


def test_who_hears_last_that_a_step_is_complete_may_do_so_after_the_end_of_all_drains(
    ramdisk: Path, tmp_path: Path
) -> None:
    with two_processes(ramdisk, tmp_path) as two:
        first, second = two.processes
        for process in two.processes:
            process.save(1)
        first.drain(1)
        assert not second.worker.wait_for(1, timedelta(0))  # So that it listens at once.
        assert first.worker.wait(SOON)
        first.worker.close()
        assert not second.worker.wait_for(2, timedelta(seconds=1))  # It hears that there is none.
        second.drain(1)
        assert_all_went_well(two)


def test_a_last_word_that_fails_in_whatever_way_ends_no_close(ramdisk: Path, tmp_path: Path) -> None:
    mute = over(Fault("/call", ValueError("no answer")))
    with two_processes(ramdisk, tmp_path, {1: mute}) as two:
        two.processes[1].worker.close()


def test_who_closes_without_having_been_told_of_a_step_is_not_waited_for(ramdisk: Path, tmp_path: Path) -> None:
    deaf = over(Fault("/call", PeerFailedError("lost")))
    with two_processes(ramdisk, tmp_path, {1: deaf}) as two:
        first, second = two.processes
        for process in two.processes:
            process.save(1)
        second.drain(1)
        assert second.worker.wait(SOON)
        assert "lost" in str(second.worker.take_errors()[0])
        second.worker.close()
        first.drain(1)
        assert first.worker.wait(SOON)
        (error,) = first.worker.take_errors()
        assert "processes [1] have closed their managers" in str(error)
        assert not first.worker.busy


def test_a_store_that_is_not_mounted_for_a_while_gets_the_step_afterwards(
    ramdisk: Path, tmp_path: Path
) -> None:
    with two_processes(ramdisk, tmp_path) as two:
        aside = two.bucket.rename(two.bucket.with_name("aside"))
        two.bucket.mkdir()
        two.fail(1)
        assert "not mounted" in str(two.processes[0].worker.take_errors()[0])
        shutil.rmtree(two.bucket)
        aside.rename(two.bucket)
        two.wait()
        assert two.committed == [1]
