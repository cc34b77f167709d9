"""Checkpoints in buckets, ours and plain Orbax's: parameters onto another mesh, compression, Orbax in place.

Plain Orbax reaches gs:// through etils and gcsfs, and cannot write to s3://. What it wrote as files is copied
into both kinds of bucket; where gcsfs is installed, it also works on the fake of GCS in place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt import CheckpointManager, Config
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.persistent.files import ObjectFiles
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.object_store.conftest import BUCKET, Place

pytestmark = pytest.mark.server
BUCKETS = pytest.mark.parametrize("place", ["s3", "gcs"], indirect=True)
FORMATS = [(True, True), (True, False), (False, True), (False, False)]


def mesh_of(*shape: int) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(shape), ("replica", "fsdp"))


def make_state(mesh: Mesh, step: int) -> dict[str, Any]:
    """Rows of the weights are split; long runs of equal numbers, which compress well."""
    weights = np.repeat(np.arange(64, dtype=np.float32) + step, 1024).reshape(64, 1024)
    split, everywhere = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    return {
        "params": {"w": jax.device_put(weights, split), "b": jax.device_put(jnp.arange(5) + step, everywhere)},
        "mu": jax.device_put(weights * 2, split),
        "step": step,
    }


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x
        ),
        state,
    )


def assert_same(found: Any, right: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
        if isinstance(other, jax.Array):
            assert one.sharding == other.sharding


def config_of(root: str, run: str, **flags: Any) -> Config:
    return Config(
        run_name=run,
        base_output_directory=root,
        enable_checkpointing=True,
        checkpoint_period=1,
        checkpoint_agent="off",
        **flags,
    )


def save_ours(root: str, run: str, step: int, **flags: Any) -> None:
    mesh = mesh_of(2, 4)
    with CheckpointManager.from_config(config_of(root, run, **flags), mesh, make_state(mesh, 0)) as manager:
        manager.save(step, make_state(mesh, step))
        manager.wait_until_finished()
        manager.check_for_errors()


def upload(place: Place, directory: Path, prefix: str) -> None:
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        place.store.put(f"{prefix}{path.relative_to(directory).as_posix()}", path.read_bytes())


def download(files: ObjectFiles, path: str, into: Path) -> int:
    """The bytes of all objects below `path`, which come into a directory."""
    size = 0
    for entry in files.entries(path):
        inside = f"{path}/{entry.name}"
        if entry.is_directory:
            size += download(files, inside, into / entry.name)
            continue
        data = files.read(inside)
        (into / entry.name).parent.mkdir(parents=True, exist_ok=True)
        (into / entry.name).write_bytes(data)
        size += len(data)
    return size


def load_onto_another_mesh(root: str, run: str, path: str) -> None:
    """A new run begins from the parameters of a checkpoint that another mesh saved; its moments stay fresh."""
    mesh = mesh_of(4, 2)
    fresh, saved = make_state(mesh, 0), make_state(mesh, 7)
    config = config_of(root, run, load_parameters_path=path)
    with CheckpointManager.from_config(config, mesh, abstract(fresh)) as manager:
        restored = manager.restore_or_init(lambda: fresh)
        assert restored.step is None
        assert_same(restored.state, {**fresh, "params": saved["params"]})


@BUCKETS
def test_parameters_of_ours_and_of_plain_orbax_come_onto_another_mesh(place: Place, tmp_path: Path) -> None:
    root = f"{place.url}/{place.prefix[:-1]}"
    save_ours(root, "ours", 7)
    load_onto_another_mesh(root, "from-ours", f"{root}/ours/checkpoints/7")
    saved = make_state(mesh_of(2, 4), 7)
    for use_ocdbt, use_zarr3 in FORMATS:
        name = f"ocdbt-{use_ocdbt}-zarr3-{use_zarr3}"
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
        with ocp.CheckpointManager(tmp_path / name, item_handlers=handler) as manager:
            manager.save(7, args=ocp.args.PyTreeSave(saved))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "standard/7", saved)
    upload(place, tmp_path, place.prefix)
    for directory in sorted(path.name for path in tmp_path.iterdir()):
        load_onto_another_mesh(root, f"from-{directory}", f"{root}/{directory}/7")


@BUCKETS
def test_a_part_of_a_step_that_orbax_began_the_bucket_with_comes_onto_another_mesh(
    place: Place, tmp_path: Path, ramdisk: Path
) -> None:
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.StandardSave(make_state(mesh_of(2, 4), 7)))
    (tmp_path / "7/commit_success.txt").touch()  # On gs:// Orbax writes it; here it wrote files.
    upload(place, tmp_path, f"{place.prefix}run/checkpoints/")
    mesh = mesh_of(4, 2)
    fresh, right = make_state(mesh, 0), make_state(mesh, 7)
    local = {
        "enable_emergency_checkpoint": True,
        "local_checkpoint_directory": str(ramdisk),
        "local_checkpoint_period": 1,
    }
    config = config_of(f"{place.url}/{place.prefix[:-1]}", "run", **local)
    with CheckpointManager.from_config(config, mesh, abstract(fresh)) as manager:
        asked = ocp.args.PyTreeRestore(item={"params": abstract(right["params"])}, partial_restore=True)
        part = manager.restore(7, ocp.args.Composite(state=asked))["state"]
        assert_same(part, {"params": right["params"]})
        assert_same(manager.restore_or_init(lambda: fresh).state, right)
        manager.save(8, make_state(mesh, 8))
        manager.wait_until_finished()
        assert [held.step_id for held in manager._engine.job.persistent.steps()] == [StepId(0, 7), StepId(1, 8)]


@BUCKETS
def test_compressed_steps_take_less_room_say_so_and_are_read_by_tensorstore_and_orbax(
    place: Place, tmp_path: Path
) -> None:
    root, files = f"{place.url}/{place.prefix[:-1]}", ObjectFiles(place.store, place.prefix[:-1])
    sizes = {}
    for compression in ("none", "zstd"):
        save_ours(root, compression, 7, checkpoint_storage_compression=compression)
        sizes[compression] = download(files, f"{compression}/checkpoints/7", tmp_path / compression)
    assert sizes["zstd"] < 0.25 * sizes["none"]
    base = files.kvstore("zstd/checkpoints/7/default")
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    metadata = json.loads(store.read("params.w/zarr.json").result().value)
    assert [codec["name"] for codec in metadata["codecs"]] == ["bytes", "zstd", "crc32c"]
    array = ts.open(
        {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": "params.w/"}}
    ).result()
    right = make_state(mesh_of(2, 4), 7)
    assert array.read().result().tobytes() == np.asarray(right["params"]["w"]).tobytes()
    restored = ocp.StandardCheckpointer().restore(tmp_path / "zstd/default", abstract(right))
    assert_same(restored, right)


@pytest.fixture
def gcs_of_orbax(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[epath.Path]:
    """A directory in the fake of GCS, as Orbax reaches it. gcsfs asks no server of Google's for credentials."""
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed, without which Orbax has no gs://")
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield epath.Path(f"gs://{BUCKET}/{place.prefix}")
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.mark.parametrize("place", ["gcs"], indirect=True)
def test_plain_orbax_restores_ours_in_place_from_gs(place: Place, gcs_of_orbax: epath.Path) -> None:
    for compression in ("none", "zstd"):
        save_ours(str(gcs_of_orbax), compression, 7, checkpoint_storage_compression=compression)
        steps = gcs_of_orbax / compression / "checkpoints"
        right = make_state(mesh_of(4, 2), 7)
        assert_same(ocp.StandardCheckpointer().restore(steps / "7/default", abstract(right)), right)
        with ocp.CheckpointManager(steps, item_names=("default",)) as manager:
            assert manager.all_steps() == [7]
            args = ocp.args.Composite(default=ocp.args.StandardRestore(abstract(right)))
            assert_same(manager.restore(7, args=args)["default"], right)


@pytest.mark.parametrize("place", ["gcs"], indirect=True)
def test_what_plain_orbax_wrote_to_gs_is_taken_from_there(place: Place, gcs_of_orbax: epath.Path) -> None:
    saved = make_state(mesh_of(2, 4), 7)
    for use_ocdbt, use_zarr3 in FORMATS:
        name = f"ocdbt-{use_ocdbt}-zarr3-{use_zarr3}"
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
        with ocp.CheckpointManager(gcs_of_orbax / name / "checkpoints", item_handlers=handler) as manager:
            manager.save(7, args=ocp.args.PyTreeSave(saved))
        directory = f"{gcs_of_orbax}/{name}/checkpoints"
        assert [held.step_id for held in PersistentStore(directory).steps()] == [StepId(0, 7)]
        load_onto_another_mesh(str(gcs_of_orbax), f"from-{name}", f"{directory}/7")
