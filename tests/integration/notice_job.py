"""A job that trains until it is told to leave, for tests that send it notices."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from emergency_ckpt import CheckpointManager
from tests.integration.training_job import make_config, make_mesh, make_state

GRACE_SECONDS = 45.0


def train_until_told(
    root: str, taken_by: int | None = None, changed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Trains, once the file `go` is there, until all processes leave at one step; tells what happened.

    The process `taken_by` has a Python handler of SIGTERM, installed after JAX's; then all compile until `go`
    is there. `changed`: flags.
    """
    mesh = make_mesh(2)
    fresh = make_state(mesh, 0)
    called: list[int] = []
    if taken_by == jax.process_index():
        signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    flags = {
        "enable_autocheckpoint": True,
        "local_checkpoint_period": 1000,
        "preemption_grace_seconds": GRACE_SECONDS,
        **(changed or {}),
    }
    with CheckpointManager.from_config(make_config(root, flags), mesh, fresh) as manager:
        start = manager.restore_or_init(lambda: fresh).step or 0
        print(f"restored {start}", flush=True)
        while not Path(root, "go").exists():
            if taken_by is None:
                time.sleep(0.02)
            else:
                compile_something()
        for step in range(start + 1, start + 100_000):
            manager.save(step, make_state(mesh, step))
            print(f"step {step}", flush=True)
            if manager.reached_preemption(step):
                manager.wait_until_finished()
                manager._steps.look()
                return {
                    "began_after": start,
                    "left_at": step,
                    "steps": list(manager.all_steps()),
                    "heard": [[notice.source, notice.kind, notice.detail] for notice in manager.notices],
                    "of_job": [
                        [heard.process, heard.notice.source, heard.notice.kind, seconds_left(heard.notice)]
                        for heard in manager._steps.notices
                    ],
                    "called": called,
                }
    raise AssertionError("no notice was ever agreed on")


def seconds_left(notice: Any) -> float | None:
    return None if notice.deadline is None else round(notice.deadline - notice.received, 3)


def compile_something() -> None:
    """For about a second, anew each time."""

    def compute(x: jax.Array) -> jax.Array:
        for number in range(30):
            x = jnp.sin(x @ x.T) @ jnp.cos(x) + jnp.tanh(x * number)
        return x

    jax.jit(compute).lower(jnp.ones((16, 16))).compile()
