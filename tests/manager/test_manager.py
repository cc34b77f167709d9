"""The manager in one process: Orbax's calling form, every kind of leaf, and what a user may do wrong."""

from __future__ import annotations

import collections
import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh
from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax_emergency

from emergency_ckpt import (
    CheckpointManager,
    CheckpointManagerOptions,
    Config,
    LocalCheckpointOptions,
)
from emergency_ckpt.core.copies import Survivable
from emergency_ckpt.errors import (
    ConfigError,
    ExtrasError,
    LocalDirectoryError,
    NoRestorableStepError,
    StateMismatchError,
    UnsupportedStateError,
)
from tests.manager.states import OPTIONS, Opener, assert_same, flags, make_state, save_all


def test_every_leaf_comes_back_from_the_ramdisk(opened: Opener, mesh: Mesh) -> None:
    assert save_all(opened(), mesh, range(1, 5)) == [1, 2, 4]
    restored = opened().restore_or_init(lambda: pytest.fail("there is a step to restore"))
    assert restored.step == 4
    assert restored.source == "own slot"
    assert_same(restored.state, make_state(mesh, 4))


def test_every_leaf_comes_back_from_the_persistent_tier(opened: Opener, mesh: Mesh, ramdisk: Path) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 7))
    for manifest in ramdisk.rglob("*.manifest"):
        manifest.unlink()
    manager = opened()
    state = manager.restore(5)["state"]
    assert_same(state, make_state(mesh, 5))
    assert manager.last_restore is not None
    assert manager.last_restore.source == "persistent"


def test_a_restored_state_does_not_change_when_its_slot_is_reused(opened: Opener, mesh: Mesh) -> None:
    save_all(opened(), mesh, range(1, 5))
    manager = opened()
    state = manager.restore(None)["state"]
    save_all(manager, mesh, range(5, 15))
    assert_same(state, make_state(mesh, 4))


def test_a_donated_state_is_saved_as_it_was(opened: Opener, mesh: Mesh) -> None:
    manager = opened({"w": make_state(mesh, 0).params["w"]})
    double = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    state, right = {"w": make_state(mesh, 3).params["w"]}, {}
    for step in range(1, 9):
        state = double(state)
        right[step] = np.asarray(state["w"]).copy()
        manager.save(step, state)
    manager.wait_until_finished()
    manager = opened({"w": make_state(mesh, 0).params["w"]})
    restored = manager.restore_or_init(dict)
    np.testing.assert_array_equal(restored.state["w"], right[restored.step or 0])
    assert restored.step == 8


def test_orbax_calling_form(opened: Opener, mesh: Mesh) -> None:
    manager = opened()
    assert isinstance(manager, orbax_emergency.CheckpointManager)
    assert ocp.AbstractCheckpointManager in CheckpointManager.__mro__
    state = make_state(mesh, 1)
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(item=state))
    assert manager.should_save(1)
    assert manager.save(1, args=args, force=False)
    assert not manager.should_save(1)
    assert not manager.save(1, args=args), "a step is saved once"
    assert not manager.reached_preemption(1)
    manager.wait_until_finished()
    assert manager.latest_step() == 1
    assert list(manager.all_steps()) == [1]
    restored = manager.restore(1, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(item=state)))
    assert_same(restored.state, state)
    assert manager.global_mesh is mesh
    assert manager.in_primary_slice


@pytest.mark.parametrize("saved", [ocp.args.StandardSave, lambda state: state])
def test_other_forms_of_the_state_argument(opened: Opener, mesh: Mesh, saved: Callable[[Any], Any]) -> None:
    manager = opened()
    manager.save(1, saved(make_state(mesh, 1)))
    assert_same(manager.restore(None)["state"], make_state(mesh, 1))


@pytest.mark.parametrize("counted_in", [np.int64, jnp.int32])
def test_steps_may_be_counted_in_any_integers(
    opened: Opener, mesh: Mesh, counted_in: Callable[[int], Any]
) -> None:
    manager = opened()
    for step in (2, 5):
        assert manager.should_save(counted_in(step))
        assert manager.save(counted_in(step), make_state(mesh, step), metrics={"loss": step})
    manager.wait_until_finished()
    manager.check_for_errors()
    assert manager.metrics(counted_in(5)) == {"loss": 5}
    assert_same(opened().restore(counted_in(5)).state, make_state(mesh, 5))


@pytest.mark.parametrize("step", [2.0, "2", -2])
def test_what_is_no_step_number_is_refused(opened: Opener, mesh: Mesh, step: Any) -> None:
    manager = opened()
    with pytest.raises(ConfigError, match=r"the step is .*; expected an integer, 0 or more"):
        manager.save(step, make_state(mesh, 2))
    with pytest.raises(ConfigError, match=r"the step is "):
        manager.restore(step)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"save_args": {"w": ocp.SaveArgs(dtype=jnp.bfloat16)}}, r"save \['w'\] as bfloat16"),
        ({"custom_metadata": {"a": 1}}, r"PyTreeSave\(custom_metadata=…\) is not supported"),
    ],
)
def test_a_state_is_not_saved_as_something_else_without_a_word(
    opened: Opener, mesh: Mesh, changed: dict[str, Any], said: str
) -> None:
    state = {"w": make_state(mesh, 2).params["w"]}
    manager = opened(state)
    with pytest.raises(UnsupportedStateError, match=said):
        manager.save(2, ocp.args.Composite(state=ocp.args.PyTreeSave(state, **changed)))
    same = ocp.args.PyTreeSave(
        state,
        save_args={"w": ocp.SaveArgs(dtype=jnp.float32, chunk_byte_size=64)},
        ocdbt_target_data_file_size=64,
    )
    assert manager.save(5, ocp.args.Composite(state=same))


def test_the_state_that_a_manager_was_made_with_is_not_held(opened: Opener, mesh: Mesh) -> None:
    state = make_state(mesh, 0)
    held = weakref.ref(state.params["w"])
    manager = opened(state)
    del state
    gc.collect()
    assert held() is None
    assert manager.latest_step() is None


def test_what_cannot_be_saved_is_refused_by_name(opened: Opener, mesh: Mesh) -> None:
    manager = opened()
    with pytest.raises(UnsupportedStateError, match="'metrics'"):
        manager.save(1, ocp.args.Composite(state=ocp.args.PyTreeSave({}), metrics=ocp.args.JsonSave({})))
    state = make_state(mesh, 2)
    with pytest.raises(StateMismatchError, match=r"params\.w"):
        manager.save(2, state.replace(params={**state.params, "w": jnp.zeros((2, 2))}))
    with pytest.raises(ExtrasError, match="cannot be saved"):
        manager.save(4, make_state(mesh, 4), extras={"data": object()})
    manager.wait_until_finished()
    assert manager.save(6, make_state(mesh, 6)), "a refused save does not stop the next one"
    manager.wait_until_finished()
    assert manager.latest_complete_step() == 6


def test_options_that_are_not_supported_are_refused_by_name(mesh: Mesh, ramdisk: Path, tmp_path: Path) -> None:
    options = CheckpointManagerOptions(local=LocalCheckpointOptions(debug_use_full_global_mesh=True))
    with pytest.raises(ConfigError, match=r"local\.debug_use_full_global_mesh"):
        CheckpointManager(ramdisk, tmp_path, mesh, {"w": jnp.zeros(3)}, options=options)


def test_a_missing_ramdisk_directory_is_an_error_at_start(mesh: Mesh, tmp_path: Path) -> None:
    with pytest.raises(LocalDirectoryError, match="does not exist"):
        CheckpointManager(tmp_path / "absent", tmp_path / "bucket", mesh, {"w": jnp.zeros(3)})


def test_plain_orbax_restores_what_was_saved(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    state = {"w": make_state(mesh, 3).params, "key": make_state(mesh, 3).key, "n": 7, "s": "text"}
    manager = opened(state)
    manager.save(5, state, custom_metadata={"who": "me"}, metrics={"loss": 0.5})
    manager.wait_until_finished()
    manager.check_for_errors()
    with ocp.CheckpointManager(tmp_path / "bucket") as plain:
        assert plain.all_steps() == [5]
        assert plain.metadata(5).custom_metadata == {"who": "me"}
    found = ocp.PyTreeCheckpointer().restore(
        tmp_path / "bucket/5/default",
        ocp.args.PyTreeRestore(state, restore_args=ocp.checkpoint_utils.construct_restore_args(state)),
    )
    assert_same(found["w"], state["w"])
    assert found["n"] == 7
    assert found["s"] == "text"


def test_a_directory_that_plain_orbax_began_is_continued(mesh: Mesh, ramdisk: Path, tmp_path: Path) -> None:
    state = {"params": make_state(mesh, 3).params}
    with ocp.CheckpointManager(tmp_path / "bucket", item_names=("state",)) as plain:
        plain.save(40, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    with CheckpointManager(ramdisk, tmp_path / "bucket", mesh, state, options=OPTIONS) as manager:
        restored = manager.restore_or_init(dict)
        assert restored.step == 40
        assert_same(restored.state, state)
        manager.save(45, state)
        manager.wait_until_finished()
        assert list(manager.all_steps()) == [40, 45]


def test_metrics_and_metadata_are_kept_with_the_step(opened: Opener, mesh: Mesh, ramdisk: Path) -> None:
    manager = opened()
    manager.save(5, make_state(mesh, 5), metrics={"loss": 0.25}, custom_metadata={"stage": "sft"})
    manager.wait_until_finished()
    for _ in ("from the ramdisk", "from the persistent tier"):
        assert manager.metrics(5) == {"loss": 0.25}
        assert manager.metadata(5).custom_metadata == {"stage": "sft"}
        assert manager.item_metadata(5).state.params["w"].shape == (8, 4)
        manager.close()
        for path in ramdisk.rglob("*.manifest"):
            path.unlink()
        manager = opened()
    with pytest.raises(NoRestorableStepError, match="step 9 is on no tier"):
        manager.metrics(9)


def test_a_deleted_step_is_gone_on_every_tier(opened: Opener, mesh: Mesh) -> None:
    local = LocalCheckpointOptions(save_interval_steps=2, max_to_keep=5)
    options = dataclasses.replace(OPTIONS, local=local)
    manager = opened(options=options)
    save_all(manager, mesh, range(1, 7))
    assert list(manager.all_steps()) == [1, 2, 4, 5, 6]
    manager.delete(5)
    manager.delete(6)
    assert list(manager.all_steps()) == [1, 2, 4]
    with pytest.raises(NoRestorableStepError):
        manager.delete(5)
    assert opened(options=options).restore_or_init(dict).step == 4


def test_extras_come_back_into_iterators_and_as_data(opened: Opener, mesh: Mesh) -> None:
    class Iterator:
        def __init__(self) -> None:
            self.position = 0

        def get_state(self) -> dict[str, Any]:
            return {"position": self.position, "raw": b"\x00\xff"}

        def set_state(self, state: dict[str, Any]) -> None:
            assert state["raw"] == b"\x00\xff"
            self.position = state["position"]

    source = Iterator()
    source.position = 11
    manager = opened()
    rng = np.arange(4, dtype=np.uint64)
    manager.save(2, make_state(mesh, 2), extras={"data": source, "rng": rng, "stage": ("a", 1, None)})
    manager.wait_until_finished()
    target = Iterator()
    restored = opened().restore_or_init(dict, extras={"data": target})
    assert target.position == 11
    np.testing.assert_array_equal(restored.extras["rng"], rng)
    assert restored.extras["stage"] == ["a", 1, None]
    with pytest.raises(ExtrasError, match="'other' are wanted"):
        opened().restore_or_init(dict, extras={"other": target})


def test_too_large_extras_are_refused_with_the_largest_named(opened: Opener, mesh: Mesh) -> None:
    with pytest.raises(ExtrasError, match=r"at most 1048576 are allowed; the largest is 'big'"):
        opened().save(2, make_state(mesh, 2), extras={"small": 1, "big": "x" * 2**20})


def test_finish_drains_the_step_that_is_on_the_ramdisk_already(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 5))
    manager.finish(4, make_state(mesh, 4))
    manager.check_for_errors()
    assert (tmp_path / "bucket/4/default").is_dir()


def test_a_restart_without_restore_goes_on_from_the_newest_step(opened: Opener, mesh: Mesh) -> None:
    save_all(opened(), mesh, range(1, 5))
    manager = opened()
    assert not manager.save(3, make_state(mesh, 3)), "older than what can be restored"
    assert save_all(manager, mesh, range(5, 9)) == [5, 6, 8]
    assert opened().latest_step() == 8


def test_a_first_step_is_expected_from_where_training_begins_and_never_of_one_that_evaluates(
    opened: Opener, mesh: Mesh
) -> None:
    trainer = opened()
    assert trainer._progress.said().phase == "paused", "it may be there for something else"
    trainer.restore_or_init(lambda: make_state(mesh, 0))
    assert trainer._progress.said().phase == "training"
    save_all(trainer, mesh, range(1, 5))
    evaluator = opened()
    for _ in range(2):
        evaluator.restore(4)
        assert evaluator._progress.said().phase == "paused"
    evaluator.save(5, make_state(mesh, 5))  # It trains after all.
    evaluator.restore(4)
    assert evaluator._progress.said().phase == "training"


def test_metrics_count_what_happened(opened: Opener, mesh: Mesh) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 7))
    found = collections.Counter(manager.metrics_snapshot())
    assert (found["saves_complete"], found["saves_skipped"], found["drains_committed"]) == (5, 0, 2)


def test_checkpointing_switched_off_needs_no_directories(mesh: Mesh) -> None:
    config = Config(enable_checkpointing=False, preemption_exit_code=7)
    manager = CheckpointManager.from_config(config, mesh, {})
    assert manager.restore_or_init(lambda: "fresh").state == "fresh"
    assert not manager.save(1, {})
    assert (manager.exit_code, manager.should_exit, manager.notices) == (7, False, ())
    assert manager.survivable_losses() == Survivable(0, 0, "all of it")
    manager.finish(1, {})
    manager.close()


@pytest.mark.parametrize("writer", ["ours", "orbax"])
def test_a_run_starts_from_the_full_state_of_another(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, writer: str
) -> None:
    state = {"params": make_state(mesh, 3).params, "step": make_state(mesh, 3).step, "n": 3}
    path = tmp_path / "other/3"
    if writer == "orbax":
        with ocp.StandardCheckpointer() as plain:
            plain.save(path, state)
    else:
        with CheckpointManager(None, tmp_path / "other", mesh, state, options=OPTIONS) as manager:
            manager.save(3, state, force=True)
    config = flags(ramdisk, tmp_path, load_full_state_path=str(path))
    with CheckpointManager.from_config(config, mesh, state) as manager:
        restored = manager.restore_or_init(lambda: pytest.fail("the other run's state is wanted"))
        assert restored.step is None
        assert_same(restored.state, state)
        assert restored.source == str(path)


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_starts_from_the_parameters_of_another(
    mesh: Mesh, ramdisk: Path, tmp_path: Path, whole: bool
) -> None:
    saved = {"params": make_state(mesh, 3).params, "step": make_state(mesh, 3).step}
    with ocp.StandardCheckpointer() as plain:
        plain.save(tmp_path / "other", saved if whole else saved["params"])
    fresh = {"params": make_state(mesh, 9).params, "step": make_state(mesh, 9).step}
    config = flags(ramdisk, tmp_path, load_parameters_path=str(tmp_path / "other"))
    with CheckpointManager.from_config(config, mesh, fresh) as manager:
        restored = manager.restore_or_init(lambda: fresh)
        assert_same(restored.state, {"params": saved["params"], "step": fresh["step"]})


def test_a_state_of_another_shape_names_every_leaf_that_differs(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    state = {"a": jnp.zeros((4,)), "b": jnp.zeros((3,)), "c": jnp.zeros((2,))}
    with CheckpointManager(ramdisk, tmp_path / "bucket", mesh, state, options=OPTIONS) as manager:
        manager.save(5, state)
    changed = {"a": jnp.zeros((5,)), "b": jnp.zeros((3,), jnp.int32), "c": jnp.zeros((2,))}
    with (
        CheckpointManager(ramdisk, tmp_path / "bucket", mesh, changed, options=OPTIONS) as manager,
        pytest.raises(StateMismatchError) as caught,
    ):
        manager.restore(None)
    assert "a: saved float32[4], wanted float32[5]" in str(caught.value)
    assert "b: saved float32[3], wanted int32[3]" in str(caught.value)
    assert "c:" not in str(caught.value)


def test_the_newest_step_is_made_persistent_on_request_and_once(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    manager = opened()
    manager.persist_newest()  # There is none yet.
    save_all(manager, mesh, range(1, 5))
    assert [path.name for path in (tmp_path / "bucket").iterdir() if path.name.isdigit()] == ["1"]
    manager.persist_newest()
    committed = manager.metrics_snapshot()["drains_committed"]
    assert sorted(path.name for path in (tmp_path / "bucket").iterdir() if path.name.isdigit()) == ["1", "4"]
    manager.persist_newest()
    assert manager.metrics_snapshot()["drains_committed"] == committed
    assert_same(manager.restore(4).state, make_state(mesh, 4))
