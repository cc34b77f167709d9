"""The model learns, and its state is placed, checksummed and continued as a checkpoint needs it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emergency_ckpt.demo.data import read_corpus, training_data
from emergency_ckpt.demo.digest import shard_checksums
from emergency_ckpt.demo.model import ModelOptions, Trainer, build_trainer

SMALL = ModelOptions(width=16, heads=2, layers=1, length=16, learning_rate=1e-2, warmup_steps=3)


@functools.cache
def small_trainer() -> Trainer:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("replica", "fsdp"))
    return build_trainer(SMALL, mesh, fsdp_axis="fsdp", batch_size=16, seed=1)


def trained(steps: int) -> tuple[Any, list[float]]:
    """The state after `steps` steps, and the losses on the way."""
    trainer = small_trainer()
    data = training_data(read_corpus(), length=16, batch_size=16, process=0, process_count=1, seed=1)
    state, losses = trainer.init(), []
    for _ in range(steps):
        state, loss = trainer.train_step(state, trainer.place(next(data)))
        losses.append(float(loss))
    return state, losses


def test_the_loss_clearly_falls() -> None:
    _, losses = trained(40)
    assert losses[0] > 5
    assert np.mean(losses[-5:]) < losses[0] - 1


def test_the_state_is_placed_as_its_abstract_form_says() -> None:
    abstract, state = small_trainer().abstract_state, small_trainer().init()

    def description(leaf: Any) -> Any:
        return leaf.shape, leaf.dtype, leaf.sharding

    assert jax.tree.map(description, state) == jax.tree.map(description, abstract)
    assert isinstance(abstract.step.sharding, NamedSharding)
    mesh = abstract.step.sharding.mesh
    assert abstract.params["logits"]["kernel"].sharding == NamedSharding(mesh, PartitionSpec("fsdp"))
    assert abstract.step.sharding == NamedSharding(mesh, PartitionSpec())


def test_a_train_step_consumes_its_state() -> None:
    trainer = small_trainer()
    before = trainer.init()
    after, _ = trainer.train_step(before, trainer.place(np.zeros((16, 17), np.uint8)))
    assert before.params["logits"]["kernel"].is_deleted()
    assert int(after.step) == 1


def test_checksums_name_every_shard_once_and_tell_states_apart() -> None:
    first, second, other = trained(2)[0], trained(2)[0], trained(3)[0]
    checksums = shard_checksums(first)
    assert checksums == shard_checksums(second)
    assert checksums != shard_checksums(other)
    assert {"step[]", "key[0:2]", "params.logits.kernel[0:8, 0:256]"} <= checksums.keys()
    assert checksums["key[0:2]"] == shard_checksums(other)["key[0:2]"]


@pytest.mark.parametrize("leaf", ["params.norm.scale[0:8]", "optimizer.0.mu.norm.scale[0:8]"])
def test_one_flipped_bit_changes_the_checksum_of_its_shard_only(leaf: str) -> None:
    state = trained(2)[0]
    in_params = leaf.startswith("params")
    scale = state.params["norm"]["scale"] if in_params else state.optimizer[0].mu["norm"]["scale"]
    bits = np.asarray(scale).copy().view(np.uint32)
    bits[3] ^= 1
    flipped = jax.device_put(bits.view(np.float32), scale.sharding)
    changed = jax.tree.map(lambda x: flipped if x is scale else x, state)
    before, after = shard_checksums(state), shard_checksums(changed)
    assert {name for name in before if before[name] != after[name]} == {leaf}
