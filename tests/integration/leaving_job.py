"""A job that is told to leave while it compiles, evaluates, or waits for a peer, and asks about no step.

It says what it is doing, line by line, so that a test can send its notice in the middle of it.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from emergency_ckpt import CheckpointManager
from tests.integration.training_job import make_config, make_mesh, make_state

FLAGS = {
    "enable_autocheckpoint": True,
    "local_checkpoint_period": 3,
    "checkpoint_period": 20,
    "preemption_grace_seconds": 60,
}
EVALUATION_SECONDS = 1.5
STALL_SECONDS = 1.5
_UNROLLED = 700


def train_and_leave(root: str, steps: int, flags: dict[str, Any]) -> dict[str, Any]:
    """Goes on from what is there until it is told to leave, or for so many steps; tells how it ended.

    What was restored is compared bit for bit with what belongs to that step.
    """
    mesh = make_mesh(2)
    fresh = make_state(mesh, 0)
    with CheckpointManager.from_config(make_config(root, {**FLAGS, **flags}), mesh, fresh) as manager:
        restored = manager.restore_or_init(lambda: fresh)
        start = restored.step or 0
        assert same_bits(restored.state, make_state(mesh, start)), f"not the state of step {start}"
        print(f"restored {start}", flush=True)
        compile_for_long(start)
        reacted: list[int] = []
        for step in range(start + 1, start + steps + 1):
            if step % 10 == 4:
                evaluate()
            if step % 10 == 7:
                wait_for_a_peer()
            state = make_state(mesh, step)
            print(f"saving {step}", flush=True)
            if manager.save(step, state) and manager.reached_preemption(step):
                reacted.append(step)
                print(f"reaction {len(reacted)}", flush=True)
            if step % FLAGS["checkpoint_period"] == 0:
                print("draining", flush=True)
            print(f"step {step} complete {manager.latest_complete_step()}", flush=True)
            if manager.should_exit:
                manager.check_for_errors()
                break
        left_at, leaves = step, manager.should_exit
        drained = manager.metrics_snapshot()["drained_bytes"]
        complete = manager.latest_complete_step()
    return {
        "start": start,
        "left_at": left_at,
        "leaves": leaves,
        "drained": drained,
        "reacted": reacted,
        "complete": complete,
        "heard": [[notice.source, notice.kind] for notice in manager.notices],
        "committed": sorted(int(p.name) for p in manager.directory.iterdir() if p.name.isdigit()),
    }


def compile_for_long(seed: int) -> None:
    """A compilation that takes seconds; another one in each life, so that no cache knows it."""
    constants = np.random.default_rng(seed + time.time_ns()).random(_UNROLLED)

    @jax.jit
    def unrolled(x: jax.Array) -> jax.Array:
        for constant in constants:
            x = jnp.sin(x * constant) + x
        return x

    print("compiling", flush=True)
    unrolled(jnp.ones(4)).block_until_ready()
    print("compiled", flush=True)


def evaluate() -> None:
    """Computes for a while without asking about any step."""
    print("evaluating", flush=True)
    product = jax.jit(lambda x: x @ x / 300)
    x = jnp.ones((300, 300))
    ends = time.monotonic() + EVALUATION_SECONDS
    while time.monotonic() < ends:
        x = product(x).block_until_ready()
    print("evaluated", flush=True)


def wait_for_a_peer() -> None:
    """All enter a collective, the last process late: the others are stuck in it meanwhile."""
    print("in a collective", flush=True)
    if jax.process_index() == jax.process_count() - 1:
        time.sleep(STALL_SECONDS)
    multihost_utils.sync_global_devices(f"a peer is late {time.monotonic() > 0}")
    print("out of the collective", flush=True)


def same_bits(one: Any, other: Any) -> bool:
    """Whether the shards of this process are equal, bit for bit."""

    def shards(tree: Any) -> list[bytes]:
        return [
            np.asarray(shard.data).tobytes()
            for leaf in jax.tree.leaves(tree)
            if isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            for shard in leaf.addressable_shards
        ]

    return shards(one) == shards(other)
