"""A ramdisk that fails on one host: the save is abandoned on all, older steps stay, and the job goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emergency_ckpt import CheckpointManager
from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from emergency_ckpt.errors import LocalDirectoryError
from tests.integration.processes import run_job
from tests.integration.training_job import check_state, make_config, make_mesh, make_state

FLAGS = {"local_checkpoint_period": 1, "checkpoint_period": 1000}


def fail_on_process_one(root: str) -> dict[str, Any]:
    """Process 1 loses its ramdisk in one way after the other; tells what both saw."""
    import jax

    mesh, process = make_mesh(2), jax.process_index()
    config = make_config(root, FLAGS)
    ramdisk = Path(config.local_checkpoint_directory)
    aside = ramdisk.with_name("aside")
    damage = {
        4: lambda: remove_tree(ramdisk / "emergency_ckpt"),
        5: lambda: ramdisk.rename(aside),
        7: lambda: aside.rename(ramdisk),
    }
    told: dict[str, Any] = {"saved": [], "complete": [], "errors": {}}
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        for step in range(1, 9):
            if process == 1 and step in damage:
                damage[step]()
            if manager.save(step, make_state(mesh, step)):
                told["saved"].append(step)
            try:
                manager.wait_until_finished()
            except LocalDirectoryError as error:
                told["errors"][str(step)] = str(error)
            told["complete"].append(manager.latest_complete_step())
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        restored = manager.restore_or_init(lambda: make_state(mesh, 0))
        check_state(restored.state, mesh, 8)
        told["restored"] = [restored.step, restored.source]
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_job(fail_on_process_one, 2, str(tmp_path_factory.mktemp("faults")))


def test_an_emptied_directory_costs_no_save(told: list[dict[str, Any]]) -> None:
    assert all(4 in process["saved"] for process in told)
    assert [process["complete"][3] for process in told] == [4, 4]


def test_a_ramdisk_that_is_gone_abandons_the_save_on_all_processes_and_the_job_goes_on(
    told: list[dict[str, Any]],
) -> None:
    assert [process["complete"] for process in told] == [[1, 2, 3, 4, 4, 4, 7, 8]] * 2
    assert told[0]["saved"] == [1, 2, 3, 4, 5, 6, 7, 8], "where the ramdisk is there, the step was sealed"
    assert told[1]["saved"] == [1, 2, 3, 4, 7, 8]


def test_the_process_at_fault_says_so_and_the_others_are_not_blamed(told: list[dict[str, Any]]) -> None:
    assert told[0]["errors"] == {}
    assert sorted(told[1]["errors"]) == ["5", "6"]
    assert all("does not exist. Mount the ramdisk there" in error for error in told[1]["errors"].values())


def test_the_newest_complete_step_comes_back(told: list[dict[str, Any]]) -> None:
    assert [process["restored"] for process in told] == [[8, "own slot"]] * 2
