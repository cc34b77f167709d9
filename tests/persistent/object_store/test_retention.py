"""Which steps stay in a bucket: by number, by period, by Orbax's policies; and what deleting them costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as orbax_policies

from benchmarks.requests import kind_of
from emergency_ckpt import (
    CheckpointManager,
    CheckpointManagerOptions,
    Config,
    LocalCheckpointOptions,
    PersistentCheckpointOptions,
)
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.files import ObjectFiles
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.runtime.settings import AGENT_VARIABLE
from tests.persistent.object_store.conftest import Failing, Place
from tests.persistent.saving import save, small_state

pytestmark = pytest.mark.server
in_buckets = pytest.mark.parametrize("place", ["s3", "gcs"], indirect=True)
LOSSES = {1: 9.0, 2: 3.0, 3: 1.0, 4: 4.0, 5: 8.0, 6: 7.0, 7: 6.0}
Opener = Callable[..., CheckpointManager]


@pytest.fixture
def opened(place: Place, ramdisk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Opens managers on one ramdisk directory and one prefix of a bucket, one after the other."""
    monkeypatch.setenv(AGENT_VARIABLE, "off")
    managers: list[CheckpointManager] = []

    def open_manager(**persistent: Any) -> CheckpointManager:
        for manager in managers:
            manager.close()
        options = CheckpointManagerOptions(
            local=LocalCheckpointOptions(save_interval_steps=1, max_to_keep=1),
            persistent=PersistentCheckpointOptions(save_interval_steps=1, **persistent),
        )
        managers.append(
            CheckpointManager(ramdisk, f"{place.url}/{place.prefix}", mesh(), state(), options=options)
        )
        return managers[-1]

    yield open_manager
    for manager in managers:
        manager.close()


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("replica", "fsdp"))


def state(step: int = 0) -> dict[str, Any]:
    return {
        "w": jax.device_put(jnp.full((8, 4), step, jnp.float32), NamedSharding(mesh(), PartitionSpec("fsdp")))
    }


def save_all(manager: CheckpointManager) -> None:
    for step, loss in LOSSES.items():
        assert manager.save(step, state(step), metrics={"loss": loss, "accuracy": -loss})
        manager.wait_until_finished()
    manager.check_for_errors()


def in_bucket(place: Place) -> set[str]:
    """The steps of which there is any object."""
    keys = (info.key for page in place.store.list_pages(place.prefix) for info in page.objects)
    return {step for key in keys if (step := key.removeprefix(place.prefix).split("/")[0]).isdigit()}


@in_buckets
def test_the_best_steps_every_fifth_and_the_newest_stay_and_the_best_is_found(
    opened: Opener, place: Place
) -> None:
    best = orbax_policies.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=2)
    any_of = orbax_policies.AnyPreservationPolicy([orbax_policies.EveryNSteps(5), best])
    manager = opened(preservation_policy=any_of)
    save_all(manager)
    assert manager.best_step() == 3
    assert manager.best_step("accuracy") == 3
    assert manager.best_step("loss", mode="max") == 5
    manager.close()
    assert in_bucket(place) == {"2", "3", "5", "7"}
    manager = opened(preservation_policy=any_of)
    assert manager.best_step() == 3, "of steps of an earlier life"
    assert manager.restore(manager.best_step())["state"]["w"][0, 0] == 3


@in_buckets
def test_the_newest_ones_and_those_of_a_period_stay(opened: Opener, place: Place) -> None:
    save_all(opened(max_to_keep=2, keep_period=3))
    opened(max_to_keep=2, keep_period=3).close()
    assert in_bucket(place) == {"3", "6", "7"}
    latest = PersistentStore(f"{place.url}/{place.prefix}").latest()
    assert latest is not None
    assert latest.step_id.step == 7


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_the_flag_of_how_many_stay_counts_in_buckets(
    place: Place, ramdisk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(AGENT_VARIABLE, "off")
    config = Config(
        run_name="run",
        base_output_directory=f"{place.url}/{place.prefix}out",
        enable_checkpointing=True,
        enable_emergency_checkpoint=True,
        local_checkpoint_directory=str(ramdisk),
        local_checkpoint_period=1,
        checkpoint_period=1,
        max_num_checkpoints_to_keep=2,
    )
    with CheckpointManager.from_config(config, mesh(), state()) as manager:
        save_all(manager)
    store = PersistentStore(f"{place.url}/{place.prefix}out/run/checkpoints")
    assert [entry.name for entry in store.files.entries() if entry.name.isdigit()] == ["6", "7"]


@pytest.mark.parametrize("failing", ["s3"], indirect=True)
def test_deleting_the_step_of_many_writers_takes_few_requests(failing: Failing) -> None:
    store = PersistentStore(failing.store.locate("many"), files=ObjectFiles(failing.store, "many"))
    generation = store.mint_generation(0, None)
    for step in (1, 2):
        save(store, Attempt(generation, step, "default"), small_state(step))
    names = [f"1/default/ocdbt.process_{generation.nonce}g1o0p{writer}/d/x" for writer in range(100, 400)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.files.write(name, b""), names))
    failing.proxy.requests.clear()
    store.delete_step(store.steps()[0])
    taken = [kind_of(request) for request in failing.proxy.requests]
    assert len(taken) < 20, taken
    assert [entry.name for entry in store.files.entries() if entry.name.isdigit()] == ["2"]
