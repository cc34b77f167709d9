"""Backups of local steps: by a clock, after a restart, after a store failed, beside steps of the period."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jax.sharding import Mesh

from emergency_ckpt import CheckpointManager, Config
from emergency_ckpt.errors import LocalDirectoryError, PersistentStoreError
from emergency_ckpt.runtime.settings import settings_from_config
from tests.integration.training_job import check_state, make_state
from tests.manager.states import settle

MINUTES = "multi_tier_checkpointing_backup_interval_minutes"
STEPS = "multi_tier_checkpointing_backup_interval_steps"


class Job:
    """Lives of one run, each with a manager, and the time that is told to it, in minutes."""

    def __init__(self, mesh: Mesh, local: Path, root: Path) -> None:
        self.mesh, self.local, self.root = mesh, local, root
        self.now = 0.0
        self.manager: CheckpointManager | None = None

    def start(self, **flags: Any) -> int:
        """Begins a life, which goes on from the newest step; returns that."""
        self.end()
        self.now = 0.0  # Another clock.
        config = Config(
            run_name="job",
            base_output_directory=str(self.root),
            enable_checkpointing=True,
            enable_emergency_checkpoint=True,
            local_checkpoint_directory=str(self.local),
            local_checkpoint_period=1,
            checkpoint_agent="off",
            **flags,
        )
        settings = dataclasses.replace(settings_from_config(config), clock=lambda: 60 * self.now)
        manager = CheckpointManager.__new__(CheckpointManager)
        manager._start(settings, self.mesh, make_state(self.mesh, 0))
        self.manager = manager
        restored = self.manager.restore_or_init(lambda: make_state(self.mesh, 0))
        check_state(restored.state, self.mesh, restored.step or 0)
        return restored.step or 0

    def save(self, step: int, now: float | None = None) -> None:
        assert self.manager is not None
        self.now = self.now if now is None else now
        assert self.manager.save(step, make_state(self.mesh, step))
        self.manager.wait_until_finished()
        settle(self.manager)

    @property
    def committed(self) -> list[int]:
        assert self.manager is not None
        return [held.step_id.step for held in self.manager._engine.job.persistent.steps()]

    def end(self) -> None:
        if self.manager is not None:
            self.manager.close()
            self.manager = None


@pytest.fixture
def job(mesh: Mesh, ramdisk: Path, tmp_path: Path) -> Iterator[Job]:
    job = Job(mesh, ramdisk, tmp_path)
    yield job
    job.end()


def test_by_minutes_the_first_step_after_each_interval_is_backed_up_and_time_goes_on_over_a_restart(
    job: Job, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {MINUTES: 30, "checkpoint_period": 0}
    assert job.start(**flags) == 0
    with caplog.at_level(logging.INFO, logger="absl"):
        job.save(1, now=0)  # There is none yet.
    assert "every 30 minutes, and there is no backup yet" in caplog.text
    job.save(2, now=29)
    job.save(3, now=31)
    job.save(4, now=60)
    job.save(5, now=61)
    assert job.committed == [1, 3, 5]
    assert job.start(**flags) == 5
    job.save(6, now=0)  # What counts is how long ago step 5 was committed.
    job.save(7, now=29)
    assert job.committed == [1, 3, 5]
    job.end()
    later = time.time() + 29 * 60
    monkeypatch.setattr(time, "time", lambda: later)
    assert job.start(**flags) == 7
    job.save(8, now=0)
    job.save(9, now=2)
    assert job.committed == [1, 3, 5, 9]


def test_a_store_that_failed_gets_the_next_step_and_a_step_of_the_period_is_a_backup_too(job: Job) -> None:
    flags = {STEPS: 4, "checkpoint_period": 6, "checkpoint_drain_retry_seconds": 6000}
    assert job.start(**flags) == 0
    job.save(1)  # The first step is one of the period.
    job.save(3)
    away, checkpoints = job.root / "away", job.root / "job/checkpoints"
    checkpoints.rename(away)
    checkpoints.touch()
    with pytest.raises(PersistentStoreError, match="did not reach the persistent tier"):
        job.save(4)
    checkpoints.unlink()  # What is tried meanwhile finds no record of a life, and writes nothing.
    away.rename(checkpoints)
    job.save(5)
    assert job.committed == [1, 5], "in the place of step 4, which waits for its next try"
    for step in (6, 7, 8, 9):
        job.save(step)
    assert job.committed == [1, 5, 6, 8]
    assert job.manager is not None
    state = job.manager.restore(6)["state"]
    check_state(state, job.mesh, 6)
    for step in (7, 8, 9):  # Step 8 of before is void.
        job.save(step)
    assert job.committed == [1, 5, 6, 8]


def test_the_replicator_of_gke_in_the_local_directory_stops_the_start(job: Job) -> None:
    os.symlink("/repl/0", job.local / "job-s5-n0-w0.restore")
    with pytest.raises(LocalDirectoryError, match="in use by GKE's checkpoint replicator"):
        job.start(**{STEPS: 4})


def test_with_backups_alone_nothing_else_becomes_persistent(job: Job) -> None:
    assert job.start(**{STEPS: 2, "checkpoint_period": 0, "local_checkpoint_max_to_keep": 2}) == 0
    for step in range(1, 8):
        job.save(step)
    assert job.committed == [2, 4, 6]
