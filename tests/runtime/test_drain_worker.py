"""Drains of two processes whose store fails: tried again together, held together, not waited for in vain.

Real slots, a real persistent directory and the coordination of a job within one process; the store is away
while a file lies where its directory is.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from emergency_ckpt.agent.drain import DrainJob, InProcess
from emergency_ckpt.agent.drain_worker import DrainWorker
from emergency_ckpt.agent.draining import destination_of
from emergency_ckpt.core.checksums import copy_and_checksum, shard_seed
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.retrying import Pauses
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.jaxio.coordination import InMemoryCluster
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.store import LocalStore, StoreOptions
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.runtime.board import CoordinatedBoard
from emergency_ckpt.telemetry.log import CheckpointLogger, LogContext
from emergency_ckpt.telemetry.metrics import Metrics

RUN = "0f6a1c1e-2b7b-4a53-9d07-5a8f6b1f2c3d"
SOON = timedelta(seconds=30)  # Less than any pause.
PAUSES = Pauses(6000.0)


def make_layout() -> Layout:
    boxes = [Box((0,), (8,)), Box((8,), (16,))]
    shards = [Shard("w", box) for box in boxes]
    return Layout.build([LeafSpec("w", (16,), "float32")], {0: [shards[0]], 1: [shards[1]]}, (0, 0))


@dataclasses.dataclass
class Process:
    """One process of the job."""

    index: int
    layout: Layout
    local: LocalStore
    metrics: Metrics
    worker: DrainWorker

    def save(self, number: int) -> StepId:
        """Seals a step, which all others do as well."""
        step = StepId(1, number)
        slot, reason = self.local.begin(step, timedelta(0))
        assert slot is not None, reason
        slot.wait_ready()
        checksums = [
            copy_and_checksum(
                np.full(e.nbytes, number, np.uint8),
                slot.data[e.offset : e.offset + e.nbytes],
                shard_seed(1, self.layout, e.shard),
            )
            for e in self.layout.slot_entries(self.index)
        ]
        nonce = self.worker._job.generation.nonce
        self.local.seal(slot, Manifest(RUN, nonce, step, self.layout.hash, self.index, 2, tuple(checksums)))
        self.local.settle(step, Outcome.COMPLETE)
        return step

    def save_and_drain(self, number: int) -> None:
        step = self.save(number)
        slot = self.local.pin(step)
        assert slot is not None
        self.worker.drain(step, slot.index)

    def counted(self, name: str) -> float:
        return self.metrics.snapshot()[name]


@dataclasses.dataclass
class Two:
    """Both processes, and their store."""

    processes: tuple[Process, Process]
    bucket: Path

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        aside = self.bucket.with_name("aside")
        self.bucket.rename(aside)
        self.bucket.touch()
        try:
            yield
        finally:
            self.bucket.unlink()
            aside.rename(self.bucket)

    def save_and_drain(self, number: int) -> None:
        for process in self.processes:
            process.save_and_drain(number)

    def fail(self, number: int) -> None:
        """A step of which the first try fails, on both."""
        self.save_and_drain(number)
        for process in self.processes:
            assert process.worker.wait_for(1, SOON)
            assert process.worker.retries

    @property
    def committed(self) -> list[int]:
        return [held.step_id.step for held in PersistentStore(self.bucket).steps()]


@pytest.fixture
def two(ramdisk: Path, tmp_path: Path) -> Iterator[Two]:
    bucket = tmp_path / "bucket"
    layout, cluster = make_layout(), InMemoryCluster(2)
    generation = PersistentStore(bucket).mint_generation(0, None)
    processes: list[Process] = []
    for index in range(2):
        (ramdisk / str(index)).mkdir()
        metrics, store = Metrics(), PersistentStore(bucket)
        local = LocalStore(StoreOptions(ramdisk / str(index), 1, 3, 2), RUN, layout, index, lambda _: None)
        destination = destination_of(store, RUN, generation, "default", WriteOptions(), 20.0)
        job = DrainJob(
            local=local,
            runner=InProcess(store, destination),
            generation=generation,
            item="default",
            process=index,
            committer=0,
            timeout=timedelta(seconds=20),
            board=CoordinatedBoard(cluster.coordinator(index)),
            log=CheckpointLogger(LogContext(RUN, 1, index, 0), metrics),
            on_commit=lambda: None,
            abandon=store.abandon,
            pauses=PAUSES,
        )
        processes.append(Process(index, layout, local, metrics, DrainWorker(job)))
    yield Two((processes[0], processes[1]), bucket)
    for process in processes:
        process.worker.close()
        process.local.close()


def test_a_step_that_failed_is_committed_when_the_store_is_back_and_told_once(two: Two) -> None:
    with two.outage():
        two.fail(1)
        for process in two.processes:
            (error,) = process.worker.take_errors()
            assert "It is tried again" in str(error)
    for process in two.processes:
        assert process.worker.wait(SOON)
        assert process.worker.take_errors() == []
        assert (process.counted("drains_failed"), process.counted("drains_committed")) == (1, 1)
        assert process.counted("last_committed_step") == 1
    assert two.committed == [1]


def test_who_waits_alone_urges_the_committer_whose_pause_is_longer(two: Two) -> None:
    with two.outage():
        two.fail(1)
    assert two.processes[1].worker.wait(SOON)
    assert two.committed == [1]


def test_whoever_waits_in_an_outage_gets_one_try_and_no_more(two: Two) -> None:
    first, second = two.processes
    with two.outage():
        two.fail(1)
        for ended, waiting in enumerate((first, second, first), 2):
            assert waiting.worker.wait(SOON)
            for process in two.processes:
                assert process.worker.wait_for(ended, SOON)
                assert process.counted("drains_failed") == ended
    assert two.committed == []


def test_no_try_begins_while_drains_are_held_and_the_next_one_does_afterwards(two: Two) -> None:
    first, second = two.processes
    with two.outage():
        two.fail(1)
        assert (attempts := first.worker.hold(SOON)) == 2
        assert second.worker.wait_for(attempts, SOON)
    assert not second.worker.wait(timedelta(seconds=1)), "although it is urged"
    assert "step 1 (generation 1) waits for its next try, after 2 that failed" in second.worker.describe()
    assert first.counted("drains_failed") == second.counted("drains_failed") == 2
    first.worker.release()
    assert second.worker.wait(SOON)
    assert two.committed == [1]


def test_a_step_that_is_given_up_is_not_tried_again(two: Two) -> None:
    with two.outage():
        two.fail(1)
        for process in two.processes:
            process.worker.give_up("it is deleted", 1)
            assert not process.worker.busy
    for process in two.processes:
        assert process.worker.wait(SOON)
        assert process.counted("drains_superseded") == 1
        assert process.local.pin(StepId(1, 1)) is not None
    assert two.committed == []


def test_the_end_of_the_committer_ends_the_waiting_of_the_others(two: Two) -> None:
    first, second = two.processes
    with two.outage():
        two.fail(1)
        first.worker.close()
        assert second.worker.wait(SOON)
        assert not second.worker.busy


def test_a_step_that_is_complete_when_the_manager_has_ended_is_left_to_the_agents_and_no_error(
    two: Two,
) -> None:
    process = two.processes[0]
    process.worker.close()
    process.save_and_drain(5)
    assert process.worker.take_errors() == []
    assert not process.worker.busy


def test_a_step_whose_slot_was_needed_on_one_process_gives_way_to_a_newer_one_on_both(two: Two) -> None:
    first, second = two.processes
    with two.outage():
        two.fail(1)
        for process in two.processes:
            process.save(2)
        assert second.worker.make_room(), "it waits for its next try, and has a slot all the same"
        for number in (3, 4):
            second.save(number)  # Over step 1.
        for number in (3, 4):
            first.save(number)
        for process in two.processes:
            process.worker.take_errors()
    assert second.local.sealed(StepId(1, 1)) is None
    assert first.local.sealed(StepId(1, 1)) is not None
    assert first.worker.wait(SOON)
    assert second.worker.wait(SOON)
    assert two.committed == [4]
    assert [*first.worker.take_errors(), *second.worker.take_errors()] == []


def test_a_slot_that_is_lost_on_one_process_ends_the_tries_at_once_and_the_next_step_is_drained(
    two: Two,
) -> None:
    first, second = two.processes
    with two.outage():
        two.fail(1)
        assert second.worker.make_room()
        second.local.delete(1)
    assert first.worker.wait(SOON)
    assert second.worker.wait(SOON)
    assert not first.worker.busy
    assert "is not on this ramdisk any more" in str(second.worker.take_errors()[-1])
    two.save_and_drain(2)
    assert first.worker.wait(SOON)
    assert two.committed == [2]
