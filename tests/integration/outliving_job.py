"""A job whose trainers are killed: it trains to a step, says so, and stays until somebody ends it."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from emergency_ckpt import CheckpointManager
from emergency_ckpt.agent.record import agent_directory, read_record
from tests.integration.training_job import make_config, make_mesh, make_state


def train_and_stay(root: str, until: int, flags: dict[str, Any], stopped_at: dict[str, int]) -> None:
    """Trains from the newest step to `until`, with synchronous waits between steps but for the last one.

    `stopped_at`: by process, the step before which its agent is stopped with SIGSTOP.
    """
    mesh, process = make_mesh(jax.process_count()), jax.process_index()
    manager = CheckpointManager.from_config(make_config(root, flags), mesh, make_state(mesh, 0))
    start = manager.restore_or_init(lambda: make_state(mesh, 0)).step or 0
    for step in range(start + 1, until + 1):
        if stopped_at.get(str(process)) == step:
            manager.wait_until_finished()
            os.kill(agent_pid(Path(root), process), signal.SIGSTOP)
        multihost_utils.sync_global_devices(f"step {step}")
        manager.save(step, make_state(mesh, step), extras={"data": {"position": 100 * step + process}})
        if not stopped_at:
            manager.wait_until_finished()
            manager.check_for_errors()
    while manager.latest_complete_step() != until:
        time.sleep(0.01)
    wait_until_registered(manager)
    print(f"complete {until}", flush=True)
    while True:
        time.sleep(1)


def train_and_hang(root: str, until: int, flags: dict[str, Any]) -> None:
    """Trains until the last process hangs before it asks about `until`, and all others in a collective."""
    mesh, process = make_mesh(jax.process_count()), jax.process_index()
    manager = CheckpointManager.from_config(make_config(root, flags), mesh, make_state(mesh, 0))
    manager.restore_or_init(lambda: make_state(mesh, 0))
    for step in range(1, until + 1):
        multihost_utils.sync_global_devices(f"step {step}")
        if step == until and process == jax.process_count() - 1:
            wait_until_registered(manager)
            print("hangs", flush=True)
            while True:
                time.sleep(1)
        manager.save(step, make_state(mesh, step), extras={"data": {"position": 100 * step + process}})
        if step < until:
            manager.wait_until_finished()
    multihost_utils.sync_global_devices("never")


def train_and_die(root: str, until: int, flags: dict[str, Any]) -> None:
    """Trains to `until`, alone, and is killed."""
    mesh = make_mesh(1)
    manager = CheckpointManager.from_config(make_config(root, flags), mesh, make_state(mesh, 0))
    for step in range(1, until + 1):
        manager.save(step, make_state(mesh, step), extras={"data": {"position": 100 * step}})
        manager.wait_until_finished()
    wait_until_registered(manager)
    os.kill(os.getpid(), signal.SIGKILL)


def start_and_die(root: str, flags: dict[str, Any]) -> None:
    """Makes a manager, alone, and is killed before anything is restored, and its agent with it."""
    mesh = make_mesh(1)
    manager = CheckpointManager.from_config(make_config(root, flags), mesh, make_state(mesh, 0))
    wait_until_registered(manager)
    os.kill(agent_pid(Path(root), 0), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_until_registered(manager: CheckpointManager) -> None:
    """Until the agent knows what this process works on."""
    telling = manager._engine.job.peers._telling
    assert telling is not None
    assert telling.wait(timedelta(seconds=60))


def agent_pid(root: Path, process: int) -> int:
    """The process of the agent of a process of the job."""
    record = read_record(agent_directory(root / f"ramdisk_{process}"))
    assert record is not None
    return record.pid
