"""Damage in the persistent tier, seen from the manager: an older step with the reason, or an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from emergency_ckpt import CheckpointManager
from emergency_ckpt.errors import CorruptDataError, EmergencyCheckpointError, NoRestorableStepError
from emergency_ckpt.persistent.step_files import seal, unseal
from tests.manager.states import OPTIONS, assert_same, make_state, save_all

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def intact(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A persistent directory with steps 5 and 10."""
    bucket = tmp_path_factory.mktemp("intact") / "bucket"
    with CheckpointManager(None, bucket, mesh, make_state(mesh, 0), options=OPTIONS) as manager:
        save_all(manager, mesh, range(5, 11))
    for first in bucket.glob("1"):
        shutil.rmtree(first)
    return bucket


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def missing(path: Path) -> None:
    path.unlink()


KINDS = {
    "array data": "default/**/d/*",
    "manifest of the array database": "default/**/manifest.ocdbt",
    "Orbax's tree": "default/_METADATA",
    "Orbax's shardings": "default/_sharding",
    "Orbax's array metadata": "default/array_metadatas/*",
    "Orbax's step metadata": "_CHECKPOINT_METADATA",
    "layout": "emergency_ckpt.layout.json",
    "checksums": "emergency_ckpt.checksums",
    "side file": "emergency_ckpt.[0-9]*.json",
}
ORBAX_ONLY = {kind for kind in KINDS if kind.startswith("Orbax")}


@pytest.mark.parametrize("damage", [flipped, cut, emptied, missing])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_costs_at_most_its_step(
    intact: Path, mesh: Mesh, tmp_path: Path, kind: str, damage: Damage
) -> None:
    bucket = Path(shutil.copytree(intact, tmp_path / "bucket"))
    damaged = [path for path in (bucket / "10").glob(KINDS[kind]) if path.is_file()]
    assert damaged
    for path in damaged:
        damage(path)
    with CheckpointManager(None, bucket, mesh, make_state(mesh, 0), options=OPTIONS) as manager:
        restored = manager.restore_or_init(dict)
        assert restored.step is not None
        assert_same(restored.state, make_state(mesh, restored.step))
        if kind in ORBAX_ONLY:
            assert restored.step == 10
            return
        assert restored.step == 5
        report = manager.last_restore
        assert report is not None
        if (kind, damage) == ("side file", missing):
            assert report.reason.startswith("step 5: ")  # Step 10 passes for an older one of another program.
            return
        assert "step 10: the persistent tier is unusable (" in report.reason
        assert str(bucket / "10") in report.reason
    shutil.rmtree(bucket)
    shutil.copytree(intact, bucket)
    for path in damaged:
        damage(path)
    with CheckpointManager(None, bucket, mesh, make_state(mesh, 0), options=OPTIONS) as manager:
        with pytest.raises(EmergencyCheckpointError, match="10"):
            manager.restore(10)
        assert_same(manager.restore(5)["state"], make_state(mesh, 5))


@pytest.mark.parametrize(
    ("kind", "at", "bit"), [("ocdbt.process_*merged/d/*", 18, 2), ("manifest.ocdbt", 14, 6)]
)
def test_a_flipped_bit_that_is_no_longer_a_tree_of_arrays_costs_its_step(
    intact: Path, mesh: Mesh, tmp_path: Path, kind: str, at: int, bit: int
) -> None:
    """TensorStore says so without a status, and it must not pass for a store that fails."""
    bucket = Path(shutil.copytree(intact, tmp_path / "bucket"))
    files = list((bucket / "10/default").glob(kind))
    assert files
    for path in files:
        content = bytearray(path.read_bytes())
        content[at] ^= 1 << bit
        path.write_bytes(content)
    with CheckpointManager(None, bucket, mesh, make_state(mesh, 0), options=OPTIONS) as manager:
        restored = manager.restore_or_init(dict)
        assert restored.step == 5
        assert_same(restored.state, make_state(mesh, 5))


def test_an_item_directory_that_is_gone_takes_its_step_off_the_list(
    intact: Path, mesh: Mesh, tmp_path: Path
) -> None:
    bucket = Path(shutil.copytree(intact, tmp_path / "bucket"))
    (bucket / "10/default").rename(bucket / "10/elsewhere") if (bucket / "10/default").exists() else None
    with CheckpointManager(None, bucket, mesh, make_state(mesh, 0), options=OPTIONS) as manager:
        assert list(manager.all_steps()) == [5]
        assert manager.restore_or_init(dict).step == 5


def test_damaged_records_of_the_run_are_refused_or_cost_nothing(
    intact: Path, mesh: Mesh, tmp_path: Path
) -> None:
    records = tmp_path / "bucket/emergency_ckpt"

    def restored() -> int | None:
        with CheckpointManager(
            None, tmp_path / "bucket", mesh, make_state(mesh, 0), options=OPTIONS
        ) as manager:
            found = manager.restore_or_init(dict)
            assert_same(found.state, make_state(mesh, found.step or 0))
            return found.step

    def fresh() -> None:
        shutil.rmtree(tmp_path / "bucket", ignore_errors=True)
        shutil.copytree(intact, tmp_path / "bucket")
        assert restored() == 10
        assert restored() == 10

    fresh()
    (records / "run_id").write_bytes(b"not a run id\n")
    with pytest.raises(CorruptDataError, match=r"run_id should hold a UUID but holds 'not a run id'"):
        restored()
    for lost in ("run_id", "generations", "activations"):
        fresh()
        (records / lost).rename(tmp_path / f"lost {lost}")
        assert restored() == 10, lost
    for damage in (flipped, cut, emptied):
        fresh()
        damage(max((records / "generations").iterdir()))
        assert restored() == 10
        damage(max((records / "activations").iterdir()))
        assert restored() == 10
        damage(min((records / "activations").iterdir()))
        with pytest.raises(CorruptDataError, match="activations"):
            restored()


def test_hand_edited_metadata_of_the_step_is_refused(intact: Path, mesh: Mesh, tmp_path: Path) -> None:
    bucket = Path(shutil.copytree(intact, tmp_path / "bucket"))
    (side,) = (bucket / "10").glob("emergency_ckpt.[0-9]*.json")
    edited = side.read_text().replace("step 10", "step 12")
    side.write_text(edited if edited != side.read_text() else json.dumps({"edited": True}))
    with CheckpointManager(None, bucket, mesh, make_state(mesh, 0), options=OPTIONS) as manager:
        with pytest.raises(NoRestorableStepError, match="The newest restorable step is 5"):
            manager.restore(10)
        assert np.asarray(manager.restore(None)["state"].params["w"])[0, 0] == jnp.float32(5)


def test_a_step_whose_side_file_cannot_be_opened_costs_that_step_only(
    intact: Path, mesh: Mesh, tmp_path: Path
) -> None:
    """As when a step is deleted between a look into its directory and the next one."""
    bucket = Path(shutil.copytree(intact, tmp_path / "bucket"))
    (side,) = (bucket / "10").glob("emergency_ckpt.[0-9]*.json")
    side.unlink()
    side.symlink_to(tmp_path / "nowhere")
    with CheckpointManager(None, bucket, mesh, make_state(mesh, 0), options=OPTIONS) as manager:
        for call in (manager.metadata, manager.metrics):
            with pytest.raises(CorruptDataError, match=f"{side} was listed and cannot be opened"):
                call(10)
        assert manager.best_step("loss", "min") is None
        with pytest.raises(NoRestorableStepError, match="cannot be opened"):
            manager.restore(10)
        assert manager.restore_or_init(dict).step == 5


def test_a_side_file_with_other_fields_costs_its_step(intact: Path, mesh: Mesh, tmp_path: Path) -> None:
    bucket = Path(shutil.copytree(intact, tmp_path / "bucket"))
    (side,) = (bucket / "10").glob("emergency_ckpt.[0-9]*.json")
    side.write_bytes(seal({**unseal(side.read_bytes(), str(side), ""), "digests": []}))
    with CheckpointManager(None, bucket, mesh, make_state(mesh, 0), options=OPTIONS) as manager:
        assert manager.restore_or_init(dict).step == 5
        assert manager.last_restore is not None
        assert f"{side} has an unusable field: TypeError" in manager.last_restore.reason
