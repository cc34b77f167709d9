"""Values of every kind, and the states that flax and optax make."""

from __future__ import annotations

import enum
import functools
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState


class Phase(enum.IntEnum):
    WARM = 3


class Mode(enum.Enum):
    FAST = "fast"


VALUES = {
    "bool": True,
    "int": 3,
    "large": -(2**100),
    "float": 0.1,
    "complex": 1 - 2j,
    "text": "größe \ud800",
    "bytes": b"\0\xff",
    "phase": Phase.WARM,
    "mode": Mode.FAST,
    "scalars": [np.float16(0.1), np.uint64(2**64 - 1), np.bool_(True), np.complex64(1j), np.longlong(5)],
    "time": np.datetime64("2020-01-01T00:00:01", "us"),
    "span": np.timedelta64(3, "h"),
    "strings": [np.str_("a"), np.bytes_(b"b")],
    "none": None,
    "empty": [{}, [], (), optax.EmptyState(), optax.MaskedNode()],
}


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.LoRA(8, 2, 8, rngs=rngs)])


def optax_states() -> dict[str, Any]:
    return _optax_states(jax.config.read("jax_enable_x64"))


@functools.cache
def _optax_states(wide: bool) -> dict[str, Any]:
    """`wide`: what was made with 64-bit numbers is not for tests without them."""
    del wide
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16), "frozen": {"c": jnp.ones(2)}}
    labels = {"w": "adam", "b": "sgd", "frozen": {"c": "none"}}
    transforms = {
        "adam": optax.adam(1e-3),
        "adamw": optax.adamw(optax.cosine_decay_schedule(1e-3, 10), mu_dtype=jnp.bfloat16),
        "chain": optax.chain(
            optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_noise(0.1, 0.5, 0)
        ),
        "multi": optax.multi_transform(
            {"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1, 0.9), "none": optax.set_to_zero()}, labels
        ),
        "masked": optax.masked(optax.adam(1e-3), {"w": True, "b": False, "frozen": {"c": False}}),
        "hyper": optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(1.0, 0.0, 5)),
        "steps": optax.MultiSteps(optax.adam(1e-3), 4),
        "finite": optax.apply_if_finite(optax.sgd(0.1), 3),
        "lion": optax.lion(1e-3),
        "adafactor": optax.adafactor(1e-3),
    }
    return {name: transform.init(params) for name, transform in transforms.items()}


def train_state() -> TrainState:
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    return TrainState.create(apply_fn=len, params=params, tx=optax.chain(optax.clip(1.0), optax.adam(1e-3)))


@functools.cache
def nnx_parts() -> Any:
    model = Model(nnx.Rngs(params=0, dropout=jax.random.key(1, impl="rbg")))
    return nnx.state((model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)))
