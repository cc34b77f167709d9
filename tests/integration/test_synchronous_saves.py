"""Synchronous saves of two processes: a step is committed, or an error everywhere, when the call returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from emergency_ckpt import CheckpointManager
from emergency_ckpt.agent import draining
from emergency_ckpt.errors import EmergencyCheckpointError, ExtrasError, PersistentStoreError
from tests.integration.processes import run_job
from tests.integration.training_job import check_state, make_config, make_mesh, make_state

FLAGS = {
    "async_checkpointing": False,
    "local_checkpoint_period": 2,
    "checkpoint_period": 4,
    "checkpoint_agent": "off",
}
FAILS_ON = 1


def save_synchronously(root: str) -> dict[str, Any]:
    """Tells what each call of `save` gave, and what was committed when it returned."""
    mesh, process = make_mesh(2), jax.process_index()
    told: dict[str, Any] = {}
    real = draining.write_part

    def fail(*_: Any, **__: Any) -> Any:
        raise PersistentStoreError("no route to the store")

    with CheckpointManager.from_config(make_config(root, FLAGS), mesh, make_state(mesh, 0)) as manager:

        def save(name: str, step: int, **extras: Any) -> None:
            try:
                told[name] = manager.save(step, make_state(mesh, step), **extras)
            except EmergencyCheckpointError as error:
                told[name] = f"{type(error).__name__}: {error}"
            steps = [path.name for path in manager.directory.iterdir() if path.name.isdigit()]
            told[f"{name}, committed"] = str(step) in steps

        save("first", 4)
        save("local", 6)
        if process == FAILS_ON:
            draining.write_part = fail
        save("failing", 8)
        draining.write_part = real
        save("repeated", 8)
        save("refused by one", 12, extras={"data": object() if process == FAILS_ON else 1})
        save("last", 16)
        manager.check_for_errors()
    with CheckpointManager.from_config(make_config(root, FLAGS), mesh, make_state(mesh, 0)) as manager:
        check_state(manager.restore(None)["state"], mesh, 16)
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root: Path = tmp_path_factory.mktemp("synchronous")
    return run_job(save_synchronously, 2, str(root))


def test_a_step_is_where_it_is_due_when_the_call_returns(told: list[dict[str, Any]]) -> None:
    for process in told:
        assert [process[name] for name in ("first", "local", "last")] == [True] * 3
        assert process["first, committed"]
        assert not process["local, committed"]
        assert process["last, committed"]


def test_a_commit_that_fails_on_one_process_is_an_error_on_all_and_they_stay_in_step(
    told: list[dict[str, Any]],
) -> None:
    for process in told:
        assert process["failing"].startswith("PersistentStoreError: step 8 ")
        assert "no route to the store" in process["failing"]
        assert not process["failing, committed"]
        assert process["repeated"] is True
        assert process["repeated, committed"]


def test_a_save_that_one_process_refuses_is_true_on_none(told: list[dict[str, Any]]) -> None:
    assert told[0]["refused by one"] is False
    assert told[FAILS_ON]["refused by one"].startswith(ExtrasError.__name__)
    assert not any(process["refused by one, committed"] for process in told)
