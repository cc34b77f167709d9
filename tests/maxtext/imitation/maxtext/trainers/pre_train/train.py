"""An imitation of MaxText's train program: manager, restore, train loop; it ends with 0 whatever stopped it.

python -m maxtext.trainers.pre_train.train key=value…
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt.jaxio.launch import initialize_from_launcher, report_step
from maxtext.common import checkpointing


class TrainState(flax.struct.PyTreeNode):
    step: Any
    params: Any
    opt_state: Any


def main(words: list[str]) -> None:
    flags = dict(word.split("=", 1) for word in words)
    initialize_from_launcher()
    mesh = Mesh(np.array(jax.devices()).reshape(2, -1), ("data", "fsdp"))
    make = jax.jit(new_state, out_shardings=shardings(mesh))
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(new_state),
        shardings(mesh),
    )
    period = int(flags["checkpoint_period"])
    if flags.get("enable_multi_tier_checkpointing") == "True":
        checkpointing.create_orbax_emergency_replicator_checkpoint_manager(
            flags["local_checkpoint_directory"], int(flags["local_checkpoint_period"]), mesh
        )
    manager = checkpointing.create_orbax_emergency_checkpoint_manager(
        flags["local_checkpoint_directory"],
        f"{flags['base_output_directory']}/{flags['run_name']}/checkpoints/",
        mesh,
        abstract,
        int(flags["local_checkpoint_period"]),
        period,
        None,
    )
    state = checkpointing.load_state_if_possible(manager, abstract) or make()
    train_step = jax.jit(next_state, donate_argnums=0)
    try:
        for step in np.arange(int(state.step), int(flags["steps"])):
            state = train_step(state)
            time.sleep(float(flags.get("step_seconds", 0)))
            checkpointing.maybe_save_checkpoint(manager, state, period, step)
            report_step(int(step))
            if step == int(flags.get("terminate_at", -1)) and jax.process_index() == jax.process_count() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        checkpointing.maybe_save_checkpoint(manager, state, period)
        manager.wait_until_finished()
    except checkpointing.StopTraining as error:
        print(f"training stopped: {error}", flush=True)
    print(f"sum {float(jnp.sum(state.params['w'])):.6f}", flush=True)


def new_state() -> TrainState:
    weights = jnp.arange(64.0).reshape(16, 4) / 7
    return TrainState(jnp.int32(0), {"w": weights}, {"mu": jnp.zeros_like(weights)})


def next_state(state: TrainState) -> TrainState:
    weights = state.params["w"] * 1.01 + state.step / 100
    return TrainState(state.step + 1, {"w": weights}, {"mu": state.opt_state["mu"] * 0.9 + weights})


def shardings(mesh: Mesh) -> TrainState:
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("fsdp"))
    return TrainState(whole, {"w": cut}, {"mu": cut})


if __name__ == "__main__":
    main(sys.argv[1:])
