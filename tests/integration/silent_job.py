"""A job of two processes in which one is silent at a start, a restore, a save; run in each of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import jax

from emergency_ckpt import CheckpointManager
from emergency_ckpt.errors import EmergencyCheckpointError
from emergency_ckpt.jaxio import coordination
from tests.integration.training_job import check_state, make_config, make_mesh, make_state

LATE = 1
FLAGS = {
    "local_checkpoint_period": 1,
    "checkpoint_period": 1_000_000,
    "checkpoint_coordination_timeout_seconds": 4,
    "checkpoint_drain_timeout_seconds": 5,
    "local_checkpoint_slot_wait_seconds": 60,
    "enable_autocheckpoint": True,
}


def fall_silent(root: str) -> dict[str, Any]:
    """One process comes late to several calls, and waits in vain alone; then both train until told."""
    mesh = make_mesh(2)
    process = jax.process_index()
    # A channel of the test's own, outside the managers' numbering.
    channel = coordination.JaxCoordinator(coordination._service_client(), process, 2)
    told: dict[str, str] = {}

    def come_late(what: str, call: Callable[[], Any]) -> None:
        """The late process comes when the other one has given up."""
        if process == LATE:
            channel.get(f"test/{what}", timedelta(seconds=60))
        told[what] = error_of(call)
        if process != LATE:
            channel.put(f"test/{what}", b"")

    def start() -> CheckpointManager:
        return CheckpointManager.from_config(make_config(root, FLAGS), mesh, make_state(mesh, 0))

    come_late("start", start)
    manager = start()
    assert manager.restore_or_init(lambda: None).step is None
    for step in (1, 2, 3):
        manager.save(step, make_state(mesh, step))
    manager.wait_until_finished()
    manager.check_for_errors()
    come_late("first restore", lambda: manager.restore(3))
    come_late("reload", manager.reload)
    check_state(manager.restore(3)["state"], mesh, 3)

    pipeline = manager._engine._workers.pipeline
    if process == LATE:
        pipeline.wait = lambda timeout, interrupted=None: False  # As if its saves had no end.
    for what, call in (("vain reload", manager.reload), ("vain restore", lambda: manager.restore(3))):
        told[what] = error_of(call)
    if process == LATE:
        del pipeline.wait
    manager.reload()
    check_state(manager.restore(None)["state"], mesh, 3)
    return {"told": told, **train_until_told(manager, mesh)}


def train_until_told(manager: CheckpointManager, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    step = 3
    while not manager.reached_preemption(step):
        step += 1
        manager.save(step, make_state(mesh, step))
        print(f"step {step} complete {manager.latest_complete_step()}", flush=True)
    errors = error_of(manager.wait_until_finished)
    result = {
        "left_at": step,
        "complete": manager.latest_complete_step(),
        "errors": errors,
        "counters": manager.metrics_snapshot(),
    }
    manager.close()
    return result


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except EmergencyCheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return ""
