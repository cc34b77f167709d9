"""A job of two slices that saves items of every kind beside its state, and loses what holds them."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from emergency_ckpt import (
    CheckpointManager,
    CheckpointManagerOptions,
    LocalCheckpointOptions,
    PersistentCheckpointOptions,
)
from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from emergency_ckpt.errors import EmergencyCheckpointError
from tests.integration.training_job import check_state, make_mesh, make_state

OPTIONS = CheckpointManagerOptions(
    local=LocalCheckpointOptions(save_interval_steps=2),
    persistent=PersistentCheckpointOptions(save_interval_steps=10),
)


class PerProcessHandler(ocp.CheckpointHandler):
    """As handlers of data iterators do it: a file for each process."""

    def save(self, directory: epath.Path, args: PerProcessSave) -> None:
        (directory / f"process_{jax.process_index()}.txt").write_text(str(args.item))

    def restore(self, directory: epath.Path, args: PerProcessRestore) -> int:
        if args.fails_on == jax.process_index():
            raise ValueError("the position is not in this data")
        return int((directory / f"process_{jax.process_index()}.txt").read_text())


@ocp.args.register_with_handler(PerProcessHandler, for_save=True)
@dataclasses.dataclass
class PerProcessSave(ocp.args.CheckpointArgs):
    item: int


@ocp.args.register_with_handler(PerProcessHandler, for_restore=True)
@dataclasses.dataclass
class PerProcessRestore(ocp.args.CheckpointArgs):
    fails_on: int | None = None


def save_and_lose(root: str) -> dict[str, Any]:
    """What each process gets back in three lives, and its error in one between them."""
    mesh, process = make_mesh(2), jax.process_index()
    ramdisk = Path(root) / f"ramdisk_{process}"
    ramdisk.mkdir()

    def life() -> CheckpointManager:
        multihost_utils.sync_global_devices("all have closed and lost what they lose")
        return CheckpointManager(
            ramdisk,
            Path(root) / "bucket",
            mesh,
            make_state(mesh, 0),
            options=OPTIONS,
            persistent_non_replicated_directory=Path(root) / "datasets",
        )

    with life() as manager:
        for step in range(1, 13):
            args = ocp.args.Composite(
                state=ocp.args.PyTreeSave(make_state(mesh, step)),
                about=ocp.args.JsonSave({"step": step}),
                position=PerProcessSave(100 * step + process),
                dataset=ocp.args.JsonSave({"data": step}),
            )
            manager.save(step, args)
    told: dict[str, Any] = {}
    if process in (0, 1):
        remove_tree(ramdisk / "emergency_ckpt")
    with life() as manager:
        with contextlib.suppress(EmergencyCheckpointError):
            manager.restore(None, ocp.args.Composite(position=PerProcessRestore(fails_on=1)))
            raise AssertionError("a handler that fails was passed over")
        told["slice_lost"] = restore_all(manager, mesh)
    remove_tree(ramdisk / "emergency_ckpt")
    with life() as manager:
        told["all_lost"] = restore_all(manager, mesh)
        try:
            manager.restore(None, ocp.args.Composite(position=PerProcessRestore(fails_on=1)))
        except EmergencyCheckpointError as error:
            told["error"] = f"{type(error).__name__}: {error}"
    return told


class PaddedHandler(PerProcessHandler):
    """Writes a file that is too large for the commit, on process 1 only."""

    def save(self, directory: epath.Path, args: PaddedSave) -> None:
        padding = " " * (2**20 if jax.process_index() == 1 else 1)
        (directory / f"process_{jax.process_index()}.txt").write_text(f"{args.item}{padding}")


@ocp.args.register_with_handler(PaddedHandler, for_save=True)
class PaddedSave(PerProcessSave):
    pass


@ocp.args.register_with_handler(PaddedHandler, for_restore=True)
class PaddedRestore(PerProcessRestore):
    pass


def save_datasets_of_unequal_size(root: str, places: dict[str, str]) -> dict[str, dict[str, Any]]:
    """For datasets in each of these places, what a process gets back of them."""
    told = {}
    for name, datasets in places.items():
        told[name] = save_datasets_below(Path(root) / name, datasets)
    return told


def save_datasets_below(root: Path, datasets: str) -> dict[str, Any]:
    """What each process gets back of a persistent step, and its error at a step of the ramdisks."""
    mesh, process = make_mesh(2), jax.process_index()
    ramdisk = root / f"ramdisk_{process}"
    ramdisk.mkdir(parents=True)
    with CheckpointManager(
        ramdisk,
        root / "bucket",
        mesh,
        make_state(mesh, 0),
        options=OPTIONS,
        persistent_non_replicated_directory=datasets,
    ) as manager:
        for step in (10, 12):
            state = ocp.args.PyTreeSave(make_state(mesh, step))
            manager.save(step, ocp.args.Composite(state=state, dataset=PaddedSave(100 * step + process)))
            manager.wait_until_finished()
            manager.check_for_errors()
        wanted = ocp.args.Composite(dataset=PaddedRestore())
        told: dict[str, Any] = {}
        try:
            manager.restore(12, wanted)
        except EmergencyCheckpointError as error:
            told["error"] = str(error)
        told["latest"] = manager.latest_step()
        return {**told, "dataset": manager.restore(10, wanted).dataset}


def restore_all(manager: CheckpointManager, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    wanted = ocp.args.Composite(
        about=ocp.args.JsonRestore(), position=PerProcessRestore(), dataset=ocp.args.JsonRestore()
    )
    found = manager.restore(None, wanted)
    assert manager.last_restore is not None
    check_state(found.state, mesh, manager.last_restore.step)
    return {
        "step": manager.last_restore.step,
        "source": manager.last_restore.source,
        "about": dict(found.about),
        "position": found.position,
        "dataset": dict(found.dataset),
    }
