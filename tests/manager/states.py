"""A state with every kind of leaf, and what the tests of the manager share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt import (
    CheckpointManager,
    CheckpointManagerOptions,
    Config,
    LocalCheckpointOptions,
    PersistentCheckpointOptions,
)


class TrainState(flax.struct.PyTreeNode):
    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    note: str
    rate: float
    host: np.ndarray
    nothing: None = None


def make_state(mesh: Mesh, step: int) -> TrainState:
    """A state with every kind of leaf; different in every leaf at every step."""
    sharded, replicated = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    params = {
        "w": jax.device_put(jnp.arange(32.0).reshape(8, 4) + step, sharded),
        "layers": [jax.device_put(jnp.full((4,), step, dtype), replicated) for dtype in ("bfloat16", "int8")],
    }
    tree = {"w": params["w"], "layers": params["layers"][:1]}
    return TrainState(
        step=jax.device_put(jnp.int32(step), replicated),
        params=params,
        opt_state=jax.tree.map(
            lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, replicated),
            optax.adam(1e-3).init(tree),
        ),
        key=jax.device_put(jax.random.key(step), replicated),
        note=f"step {step}",
        rate=step / 8,
        host=np.arange(3) + step,
    )


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        where = jax.tree_util.keystr(path)
        if isinstance(b, jax.Array):
            assert a.dtype == b.dtype, where
            assert a.sharding == b.sharding, where
            if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), where
        elif isinstance(b, np.ndarray):
            assert isinstance(a, np.ndarray), where
            np.testing.assert_array_equal(a, b)
        else:
            assert type(a) is type(b), where
            assert a == b, where


OPTIONS = CheckpointManagerOptions(
    local=LocalCheckpointOptions(save_interval_steps=2, max_to_keep=1),
    persistent=PersistentCheckpointOptions(save_interval_steps=5, max_to_keep=3),
)

Opener = Callable[..., CheckpointManager]


def save_all(manager: CheckpointManager, mesh: Mesh, steps: range) -> list[int]:
    saved = [step for step in steps if manager.save(step, make_state(mesh, step))]
    manager.wait_until_finished()
    manager.check_for_errors()
    settle(manager)
    return saved


def settle(manager: CheckpointManager) -> None:
    """Waits until nothing changes in the persistent directory any more, for tests that take it away."""
    assert manager._engine.job.deletions.wait_done(timedelta(seconds=30))


class Unreliable:
    """Stands in the way of one call of a real object, the given number of times."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, times: int = 1
    ) -> None:
        self.left = times
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.left > 0:
                self.left -= 1
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)


def flags(ramdisk: Path, tmp_path: Path, **changes: Any) -> Config:
    return Config(
        run_name="run",
        base_output_directory=str(tmp_path / "out"),
        enable_checkpointing=True,
        enable_emergency_checkpoint=True,
        local_checkpoint_directory=str(ramdisk),
        local_checkpoint_period=1,
        checkpoint_period=100,
        checkpoint_agent="off",
        **changes,
    )
