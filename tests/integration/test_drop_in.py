"""One train program, written against Orbax's documented interface, with Orbax's emergency manager and ours.

Two processes are two slices. The program of both classes is the same but for the class; what it saves, lists
and restores is the same too. The same job tells the stories of decisions that only one process can make.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as orbax_policies
from orbax.checkpoint._src.multihost import multihost
from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax_emergency

import emergency_ckpt
from emergency_ckpt.errors import PeerFailedError
from tests.integration.processes import run_job
from tests.integration.training_job import check_state, make_mesh, make_state

CLASSES = {"orbax": orbax_emergency.CheckpointManager, "ours": emergency_ckpt.CheckpointManager}

# Options by name: the intervals of Orbax, and policies instead of them.
OPTIONS = {
    "intervals": orbax_emergency.CheckpointManagerOptions(
        local=orbax_emergency.LocalCheckpointOptions(save_interval_steps=2, max_to_keep=1),
        persistent=orbax_emergency.PersistentCheckpointOptions(save_interval_steps=5, max_to_keep=2),
    ),
    "policies": orbax_emergency.CheckpointManagerOptions(
        local=orbax_emergency.LocalCheckpointOptions(
            save_decision_policy=orbax_policies.AnySavePolicy(
                [orbax_policies.FixedIntervalPolicy(3), orbax_policies.SpecificStepsPolicy([7])]
            ),
            preservation_policy=orbax_policies.LatestN(1),
        ),
        persistent=orbax_emergency.PersistentCheckpointOptions(
            should_save_fn=lambda step, latest: latest is None or step - latest >= 4,
            preservation_policy=orbax_policies.AnyPreservationPolicy(
                [orbax_policies.LatestN(1), orbax_policies.EveryNSteps(5)]
            ),
        ),
    ),
}
STEPS = 12


def train_with(root: str, class_name: str, options_name: str) -> dict[str, Any]:
    """Trains, comes back from the ramdisks, trains on, loses all ramdisks, and comes back once more."""
    mesh = make_mesh(2)
    local, persistent = Path(root) / f"ramdisk_{jax.process_index()}", Path(root) / "bucket"
    local.mkdir(parents=True, exist_ok=True)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(mesh, 0)
    )

    def open_manager(local_directory: Path) -> Any:
        return CLASSES[class_name](
            local_directory=local_directory,
            persistent_directory=persistent,
            global_mesh=mesh,
            abstract_state=abstract,
            options=OPTIONS[options_name],
        )

    told: dict[str, Any] = {}
    with open_manager(local) as manager:
        told["latest at first"] = manager.latest_step()
        told["saved"] = save_steps(manager, mesh, range(1, STEPS + 1))
        told["latest"] = int(manager.latest_step())
        told["forced"] = bool(manager.save(STEPS + 1, args=args_of(make_state(mesh, STEPS + 1)), force=True))
    multihost_utils.sync_global_devices("closed")  # Orbax's class waits for the process's own saves only.
    told["committed"] = sorted(int(p.name) for p in persistent.iterdir() if p.name.isdigit())
    with open_manager(local) as manager:
        told["latest after a restart"] = step = int(manager.latest_step())
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(item=abstract)))
        check_state(state_in(restored), mesh, step)
        told["saved after a restart"] = save_steps(manager, mesh, range(step + 1, step + 7))
    lost = Path(root) / f"fresh_ramdisk_{jax.process_index()}"
    lost.mkdir()
    with open_manager(lost) as manager:
        told["latest without ramdisks"] = step = int(manager.latest_step())
        check_state(state_in(manager.restore(None)), mesh, step)
    return told


def save_steps(manager: Any, mesh: Any, steps: range) -> list[int]:
    """The steps of which `save` says that it saved them, each one waited for."""
    saved = []
    for step in steps:
        due = manager.should_save(step)
        if manager.save(step, args=args_of(make_state(mesh, step))):
            saved.append(step)
            manager.wait_until_finished()
        assert due == (step in saved), "should_save() foretells what save() does"
    manager.check_for_errors()
    return saved


def args_of(state: Any) -> ocp.args.Composite:
    return ocp.args.Composite(state=ocp.args.PyTreeSave(item=state))


def state_in(restored: Any) -> Any:
    """Orbax's class returns the state itself, or under its item's name, depending on the slices."""
    return restored.get("state", restored)


def tell_stories(root: str) -> dict[str, Any]:
    # Orbax's class needs these three.
    flags.FLAGS.mark_as_parsed()
    multihost.initialize_runtime_to_distributed_ids()
    multihost.initialize_distributed_to_device_ids()
    told: dict[str, Any] = {
        f"{options_name}/{class_name}": train_with(
            f"{root}/{options_name}/{class_name}", class_name, options_name
        )
        for options_name, class_name in itertools.product(OPTIONS, CLASSES)
    }
    told["decided by one"] = decide_by_one(f"{root}/decided")
    return told


def decide_by_one(root: str) -> dict[str, Any]:
    """Policies that would decide differently on every process, one that fails, and one that waits for none."""
    mesh, process = make_mesh(2), jax.process_index()
    local = Path(root) / f"ramdisk_{process}"
    local.mkdir(parents=True)
    chance = np.random.default_rng(process)
    asked: list[int] = []
    commits_heard: list[int] = []

    def by_chance(step: int, latest: int | None) -> bool:
        asked.append(step)
        if step == 40:
            raise ZeroDivisionError("by the policy")
        return bool(chance.random() < 0.5)

    options = emergency_ckpt.CheckpointManagerOptions(
        local=emergency_ckpt.LocalCheckpointOptions(should_save_fn=by_chance),
        persistent=emergency_ckpt.PersistentCheckpointOptions(
            save_decision_policy=orbax_policies.AnySavePolicy(
                [
                    orbax_policies.SpecificStepsPolicy([30]),
                    orbax_policies.ContinuousCheckpointingPolicy(minimum_interval_secs=3600),
                ]
            )
        ),
        async_options=ocp.AsyncOptions(post_finalization_callback=lambda: commits_heard.append(1)),
    )
    state = make_state(mesh, 0)
    with emergency_ckpt.CheckpointManager(local, f"{root}/bucket", mesh, state, options=options) as manager:
        saved = []
        for step in range(1, 40):
            due = manager.should_save(step)
            assert due == manager.save(step, make_state(mesh, step))
            saved += [step] * due
            manager.wait_until_finished()
        try:
            manager.save(40, make_state(mesh, 40))
        except (ZeroDivisionError, PeerFailedError) as error:
            failure = f"{type(error).__name__}: {error}"
        manager.check_for_errors()
        complete = manager.latest_complete_step()
    committed = sorted(int(p.name) for p in Path(root, "bucket").iterdir() if p.name.isdigit())
    return {
        "saved": saved,
        "asked": asked,
        "failure": failure,
        "complete": complete,
        "committed": committed,
        "commits heard": len(commits_heard),
    }


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Per process what it says."""
    return run_job(tell_stories, 2, str(tmp_path_factory.mktemp("drop_in")))


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("options_name", OPTIONS)
def test_a_program_for_orbax_saves_and_restores_the_same(
    told: list[dict[str, Any]], options_name: str, class_name: str
) -> None:
    intervals = {
        "latest at first": None,
        "saved": [1, 2, 4, 5, 6, 8, 10, 12],
        "latest": 12,
        "forced": True,
        "committed": [10, 13],
        "latest after a restart": 13,
        "saved after a restart": [14, 15, 16, 18],
        "latest without ramdisks": 15,
    }
    policies = {
        "latest at first": None,
        "saved": [1, 3, 5, 6, 7, 9, 12],
        "latest": 12,
        "forced": True,
        "committed": [5, 13],
        "latest after a restart": 13,
        "saved after a restart": [15, 17, 18],
        "latest without ramdisks": 17,
    }
    wanted = {"intervals": intervals, "policies": policies}[options_name]
    assert [process[f"{options_name}/{class_name}"] for process in told] == [wanted] * 2


def test_what_only_one_process_can_decide_is_the_same_on_all(told: list[dict[str, Any]]) -> None:
    leader, follower = (process["decided by one"] for process in told)
    assert leader["saved"] == follower["saved"]
    assert 5 < len(leader["saved"]) < 35
    assert leader["complete"] == follower["complete"] == leader["saved"][-1]
    assert leader["asked"] == list(range(1, 41)), "once per step"
    assert follower["asked"] == []
    assert leader["committed"] == [1, 30], (
        "the first one at once, the next one after an hour, but for a chosen step"
    )
    assert leader["commits heard"] == follower["commits heard"] == 2
    assert leader["failure"] == "ZeroDivisionError: by the policy"
    assert follower["failure"].startswith("PeerFailedError: process 0: ZeroDivisionError: by the policy")
