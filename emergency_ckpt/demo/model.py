"""The demo's model: a small byte-level transformer (flax nnx), trained with AdamW (optax).

The whole training state is one pytree of arrays, `TrainState`; a train step is a pure function of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Sizes of the network and of its training; small enough for four processes on two cores."""

    width: int = 64
    heads: int = 4
    layers: int = 2
    length: int = 64
    dropout: float = 0.05
    learning_rate: float = 4e-3
    warmup_steps: int = 10


class TrainState(NamedTuple):
    """Everything a train step reads and writes: save it, and training can go on as if nothing had happened."""

    step: jax.Array
    params: Any
    optimizer: Any
    key: jax.Array


class Transformer(nnx.Module):
    """Predicts the next byte at every position: (batch, length) bytes to (batch, length, 256) logits."""

    def __init__(self, options: ModelOptions, *, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(VOCABULARY, options.width, rngs=rngs)
        self.position = nnx.Embed(options.length, options.width, rngs=rngs)
        self.dropout = nnx.Dropout(options.dropout)
        self.blocks = nnx.List([Block(options, rngs=rngs) for _ in range(options.layers)])
        self.norm = nnx.LayerNorm(options.width, rngs=rngs)
        self.logits = nnx.Linear(options.width, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array, rngs: nnx.Rngs) -> jax.Array:
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))
        x = self.dropout(x, rngs=rngs)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


class Block(nnx.Module):
    """Causal attention and a two-layer perceptron, each behind a norm and added to its input."""

    def __init__(self, options: ModelOptions, *, rngs: nnx.Rngs) -> None:
        self.heads = options.heads
        self.attention_norm = nnx.LayerNorm(options.width, rngs=rngs)
        self.qkv = nnx.Linear(options.width, 3 * options.width, rngs=rngs)
        self.attention_out = nnx.Linear(options.width, options.width, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(options.width, rngs=rngs)
        self.mlp_in = nnx.Linear(options.width, 4 * options.width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * options.width, options.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        heads = self.qkv(self.attention_norm(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        attended = jax.nn.dot_product_attention(heads[:, :, 0], heads[:, :, 1], heads[:, :, 2], is_causal=True)
        x = x + self.attention_out(attended.reshape(batch, length, width))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x))))


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The functions of one training job on one mesh.

    Attributes:
      init: makes the first state, placed on the mesh. All processes call it.
      abstract_state: shapes, dtypes and shardings of the state, without its arrays.
      place: a batch on the mesh from this process's share of it, uint8 (windows, length + 1).
      train_step: (state, batch) to (next state, mean loss in nats per byte); it consumes the state given to it.
    """

    init: Callable[[], TrainState]
    abstract_state: TrainState
    place: Callable[[np.ndarray], jax.Array]
    train_step: Callable[[TrainState, jax.Array], tuple[TrainState, jax.Array]]


def build_trainer(options: ModelOptions, mesh: Mesh, *, fsdp_axis: str, batch_size: int, seed: int) -> Trainer:
    """The training job on `mesh`: the state sharded over `fsdp_axis`, batches of windows over all axes.

    The train step is compiled here, before anything is restored: on CPU, processes that come to their first
    collective more than 30 s apart lose each other, and compiling takes longer on one than on another.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(options, rngs=nnx.Rngs(0))))
    optimizer = optax.adamw(optax.linear_schedule(0.0, options.learning_rate, options.warmup_steps))

    def first_state() -> TrainState:
        params_key, dropout_key = jax.random.split(jax.random.key(seed))
        params = nnx.to_pure_dict(nnx.state(Transformer(options, rngs=nnx.Rngs(params_key))))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), dropout_key)

    def mean_loss(params: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        logits = model(batch[:, :-1].astype(jnp.int32), nnx.Rngs(dropout=key))
        answers = batch[:, 1:].astype(jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()

    def train_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(state.key, state.step)
        loss, gradients = jax.value_and_grad(mean_loss)(state.params, batch, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, optimizer_state, state.key), loss

    shapes = jax.eval_shape(first_state)
    shardings = jax.tree.map(lambda leaf: _leaf_sharding(leaf, mesh, fsdp_axis), shapes)
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    batch_sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    batch = jax.ShapeDtypeStruct((batch_size, options.length + 1), jnp.uint8, sharding=batch_sharding)
    compiled_step = (
        jax.jit(train_step, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())), donate_argnums=0)
        .lower(abstract_state, batch)
        .compile()
    )
    return Trainer(
        init=jax.jit(first_state, out_shardings=shardings),
        abstract_state=abstract_state,
        place=functools.partial(jax.make_array_from_process_local_data, batch_sharding),
        train_step=compiled_step,
    )


def _leaf_sharding(leaf: jax.ShapeDtypeStruct, mesh: Mesh, fsdp_axis: str) -> NamedSharding:
    """Shards the first dimension that divides evenly; a leaf without one is whole on every device."""
    for dimension, size in enumerate(leaf.shape):
        if size % mesh.shape[fsdp_axis] == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * dimension, fsdp_axis))
    return NamedSharding(mesh, PartitionSpec())
