"""Items in buckets: datasets that have a directory of their own there, and those that plain Orbax wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emergency_ckpt import (
    CheckpointManager,
    CheckpointManagerOptions,
    LocalCheckpointOptions,
    PersistentCheckpointOptions,
)
from emergency_ckpt.errors import CorruptDataError, ExtrasError, StoreBucketMissingError
from emergency_ckpt.persistent.files import ObjectFiles
from emergency_ckpt.runtime.settings import AGENT_VARIABLE
from tests.persistent.object_store.conftest import Place
from tests.persistent.object_store.test_orbax_and_buckets import upload

pytestmark = [pytest.mark.server, pytest.mark.parametrize("place", ["s3", "gcs"], indirect=True)]
Composite, JsonSave, JsonRestore = ocp.args.Composite, ocp.args.JsonSave, ocp.args.JsonRestore
OPTIONS = CheckpointManagerOptions(
    local=LocalCheckpointOptions(save_interval_steps=1, max_to_keep=2),
    persistent=PersistentCheckpointOptions(save_interval_steps=5, max_to_keep=2),
)
Opener = Callable[..., CheckpointManager]


def make_state(step: int) -> dict[str, Any]:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("replica", "fsdp"))
    return {
        "w": jax.device_put(jnp.full((8, 4), step, jnp.float32), NamedSharding(mesh, PartitionSpec("fsdp")))
    }


@pytest.fixture
def opened(place: Place, ramdisk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Managers one after the other, whose persistent directory and datasets are in the bucket."""
    monkeypatch.setenv(AGENT_VARIABLE, "off")
    managers: list[CheckpointManager] = []

    def open_manager(datasets: str = f"{place.url}/{place.prefix}datasets") -> CheckpointManager:
        for manager in managers:
            manager.close()
        state = make_state(0)
        managers.append(
            CheckpointManager(
                ramdisk,
                f"{place.url}/{place.prefix}steps",
                state["w"].sharding.mesh,
                state,
                options=OPTIONS,
                persistent_non_replicated_directory=datasets,
            )
        )
        return managers[-1]

    yield open_manager
    for manager in managers:
        manager.close()


def save(manager: CheckpointManager, step: int, mark: int, **how: Any) -> None:
    """A dataset that is too large for the commit of the step."""
    large = JsonSave({"mark": mark, "padding": "x" * 2**20})
    manager.save(step, Composite(state=ocp.args.PyTreeSave(make_state(step)), dataset=large), **how)
    manager.wait_until_finished()


def mark_of(manager: CheckpointManager, step: int) -> int:
    return manager.restore(step, Composite(dataset=JsonRestore())).dataset["mark"]


def directories(place: Place) -> list[str]:
    return [entry.name for entry in ObjectFiles(place.store, f"{place.prefix}datasets").entries()]


def test_datasets_live_and_go_with_their_steps_as_in_a_directory(opened: Opener, place: Place) -> None:
    manager = opened()
    for step in (5, 10, 12):
        save(manager, step, step)
    files = ObjectFiles(place.store, f"{place.prefix}datasets")
    files.write("7/default/metadata", b"of a life that was killed in the middle")
    manager = opened()
    assert mark_of(manager, 5) == 5
    save(manager, 10, -10)  # The 10 of the life that the restore has ended is replaced.
    assert directories(place) == ["10", "5"]
    assert mark_of(manager, 10) == -10
    save(manager, 12, 12)
    with pytest.raises(ExtrasError, match=r"item 'dataset' is wanted, .* kept for the steps \[5, 10\]"):
        mark_of(manager, 12)
    save(manager, 15, 15)
    save(manager, 20, 20)
    assert directories(place) == ["10", "15", "20"], "10 goes with the next one"
    assert "dataset" in manager.item_metadata(20)
    manager.delete(20)
    assert directories(place) == ["10", "15"]
    manager = opened()
    (content,) = [e for e in files.entries("15/default") if e.name == "metadata"]
    assert mark_of(manager, 15) == 15
    files.write(f"15/default/{content.name}", b'{"mark": 16}')
    with pytest.raises(CorruptDataError, match=r"datasets/15/default/metadata is not what was saved"):
        mark_of(opened(), 15)


def test_a_bucket_of_datasets_that_is_not_there_is_told_at_the_start(opened: Opener, place: Place) -> None:
    with pytest.raises(StoreBucketMissingError):
        opened(f"{place.url}-of-nobody/datasets")
    save(opened(), 5, 5)  # The ramdisk is free again.


def test_items_of_a_step_that_plain_orbax_wrote_come_from_the_bucket(
    opened: Opener, place: Place, tmp_path: Path
) -> None:
    with ocp.CheckpointManager(tmp_path, item_names=("state", "about")) as manager:
        args = Composite(state=ocp.args.StandardSave(make_state(3)), about=JsonSave({"by": "orbax"}))
        manager.save(3, args=args)
    (tmp_path / "3/commit_success.txt").touch()  # On gs:// Orbax writes it; here it wrote files.
    upload(place, tmp_path, f"{place.prefix}steps/")
    manager = opened()
    restored = manager.restore(3, Composite(about=JsonRestore()))
    assert restored.about == {"by": "orbax"}
    assert np.asarray(restored.state["w"]).tobytes() == np.asarray(make_state(3)["w"]).tobytes()
    with pytest.raises(ExtrasError, match=r"the step holds \[.*\].*|item 'nothing' is wanted"):
        manager.restore(3, Composite(nothing=JsonRestore()))
