"""Processes that drain stay in step: whatever one misses, hears late or cannot say, they count alike."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from emergency_ckpt.agent.drain import DrainJob, Runner, Verdict
from emergency_ckpt.agent.drain_errors import DrainErrors
from emergency_ckpt.agent.draining import Stop
from emergency_ckpt.agent.orders import Share
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.retrying import Pauses, StoreReason
from emergency_ckpt.errors import (
    PeerFailedError,
    PersistentStoreError,
    StoreThrottledError,
    StoreUnreachableError,
)
from emergency_ckpt.jaxio.coordination import InMemoryCluster, InMemoryCoordinator
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.records import Generation
from emergency_ckpt.runtime.board import CoordinatedBoard
from emergency_ckpt.telemetry.log import CheckpointLogger, LogContext
from emergency_ckpt.telemetry.metrics import Metrics
from tests.runtime.two_drains import SOON, Two, two_processes


@pytest.fixture
def two(ramdisk: Path, tmp_path: Path) -> Iterator[Two]:
    with two_processes(ramdisk, tmp_path) as both:
        yield both


def drain_before_its_turn(two: Two) -> None:
    """Step 4 is drained in the place of step 1, whose slot was needed; nobody was told to drain it."""
    with two.outage():
        two.fail(1)
        for process in two.processes:
            process.save(2)
            assert process.worker.make_room()
        for number in (3, 4):
            for process in two.processes:
                process.save(number)
    two.wait()
    assert two.committed == [4]


def test_a_step_that_was_drained_before_its_turn_is_drained_anew_where_it_is_deleted_and_saved_again(
    two: Two,
) -> None:
    drain_before_its_turn(two)
    with two.quiet():
        two.delete(4)
    two.save_and_drain(4)
    two.wait()
    assert two.committed == [4]
    for process in two.processes:
        assert process.worker.take_errors()[1:] == []
        assert process.worker.wait_for(3, SOON)
        assert not process.worker.busy


def test_who_is_told_of_a_step_late_takes_part_before_that_and_does_not_wait_for_it_afterwards(
    two: Two,
) -> None:
    first, second = two.processes
    for process in two.processes:
        process.save(1)
    first.drain(1)
    assert first.worker.wait(SOON)
    assert two.committed == [1]
    second.drain(1)
    assert second.worker.wait(SOON)
    assert not second.worker.busy
    with two.quiet():
        two.bucket.joinpath("1").rename(two.bucket.with_name("gone"))
    for process in two.processes:
        process.drain(1)  # They have found together that it is not there.
    two.wait()
    assert two.committed == [1]


def test_who_closes_with_a_step_that_waits_is_not_waited_for(two: Two) -> None:
    first, second = two.processes
    with two.outage():
        two.fail(1)
        assert second.worker.wait(SOON)
        assert first.worker.wait_for(2, SOON)
        second.worker.close()
        first.worker.take_errors()
    assert first.worker.wait(SOON)
    (error,) = first.worker.take_errors()
    assert "processes [1] have closed their managers" in str(error)
    assert not first.worker.busy, "no other try has more to hope for"


class Unsteady(InMemoryCoordinator):
    """A channel of process 0 that fails once to write, and once to read, a key with such a part."""

    def __init__(self, cluster: InMemoryCluster, written: str = "-", read: str = "-") -> None:
        super().__init__(cluster, 0, 2)
        self._written = [written]
        self._read = [read]

    def put_once(self, key: str, value: bytes) -> bytes:
        if self._written and self._written[0] in key:
            raise PeerFailedError(f"{self._written.pop()} is lost")
        return super().put_once(key, value)

    def try_get(self, key: str) -> bytes | None:
        if self._read and self._read[0] in key:
            raise ValueError(f"{self._read.pop()} is no UTF-8")
        return super().try_get(key)


def over(written: str = "-", read: str = "-") -> Callable[[DrainJob, InMemoryCluster], DrainJob]:
    return lambda job, cluster: dataclasses.replace(
        job, board=CoordinatedBoard(Unsteady(cluster, written, read))
    )


@pytest.mark.parametrize("ending", ["/call", "/verdict"])
def test_what_the_committer_cannot_say_at_once_he_says_again(
    ending: str, ramdisk: Path, tmp_path: Path
) -> None:
    with two_processes(ramdisk, tmp_path, {0: over(written=ending)}) as two:
        for number in (1, 2):
            two.save_and_drain(number)
            two.wait()
        assert two.committed == [1, 2]
        for process in two.processes:
            assert process.worker.wait_for(2, SOON)
            assert process.worker.take_errors() == []


def test_what_fails_between_two_attempts_is_told_and_ends_nothing(ramdisk: Path, tmp_path: Path) -> None:
    with two_processes(ramdisk, tmp_path, {0: over(read="/urged")}) as two:
        first, second = two.processes
        with two.outage():
            two.fail(1)
        assert second.worker.wait(SOON)
        assert two.committed == [1]
        error = first.worker.take_errors()[-1]
        assert "cannot be found out: ValueError: /urged is no UTF-8" in str(error)


@dataclasses.dataclass
class Gated:
    """Carries out no share before it is let go on."""

    runner: Runner
    gate: threading.Event = dataclasses.field(default_factory=threading.Event)

    def run(self, share: Share, slot: SealedSlot, stop: Stop) -> int:
        assert self.gate.wait(SOON.total_seconds())
        return self.runner.run(share, slot, stop)


class Watched(CoordinatedBoard):
    """Opens a gate when somebody has waited for a verdict in vain."""

    gate = threading.Event()

    def wait(self, attempt: Attempt, timeout: timedelta) -> Verdict:
        try:
            return super().wait(attempt, timeout)
        finally:
            self.gate.set()


def test_a_committer_who_is_slow_is_believed_all_the_same(ramdisk: Path, tmp_path: Path) -> None:
    gate = threading.Event()

    def slow(job: DrainJob, _: InMemoryCluster) -> DrainJob:
        return dataclasses.replace(job, runner=Gated(job.runner, gate))

    def impatient(job: DrainJob, cluster: InMemoryCluster) -> DrainJob:
        board = Watched(cluster.coordinator(1))
        board.gate = gate
        short = timedelta(seconds=0.1)
        return dataclasses.replace(job, board=board, timeout=short, margin=short)

    with two_processes(ramdisk, tmp_path, {0: slow, 1: impatient}) as two:
        two.save_and_drain(1)
        two.wait()
        assert two.committed == [1]
        second = two.processes[1]
        assert not second.worker.busy
        assert second.worker.take_errors() == []
        assert second.worker.newest_committed == StepId(1, 1)


def test_what_failed_attempts_left_is_removed_whatever_else_fails_after_a_commit(
    ramdisk: Path, tmp_path: Path
) -> None:
    failures: list[Exception] = [PersistentStoreError("retention"), PersistentStoreError("abandon")]
    abandoned: list[Attempt] = []

    def on_commit() -> None:
        if len(failures) == 2:
            raise failures.pop(0)

    def abandon(attempt: Attempt) -> None:
        if failures:
            raise failures.pop()
        abandoned.append(attempt)

    def unsteady(job: DrainJob, _: InMemoryCluster) -> DrainJob:
        return dataclasses.replace(job, on_commit=on_commit, abandon=abandon, pauses=Pauses(0.0))

    with two_processes(ramdisk, tmp_path, {0: unsteady}) as two:
        first, _ = two.processes
        with two.outage():
            two.save_and_drain(1)
            assert first.worker.wait_for(70, SOON)
        for number in (2, 3, 4):
            two.save_and_drain(number)
            two.wait()
        two.wait()
        assert two.committed[-1] == 4
        failed = int(first.counted("drains_failed") + first.counted("drains_superseded"))
        assert failed >= 70
        assert sorted(attempt.ordinal for attempt in abandoned) == list(range(failed))


def test_what_failed_attempts_left_is_removed_where_no_commit_follows(ramdisk: Path, tmp_path: Path) -> None:
    abandoned: list[Attempt] = []

    def noting(job: DrainJob, _: InMemoryCluster) -> DrainJob:
        return dataclasses.replace(job, abandon=abandoned.append)

    with two_processes(ramdisk, tmp_path, {0: noting}) as two:
        _, second = two.processes
        with two.outage():
            two.fail(1)
            assert second.worker.make_room()
            second.local.delete(1)
        two.wait()  # The slot is lost: no further try.
        assert [attempt.ordinal for attempt in abandoned] == [0]


def test_of_attempts_that_another_process_ended_nothing_is_kept_either() -> None:
    cluster = InMemoryCluster(2)
    boards = [CoordinatedBoard(cluster.coordinator(index)) for index in range(2)]
    kept: list[int] = []
    for number in range(0, 40, 2):
        failed, committed = (Attempt(Generation(1, "aa"), 1, "default", number + more) for more in (0, 1))
        for attempt in (failed, committed):
            boards[0].call(1, attempt.ordinal, attempt.step_id)
            boards[1].urge(1, attempt.ordinal)
        boards[1].announce(failed, Verdict("failed", "its slot was needed", repeats=True))
        assert boards[0].peek(failed) is not None
        boards[0].announce(committed, Verdict("committed"))
        kept.append(cluster.key_count())
    assert set(kept) == {6}, "call, urge and verdict of the last two"


def test_a_step_whose_failures_have_two_causes_in_turn_is_told_of_each_once() -> None:
    errors = DrainErrors(CheckpointLogger(LogContext("run", 1, 0, 0), Metrics()))
    causes: tuple[StoreReason, ...] = ("throttled", "unreachable")

    def fail(step: int) -> None:
        for cause in causes * 3:
            said = Verdict("failed", "no", cause, repeats=True)
            errors.failed(StepId(1, step), said, PersistentStoreError("no"), asked=False)

    fail(1)
    assert [type(error) for error in errors.take()] == [StoreThrottledError, StoreUnreachableError]
    fail(2)
    assert len(errors.take()) == 2
