"""We read what plain Orbax wrote, in each of its storage formats, whole and in boxes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.shards import Box
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError, StateMismatchError
from emergency_ckpt.persistent.reader import BoxRequest, StepReader
from emergency_ckpt.persistent.store import PersistentStore


def state() -> dict[str, Any]:
    sharding = NamedSharding(Mesh(np.array(jax.devices()).reshape(2, 4), ("r", "d")), PartitionSpec("d"))
    return {
        "w": jax.device_put(jnp.arange(128.0).reshape(16, 8), sharding),
        "b": jax.device_put(jnp.arange(64).reshape(16, 4).astype(jnp.bfloat16), sharding),
        "zeros": jax.device_put(jnp.zeros((16, 4)), sharding),
        "nested": [jnp.int8(3), {"key": jax.random.key(5)}],
        "numpy": np.arange(6).reshape(2, 3),
        "lr": 0.25,
        "step": 12,
        "none": None,
    }


def check(reader: StepReader, saved: dict[str, Any]) -> None:
    assert not reader.verified
    assert reader.step_id is None
    expected = {
        "w": saved["w"],
        "b": saved["b"],
        "zeros": saved["zeros"],
        "nested.0": saved["nested"][0],
        "nested.1.key": jax.random.key_data(saved["nested"][1]["key"]),
        "numpy": saved["numpy"],
    }
    assert sorted(reader.leaves) == sorted(expected)
    for name, value in expected.items():
        array = np.asarray(value)
        out = np.empty(array.shape, array.dtype)
        reader.read_box(name, Box.whole(array.shape), out)
        assert out.tobytes() == array.tobytes(), name
    part = np.empty((5, 3), np.float32)
    reader.read_box("w", Box((3, 2), (8, 5)), part)
    assert part.tolist() == np.asarray(saved["w"])[3:8, 2:5].tolist()


@pytest.mark.parametrize(
    ("use_ocdbt", "use_zarr3"), [(True, False), (True, True), (False, False), (False, True)]
)
def test_a_step_of_the_plain_manager_is_read(tmp_path: Path, use_ocdbt: bool, use_zarr3: bool) -> None:
    saved = {**state(), "name": "run"}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        manager.save(20, args=ocp.args.PyTreeSave(saved))
    (step,) = PersistentStore(tmp_path).steps()
    assert (step.step_id, step.item, step.written_by_us) == (StepId(0, 20), "default", False)
    reader = StepReader(step.location)
    check(reader, saved)
    assert reader.values() == {"lr": 0.25, "step": 12, "name": "run"}


def test_the_items_of_maxtext_and_of_the_emergency_manager_are_found(tmp_path: Path) -> None:
    for step, item in ((1, "items"), (2, "state")):
        with ocp.CheckpointManager(tmp_path, item_names=(item,)) as manager:
            args = ocp.args.Composite(**{item: ocp.args.StandardSave({"x": jnp.full(2, step)})})
            manager.save(step, args=args)
    steps = PersistentStore(tmp_path).steps()
    assert [(s.step_id.step, s.item) for s in steps] == [(1, "items"), (2, "state")]
    for step in steps:
        out = np.empty(2, np.int32)
        StepReader(step.location).read_box("x", Box((0,), (2,)), out)
        assert out.tolist() == [step.step_id.step] * 2


def test_a_checkpoint_without_an_item_directory_is_read(tmp_path: Path) -> None:
    saved = state()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "7", saved)
    (step,) = PersistentStore(tmp_path).steps()
    assert step.item == ""
    check(StepReader(step.location), saved)


def test_a_directory_without_a_state_is_no_step_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "7" / "params").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert PersistentStore(tmp_path).steps() == []
    assert "holds no item named default or state or items" in caplog.text
    with pytest.raises(PersistentStoreError, match=r"params.*expected one of the directories default"):
        StepReader(tmp_path / "7")
    with pytest.raises(PersistentStoreError, match="_METADATA is missing"):
        _ = StepReader(tmp_path / "7", "params").leaves


def test_a_missing_chunk_of_anothers_checkpoint_is_an_error_not_zeros(tmp_path: Path) -> None:
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        manager.save(1, args=ocp.args.PyTreeSave({"w": jnp.ones((4, 4))}))
    (tmp_path / "1/default/w/0.0").unlink()
    with pytest.raises(CorruptDataError, match=r"reading w\[0:4, 0:4\].*/1: .*missing"):
        StepReader(tmp_path / "1").read_box("w", Box((0, 0), (4, 4)), np.empty((4, 4), np.float32))


def test_what_does_not_fit_the_saved_leaves_is_refused_before_reading(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave({"w": jnp.ones((4, 4)), "b": jnp.ones(2)}))
    reader = StepReader(tmp_path / "1")
    requests = [
        BoxRequest("w", Box((0, 0), (4, 5)), np.empty((4, 5), np.float32)),
        BoxRequest("w", Box((0,), (4,)), np.empty(4, np.float32)),
        BoxRequest("w", Box((0, 0), (4, 4)), np.empty((4, 4), np.int32)),
        BoxRequest("w", Box((0, 0), (4, 4)), np.empty((4, 3), np.float32)),
        BoxRequest("w", Box((0, 0), (4, 4)), np.empty((4, 4), np.float32).T),
        BoxRequest("v", Box((), ()), np.empty((), np.float32)),
    ]
    for request in requests:
        with pytest.raises(StateMismatchError):
            reader.read_boxes([request])
