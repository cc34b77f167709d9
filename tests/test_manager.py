"""The manager in one process: Orbax's calling form, every kind of leaf, and what a user may do wrong."""

from __future__ import annotations

import collections
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax_emergency

from emergency_ckpt import (
    CheckpointManager,
    CheckpointManagerOptions,
    Config,
    LocalCheckpointOptions,
    MultiprocessingOptions,
    PersistentCheckpointOptions,
)
from emergency_ckpt.agent import drain
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import (
    ConfigError,
    EmergencyCheckpointError,
    ExtrasError,
    LocalDirectoryError,
    NoRestorableStepError,
    PeerFailedError,
    PersistentStoreError,
    StateMismatchError,
    UnsupportedStateError,
)
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.runtime import hydrate, restore_attempt


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("replica", "fsdp"))


class TrainState(flax.struct.PyTreeNode):
    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    note: str
    rate: float
    host: np.ndarray
    nothing: None = None


def make_state(mesh: Mesh, step: int) -> TrainState:
    """A state with every kind of leaf; different in every leaf at every step."""
    sharded, replicated = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    params = {
        "w": jax.device_put(jnp.arange(32.0).reshape(8, 4) + step, sharded),
        "layers": [jax.device_put(jnp.full((4,), step, dtype), replicated) for dtype in ("bfloat16", "int8")],
    }
    tree = {"w": params["w"], "layers": params["layers"][:1]}
    return TrainState(
        step=jax.device_put(jnp.int32(step), replicated),
        params=params,
        opt_state=jax.tree.map(
            lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, replicated),
            optax.adam(1e-3).init(tree),
        ),
        key=jax.device_put(jax.random.key(step), replicated),
        note=f"step {step}",
        rate=step / 8,
        host=np.arange(3) + step,
    )


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        where = jax.tree_util.keystr(path)
        if isinstance(b, jax.Array):
            assert a.dtype == b.dtype, where
            assert a.sharding == b.sharding, where
            if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), where
        elif isinstance(b, np.ndarray):
            assert isinstance(a, np.ndarray), where
            np.testing.assert_array_equal(a, b)
        else:
            assert type(a) is type(b), where
            assert a == b, where


OPTIONS = CheckpointManagerOptions(
    local=LocalCheckpointOptions(save_interval_steps=2, max_to_keep=1),
    persistent=PersistentCheckpointOptions(save_interval_steps=5, max_to_keep=3),
)

Opener = Callable[..., CheckpointManager]


@pytest.fixture
def opened(mesh: Mesh, ramdisk: Path, tmp_path: Path) -> Iterator[Opener]:
    """Opens managers on one ramdisk directory and one persistent directory, one after the other."""
    managers: list[CheckpointManager] = []

    def open_manager(
        state: Any = None, options: CheckpointManagerOptions = OPTIONS, **kwargs: Any
    ) -> CheckpointManager:
        for manager in managers:
            manager.close()
        abstract = make_state(mesh, 0) if state is None else state
        managers.append(
            CheckpointManager(ramdisk, tmp_path / "bucket", mesh, abstract, options=options, **kwargs)
        )
        return managers[-1]

    yield open_manager
    for manager in managers:
        manager.close()


def save_all(manager: CheckpointManager, mesh: Mesh, steps: range) -> list[int]:
    saved = [step for step in steps if manager.save(step, make_state(mesh, step))]
    manager.wait_until_finished()
    manager.check_for_errors()
    return saved


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


def test_what_cannot_be_saved_is_refused_by_name(opened: Opener, mesh: Mesh) -> None:
    manager = opened()
    with pytest.raises(UnsupportedStateError, match="dataset"):
        manager.save(1, ocp.args.Composite(state=ocp.args.PyTreeSave({}), dataset=ocp.args.JsonSave({})))
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
    options = CheckpointManagerOptions(local=LocalCheckpointOptions(should_save_fn=lambda step, last: True))
    with pytest.raises(ConfigError, match=r"local\.should_save_fn"):
        CheckpointManager(ramdisk, tmp_path, mesh, {"w": jnp.zeros(3)}, options=options)
    with pytest.raises(ConfigError, match="item_handlers"):
        CheckpointManager(ramdisk, tmp_path, mesh, {"w": jnp.zeros(3)}, item_handlers={})


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


def test_a_failing_persistent_store_makes_noise_and_the_local_tier_goes_on(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 5))
    blocked = tmp_path / "bucket"
    blocked.rename(tmp_path / "elsewhere")
    blocked.write_text("not a directory")
    for step in range(5, 9):
        manager.save(step, make_state(mesh, step))
    manager.wait_until_finished()
    with pytest.raises(Exception, match="step 5"):
        manager.check_for_errors()
    assert manager.latest_complete_step() == 8
    assert manager.metrics_snapshot()["drains_failed"] == 1
    blocked.unlink()
    (tmp_path / "elsewhere").rename(blocked)


class Unreliable:
    """Stands in the way of one call of a real object, the given number of times."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, times: int = 1
    ) -> None:
        self.left = times
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.left > 0:
                self.left -= 1
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)


def test_a_store_that_fails_for_a_moment_costs_no_step(
    opened: Opener, mesh: Mesh, ramdisk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(), mesh, range(1, 7))
    for manifest in ramdisk.rglob("*.manifest"):
        manifest.unlink()
    manager = opened()
    Unreliable(monkeypatch, StepReader, "read_boxes", PersistentStoreError("time-out"))
    assert manager.restore_or_init(dict).step == 5


def test_a_store_that_fails_for_good_is_an_error_and_voids_nothing(
    opened: Opener, mesh: Mesh, ramdisk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(), mesh, range(1, 7))
    for manifest in ramdisk.rglob("*.manifest"):
        manifest.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(restore_attempt, "_READ_PAUSES_SECONDS", (0.0,))
        Unreliable(patch, StepReader, "read_boxes", PersistentStoreError("time-out"), times=99)
        manager = opened()
        with pytest.raises(PersistentStoreError, match="time-out"):
            manager.restore_or_init(dict)
    assert opened().restore_or_init(dict).step == 5


def test_finish_saves_a_restored_step_that_is_not_persistent_yet(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    save_all(opened(), mesh, range(1, 5))
    manager = opened()
    state = manager.restore_or_init(dict).state
    manager.finish(4, state)
    assert (tmp_path / "bucket/4/default").is_dir()
    manager.finish(4, state)
    assert opened().restore_or_init(dict).step == 4


def test_a_step_whose_save_failed_may_be_saved_again(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    manager = opened()
    with pytest.raises(UnsupportedStateError, match="must be JSON"):
        manager.save(4, make_state(mesh, 4), metrics={"loss": jnp.float32(1)})
    assert manager.save(4, make_state(mesh, 4), metrics={"loss": 1.0})
    manager.finish(4, make_state(mesh, 4))
    assert (tmp_path / "bucket/4/default").is_dir()


def test_finish_drains_again_what_failed_to_drain(
    opened: Opener, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    Unreliable(monkeypatch, drain, "write_part", PersistentStoreError("disk full"))
    manager.save(5, make_state(mesh, 5))
    manager.finish(5, make_state(mesh, 5))
    assert (tmp_path / "bucket/5/default").is_dir()


def test_finish_raises_when_the_last_step_is_not_persistent(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    Unreliable(monkeypatch, drain, "write_part", PersistentStoreError("disk full"), times=99)
    with pytest.raises(PersistentStoreError, match=r"last step 5 did not reach the persistent tier.*disk full"):
        manager.finish(5, make_state(mesh, 5))


def test_a_closed_manager_refuses_to_save(opened: Opener, mesh: Mesh) -> None:
    manager = opened()
    manager.close()
    with pytest.raises(EmergencyCheckpointError, match="was closed"):
        manager.save(2, make_state(mesh, 2))
    with pytest.raises(EmergencyCheckpointError, match="was closed"):
        manager.restore(None)


def test_after_the_newest_step_is_deleted_the_next_newest_is_kept(opened: Opener, mesh: Mesh) -> None:
    local = LocalCheckpointOptions(save_interval_steps=2, max_to_keep=2)
    options = dataclasses.replace(OPTIONS, local=local, persistent=PersistentCheckpointOptions(1000))
    manager = opened(options=options)
    save_all(manager, mesh, range(2, 9))
    manager.delete(8)
    assert manager.latest_step() == 6
    for step in (StepId(manager.generation, n) for n in range(20, 26)):
        manager._engine.job.local.begin(step, timedelta(0))
    manager._engine.job.local.close()
    assert opened(options=options).restore_or_init(dict).step == 6


def test_a_failed_restore_in_the_middle_of_a_run_leaves_a_working_manager(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 5))
    Unreliable(
        monkeypatch, manager._engine.job.persistent, "mint_generation", PersistentStoreError("bucket gone")
    )
    with pytest.raises(PersistentStoreError, match="bucket gone"):
        manager.restore(2)
    assert save_all(manager, mesh, range(5, 9)) == [5, 6, 8]
    assert manager.latest_complete_step() == 8


def test_an_error_of_the_coordination_stops_one_save_and_not_those_after_it(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened(options=dataclasses.replace(OPTIONS, multiprocessing_options=MultiprocessingOptions(1)))
    manager.save(2, make_state(mesh, 2))
    manager.wait_until_finished()
    agreement = manager._engine._pipeline._agreement
    Unreliable(monkeypatch, agreement, "report_sealed", PeerFailedError("service away"))
    manager.save(4, make_state(mesh, 4))
    manager.wait_until_finished()
    with pytest.raises(PeerFailedError, match="service away"):
        manager.check_for_errors()
    save_all(manager, mesh, range(6, 9))
    assert manager.latest_complete_step() == 8


def test_leftovers_that_cannot_be_removed_do_not_keep_the_job_from_starting(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    Unreliable(monkeypatch, PersistentStore, "remove_leftovers", PersistentStoreError("device busy"))
    assert opened().restore_or_init(lambda: "fresh").state == "fresh"


def test_a_run_that_lost_everything_is_not_silently_begun_from_scratch(
    opened: Opener, mesh: Mesh, ramdisk: Path
) -> None:
    options = dataclasses.replace(OPTIONS, persistent=PersistentCheckpointOptions(1000))
    manager = opened(options=options)
    save_all(manager, mesh, range(2, 7))
    manager.close()
    for path in ramdisk.rglob("slot_*.data"):
        path.write_bytes(bytes(path.stat().st_size))
    for step in (manager._settings.persistent_directory).glob("[0-9]*"):
        shutil.rmtree(step)
    with pytest.raises(NoRestorableStepError, match=r"was complete once.*use another run_name"):
        opened(options=options).restore_or_init(dict)


def test_a_first_save_that_was_cut_off_begins_from_scratch(opened: Opener, mesh: Mesh, ramdisk: Path) -> None:
    manager = opened()
    manager.save(1, make_state(mesh, 1))
    manager.close()
    for path in ramdisk.rglob("slot_*.data"):
        path.write_bytes(bytes(path.stat().st_size))
    for step in (manager._settings.persistent_directory).glob("[0-9]*"):
        shutil.rmtree(step)
    assert opened().restore_or_init(lambda: "fresh").state == "fresh"


def test_a_step_that_orbax_wrote_anew_is_not_taken_from_the_ramdisk(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    for value in (1.0, 2.0):
        state = {"w": jnp.full((4,), value)}
        with ocp.CheckpointManager(tmp_path / "bucket", item_names=("state",)) as plain:
            if 10 in plain.all_steps():
                plain.delete(10)
            plain.save(10, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
        with CheckpointManager(ramdisk, tmp_path / "bucket", mesh, state, options=OPTIONS) as manager:
            assert manager.restore(10)["state"]["w"][0] == value


def test_after_a_failed_restore_training_from_scratch_is_saved(
    opened: Opener, mesh: Mesh, ramdisk: Path
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 7))
    manager.close()
    for path in ramdisk.rglob("slot_*.data"):
        path.write_bytes(bytes(path.stat().st_size))
    for path in (manager._settings.persistent_directory).glob("*/default/**/d/*"):
        path.write_bytes(bytes(path.stat().st_size))
    manager = opened()
    with pytest.raises(NoRestorableStepError):
        manager.restore_or_init(dict)
    assert manager.latest_step() is None
    assert save_all(manager, mesh, range(1, 5)) == [1, 2, 4]


def test_latest_step_names_only_what_can_be_restored(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(), mesh, range(1, 5))
    manager = opened()
    manager.restore(None)
    Unreliable(monkeypatch, manager._engine.job.local, "seal", OSError("no space left"))
    manager.save(6, make_state(mesh, 6))
    manager.wait_until_finished()
    assert manager.latest_step() == 4


def test_failing_retention_does_not_undo_a_commit(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    Unreliable(monkeypatch, manager._engine.job.persistent, "steps", PersistentStoreError("listing failed"))
    manager.save(5, make_state(mesh, 5))
    manager.wait_until_finished()
    with pytest.raises(PersistentStoreError, match="after the commit of step 5"):
        manager.check_for_errors()
    assert manager.metrics_snapshot()["drains_committed"] == 1


def test_metadata_is_kept_as_it_was_at_the_call(opened: Opener, mesh: Mesh) -> None:
    manager = opened()
    told = {"nested": [1]}
    manager.save(2, make_state(mesh, 2), custom_metadata=told)
    told["nested"].append(2)
    manager.wait_until_finished()
    assert manager.metadata(2).custom_metadata == {"nested": [1]}


def test_a_store_that_fails_while_extras_are_read_leaks_no_slot(
    opened: Opener, mesh: Mesh, ramdisk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(), mesh, range(1, 7))
    for manifest in ramdisk.rglob("*.manifest"):
        manifest.unlink()
    manager = opened()
    monkeypatch.setattr(restore_attempt, "_READ_PAUSES_SECONDS", (0.0, 0.0, 0.0))
    Unreliable(monkeypatch, StepReader, "values", PersistentStoreError("time-out"), times=3)
    assert manager.restore_or_init(dict).step == 5
    assert save_all(manager, mesh, range(6, 13)) == [6, 8, 10, 12]
    assert manager.latest_complete_step() == 12


def test_a_newer_checkpoint_of_another_program_is_never_deleted(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    state = {"params": make_state(mesh, 3).params}
    saved = ocp.args.Composite(state=ocp.args.StandardSave(state))
    with CheckpointManager(ramdisk, tmp_path / "bucket", mesh, state, options=OPTIONS) as manager:
        manager.save(10, state)
    with CheckpointManager(ramdisk, tmp_path / "bucket", mesh, state, options=OPTIONS) as manager:
        manager.restore(10)
    with ocp.CheckpointManager(tmp_path / "bucket", item_names=("state",)) as plain:
        plain.save(25, args=saved)
    with CheckpointManager(ramdisk, tmp_path / "bucket", mesh, state, options=OPTIONS) as manager:
        assert manager.restore_or_init(dict).step == 10
        manager.save(20, state)
        manager.finish(20, state)
        assert 25 in manager.all_steps()
    assert (tmp_path / "bucket/25").is_dir()


def test_a_second_try_after_a_failed_restore_does_not_begin_from_scratch(
    opened: Opener, mesh: Mesh, ramdisk: Path
) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 7))
    manager.close()
    for path in [
        *ramdisk.rglob("slot_*.data"),
        *manager._settings.persistent_directory.glob("*/default/**/d/*"),
    ]:
        path.write_bytes(bytes(path.stat().st_size))
    manager = opened()
    for _ in range(2):
        with pytest.raises(NoRestorableStepError):
            manager.restore_or_init(dict)


def test_a_ramdisk_that_fails_after_a_restore_does_not_fail_the_restore(
    opened: Opener, mesh: Mesh, ramdisk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(opened(), mesh, range(1, 7))
    for manifest in ramdisk.rglob("*.manifest"):
        manifest.unlink()
    manager = opened()
    Unreliable(monkeypatch, hydrate.Hydrated, "settle", OSError("no space left"))
    assert manager.restore_or_init(dict).step == 5


def test_a_deleted_step_may_be_saved_and_drained_again(
    opened: Opener, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = opened()
    Unreliable(monkeypatch, drain, "write_part", PersistentStoreError("disk full"))
    manager.save(10, make_state(mesh, 10))
    manager.wait_until_finished()
    manager.delete(10)
    with pytest.raises(PersistentStoreError, match="disk full"):
        manager.check_for_errors()
    assert manager.save(10, make_state(mesh, 10))
    manager.wait_until_finished()
    manager.check_for_errors()
    assert (tmp_path / "bucket/10/default").is_dir()


def test_metrics_count_what_happened(opened: Opener, mesh: Mesh) -> None:
    manager = opened()
    save_all(manager, mesh, range(1, 7))
    found = collections.Counter(manager.metrics_snapshot())
    assert (found["saves_complete"], found["saves_skipped"], found["drains_committed"]) == (5, 0, 2)


def test_checkpointing_switched_off_needs_no_directories(mesh: Mesh) -> None:
    manager = CheckpointManager.from_config(Config(enable_checkpointing=False), mesh, {})
    assert manager.restore_or_init(lambda: "fresh").state == "fresh"
    assert not manager.save(1, {})
    manager.finish(1, {})
    manager.close()


def flags(ramdisk: Path, tmp_path: Path, **changes: Any) -> Config:
    return Config(
        run_name="run",
        base_output_directory=str(tmp_path / "out"),
        enable_checkpointing=True,
        enable_emergency_checkpoint=True,
        local_checkpoint_directory=str(ramdisk),
        local_checkpoint_period=1,
        checkpoint_period=100,
        **changes,
    )


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
