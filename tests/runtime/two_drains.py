"""The drain workers of two processes in one: real slots, a real persistent directory, coordination in memory.

The store is away while a file lies where its directory is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import numpy as np

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
    nonce: str
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
        self.local.seal(
            slot, Manifest(RUN, self.nonce, step, self.layout.hash, self.index, 2, tuple(checksums))
        )
        self.local.settle(step, Outcome.COMPLETE)
        return step

    def save_and_drain(self, number: int) -> None:
        self.save(number)
        self.drain(number)

    def drain(self, number: int) -> None:
        """Tells the worker of a step that is complete."""
        step = StepId(1, number)
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
    cluster: InMemoryCluster

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

    def wait(self) -> None:
        for process in self.processes:
            assert process.worker.wait(SOON)

    def delete(self, number: int) -> None:
        """A step, on all tiers, while the drains are held."""
        shutil.rmtree(self.bucket / str(number))
        for process in self.processes:
            process.worker.give_up("it is deleted", number)
            process.local.delete(number)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """What all processes do together while none of them drains."""
        first, second = self.processes
        attempts = first.worker.hold(SOON)
        assert attempts is not None
        assert second.worker.wait_for(attempts, SOON)
        yield
        for process in self.processes:
            process.worker.release()

    def fail(self, number: int) -> None:
        """A step of which the first try fails, on both."""
        self.save_and_drain(number)
        for process in self.processes:
            assert process.worker.wait_for(1, SOON)
            assert process.worker.retries

    @property
    def committed(self) -> list[int]:
        return [held.step_id.step for held in PersistentStore(self.bucket).steps()]


@contextlib.contextmanager
def two_processes(
    ramdisk: Path,
    tmp_path: Path,
    changes: Mapping[int, Callable[[DrainJob, InMemoryCluster], DrainJob]] = {},
) -> Iterator[Two]:
    """`changes` give the workers of processes something else to work on than is usual."""
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
        worker = DrainWorker(changes[index](job, cluster) if index in changes else job)
        processes.append(Process(index, layout, local, metrics, generation.nonce, worker))
    try:
        yield Two((processes[0], processes[1]), bucket, cluster)
    finally:
        for process in processes:
            process.worker.close()
            process.local.close()
