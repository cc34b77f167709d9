"""The commands that show and copy runs: training state from both tiers, and a job that goes on elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from emergency_ckpt import CheckpointManager
from emergency_ckpt.cli.main import main
from tests.manager.states import OPTIONS, assert_same, make_state


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What `emergency-ckpt show` says; its table is the same story, and must not fail."""
    assert main(["show", *words]) == 0
    capsys.readouterr()
    assert main(["show", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_training_state_is_shown_from_both_tiers_and_the_run_goes_on_at_another_place(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with CheckpointManager(ramdisk, first, mesh, make_state(mesh, 0), options=OPTIONS) as manager:
        for step in (5, 8, 10, 12):
            custom = {"stage": "sft", "epoch": step // 4, "step": step}
            extras = {"data": {"row": step}}
            assert manager.save(
                step, make_state(mesh, step), metrics={"loss": 1 / step}, custom_metadata=custom, extras=extras
            )
            manager.wait_until_finished()
        manager.check_for_errors()
    said = shown(capsys, str(first))
    assert [step["step"] for step in said["steps"]] == [5, 10]
    for step in said["steps"]:
        assert (step["generation"], step["void"], step["processes"], step["item"]) == (1, False, 1, "default")
        assert step["custom_metadata"] == {"stage": "sft", "epoch": step["step"] // 4, "step": step["step"]}
        assert step["metrics"] == {"loss": 1 / step["step"]}
        assert step["bytes"] > 0
        assert step["committed"] > step["started"] > 0
    (latest,) = shown(capsys, str(first), "latest")["steps"]
    assert (latest["step"], latest["extras"], latest["arrays"] > 5) == (10, ["data"], True)
    slot = shown(capsys, str(ramdisk))["slots"][-1]
    assert (slot["step"], slot["generation"], slot["complete"], slot["missing"]) == (12, 1, True, 0)
    assert (slot["custom_metadata"]["epoch"], slot["extras"]) == (3, ["data"])
    assert main(["show", str(first), "7"]) == 1
    assert "has no step 7; it has [5, 10]" in capsys.readouterr().err
    assert main(["show", str(tmp_path)]) == 1
    assert "Give the directory whose entries are the steps" in capsys.readouterr().err
    assert main(["sync", str(ramdisk), str(second)]) == 1
    assert "is a ramdisk directory" in capsys.readouterr().err

    assert main(["restore-local", str(first), str(second), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["copied"] == [10, 5]
    wanted = ocp.args.Composite(default=ocp.args.PyTreeRestore(make_state(mesh, 0)))
    with ocp.CheckpointManager(second, item_names=("default",)) as plain:
        assert plain.all_steps() == [5, 10]
        assert plain.restore(10, args=wanted)["default"].note == "step 10"
    extras = {"data": {"row": 0}}
    with CheckpointManager(None, second, mesh, make_state(mesh, 0), options=OPTIONS) as manager:
        restored = manager.restore_or_init(dict, extras=extras)
        assert (restored.step, restored.extras) == (10, {"data": {"row": 10}})
        assert_same(restored.state, make_state(mesh, 10))
        assert manager.save(15, make_state(mesh, 15), extras=extras)
        manager.wait_until_finished()
    assert main(["sync", str(second), str(first)]) == 0
    assert main(["sync", str(first), str(first / "10")]) == 2
    assert [step["generation"] for step in shown(capsys, str(first))["steps"]] == [1, 1, 2]


def test_what_plain_orbax_wrote_is_shown_and_copied(
    mesh: Mesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    state = {"w": make_state(mesh, 7).params["w"]}
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"])  # Else it keeps none.
    with ocp.CheckpointManager(first, options=options, metadata={"model": "small"}) as plain:
        plain.save(7, args=ocp.args.StandardSave(state), metrics={"loss": 0.5}, custom_metadata={"epoch": 1})
    said = shown(capsys, str(first))
    assert (said["run"], said["metadata"]) == ("", {"model": "small"})
    (step,) = said["steps"]
    assert (step["generation"], step["metrics"], step["custom_metadata"]) == (0, {"loss": 0.5}, {"epoch": 1})
    assert main(["sync", str(first), str(second)]) == 0
    assert main(["sync", str(first), str(second), "--verify"]) == 0
    assert "0 steps copied (-), 1 were there" in capsys.readouterr().err
    with ocp.CheckpointManager(second) as plain:
        assert_same(plain.restore(7, args=ocp.args.StandardRestore(state)), state)
        assert dict(plain.metadata().custom_metadata) == {"model": "small"}
