"""An older step that is restored on request: the newer ones stay until the run goes on from the older one."""

from __future__ import annotations

from pathlib import Path

import orbax.checkpoint as ocp
from jax.sharding import Mesh

from emergency_ckpt import CheckpointManagerOptions, LocalCheckpointOptions, PersistentCheckpointOptions
from tests.manager.states import Opener, assert_same, make_state, save_all

EVERY_STEP = CheckpointManagerOptions(
    local=LocalCheckpointOptions(save_interval_steps=1, max_to_keep=1),
    persistent=PersistentCheckpointOptions(save_interval_steps=1),
)


def committed(tmp_path: Path) -> list[int]:
    return sorted(int(path.name) for path in (tmp_path / "bucket").iterdir() if path.name.isdigit())


def test_every_step_can_be_looked_at_one_after_the_other(opened: Opener, mesh: Mesh) -> None:
    save_all(opened(options=EVERY_STEP), mesh, range(1, 5))
    manager = opened(options=EVERY_STEP)
    for step in (1, 3, 2, 4, 1):
        assert_same(manager.restore(step)["state"], make_state(mesh, step))
        assert (manager.latest_step(), list(manager.all_steps())) == (4, [1, 2, 3, 4])


def test_the_next_save_makes_the_newer_steps_void(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    save_all(opened(options=EVERY_STEP), mesh, range(1, 6))
    manager = opened(options=EVERY_STEP)
    manager.restore(2)
    assert manager.should_save(3), "training goes on from step 2"
    assert manager.save(3, make_state(mesh, 3))
    assert manager.latest_step() in (2, 3)
    manager.wait_until_finished()
    assert (manager.latest_step(), list(manager.all_steps())) == (3, [1, 2, 3])
    assert committed(tmp_path) == [1, 2, 3]
    assert opened(options=EVERY_STEP).restore_or_init(dict).step == 3


def test_a_life_that_saves_nothing_after_it_has_given_nothing_up(opened: Opener, mesh: Mesh) -> None:
    save_all(opened(options=EVERY_STEP), mesh, range(1, 6))
    opened(options=EVERY_STEP).restore(2)
    assert_same(opened(options=EVERY_STEP).restore_or_init(dict).state, make_state(mesh, 5))


def test_a_step_that_is_finished_after_it_makes_them_void_too(opened: Opener, mesh: Mesh) -> None:
    save_all(opened(options=EVERY_STEP), mesh, range(1, 6))
    manager = opened(options=EVERY_STEP)
    manager.restore(2)
    manager.finish(3, make_state(mesh, 3))
    assert list(manager.all_steps()) == [1, 2, 3]


def test_it_may_be_chosen_in_the_middle_of_a_run_and_the_newest_afterwards(opened: Opener, mesh: Mesh) -> None:
    manager = opened(options=EVERY_STEP)
    save_all(manager, mesh, range(1, 6))
    assert_same(manager.restore(3)["state"], make_state(mesh, 3))
    manager.reload()
    assert manager.latest_step() == 5
    assert_same(manager.restore(None)["state"], make_state(mesh, 5))
    assert save_all(manager, mesh, range(6, 8)) == [6, 7]


def test_a_newer_step_can_be_deleted_before_the_run_goes_on(opened: Opener, mesh: Mesh) -> None:
    save_all(opened(options=EVERY_STEP), mesh, range(1, 5))
    manager = opened(options=EVERY_STEP)
    manager.restore(2)
    manager.delete(4)
    assert (manager.latest_step(), list(manager.all_steps())) == (3, [1, 2, 3])
    assert save_all(manager, mesh, range(3, 5)) == [3, 4]
    assert_same(opened(options=EVERY_STEP).restore(3)["state"], make_state(mesh, 3))


def test_the_datasets_of_the_newer_steps_stay_as_long_as_they_do(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    def save(step: int) -> None:
        large = ocp.args.JsonSave({"mark": step, "padding": "x" * 2**20})
        manager.save(step, ocp.args.Composite(state=ocp.args.PyTreeSave(make_state(mesh, step)), dataset=large))
        manager.wait_until_finished()

    how = {"options": EVERY_STEP, "persistent_non_replicated_directory": tmp_path / "datasets"}
    wanted = ocp.args.Composite(dataset=ocp.args.JsonRestore())
    manager = opened(**how)
    for step in range(1, 4):
        save(step)
    manager = opened(**how)
    for step in (1, 3, 2):
        assert manager.restore(step, wanted).dataset["mark"] == step
    manager.restore(1, wanted)
    save(2)
    assert sorted(path.name for path in (tmp_path / "datasets").iterdir()) == ["1", "2"]
