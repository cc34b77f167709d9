"""What is trained and saved: a small network with Adam, in many leaves of very different sizes.

Both slices hold the whole state and each trains on its half of the batch; gradients are summed over them.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

State = dict[str, Any]

_LAYERS = 4
_ROWS_PER_SLICE = 64
_LEARNING_RATE, _DECAY_1, _DECAY_2, _EPSILON = 1e-3, 0.9, 0.999, 1e-8


class Workload:
    """A state of about `nbytes` bytes (parameters and both moments) and the train step that changes it."""

    def __init__(self, mesh: Mesh, nbytes: int) -> None:
        self.mesh = mesh
        # Twelve matrices' worth of `width` x `width` float32 per layer, each with two moments.
        self._width = max(8, math.isqrt(nbytes // (_LAYERS * 12 * 4 * 3)) // 8 * 8)
        self._whole = NamedSharding(mesh, P())
        shapes = jax.eval_shape(self._make)
        self.abstract_state = jax.tree.map(self._describe, shapes)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        self.init = jax.jit(self._make, out_shardings=shardings)
        self._step = jax.jit(_train_step, donate_argnums=0, out_shardings=shardings)
        self._batch = self._make_batch()

    @property
    def nbytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract_state))

    def step(self, state: State) -> State:
        """The next state; `state` is donated."""
        return self._step(state, self._batch)

    def _describe(self, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(self.mesh, P("fsdp")) if leaf.ndim == 2 else self._whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def _make(self) -> State:
        width = self._width
        shapes = {
            **dict.fromkeys(("query", "key", "value", "out"), (width, width)),
            "up": (width, 4 * width),
            "down": (4 * width, width),
            "scale": (width,),
        }
        keys = iter(jax.random.split(jax.random.key(7), _LAYERS * len(shapes)))
        params = {
            f"layer_{layer}": {
                name: jax.random.normal(next(keys), shape) / math.sqrt(shape[0])
                for name, shape in shapes.items()
            }
            for layer in range(_LAYERS)
        }
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"params": params, "first": zeros, "second": zeros, "count": jnp.zeros((), jnp.int32)}

    def _make_batch(self) -> jax.Array:
        rows = _ROWS_PER_SLICE * self.mesh.shape["replica"]
        data = np.random.default_rng(11).standard_normal((rows, self._width), np.float32)
        return jax.make_array_from_callback(
            data.shape, NamedSharding(self.mesh, P("replica")), lambda index: data[index]
        )


def _train_step(state: State, batch: jax.Array) -> State:
    gradients = jax.grad(_loss)(state["params"], batch)
    count = state["count"] + 1
    first = jax.tree.map(lambda m, g: _DECAY_1 * m + (1 - _DECAY_1) * g, state["first"], gradients)
    second = jax.tree.map(lambda v, g: _DECAY_2 * v + (1 - _DECAY_2) * g * g, state["second"], gradients)
    rate = _LEARNING_RATE * jnp.sqrt(1 - _DECAY_2**count) / (1 - _DECAY_1**count)
    params = jax.tree.map(
        lambda p, m, v: p - rate * m / (jnp.sqrt(v) + _EPSILON), state["params"], first, second
    )
    return {"params": params, "first": first, "second": second, "count": count}


def _loss(params: State, batch: jax.Array) -> jax.Array:
    """How badly the network finds a row from its neighbour's half; what it learns does not matter here."""
    x = batch
    for layer in params.values():
        y = _normal(x) * (1 + layer["scale"])
        x = x + ((y @ layer["query"]) * jax.nn.sigmoid(y @ layer["key"]) * (y @ layer["value"])) @ layer["out"]
        x = x + jax.nn.gelu(_normal(x) @ layer["up"]) @ layer["down"]
    return jnp.mean((_normal(x) - jnp.flip(batch, axis=1)) ** 2)


def _normal(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def shard_views(state: State) -> list[np.ndarray]:
    """The bytes of this process's part of the state, as flat uint8 views of the arrays' own memory (CPU)."""
    return [
        np.asarray(shard.data).reshape(-1).view(np.uint8)
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
    ]


def require_same_bits(found: State, wanted: State, who: str) -> None:
    """Raises ValueError unless both states are the same, bit for bit: a fast wrong restore is worth nothing."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(wanted)]
    for name, a, b in zip(names, shard_views(found), shard_views(wanted), strict=True):
        if not np.array_equal(a, b):
            raise ValueError(f"{who} restored other bits than were saved in leaf {name}")
