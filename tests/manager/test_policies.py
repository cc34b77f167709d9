"""Orbax's policies, metadata, logger and callbacks in a running manager, with Orbax's own objects."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pytest
from absl import logging as absl_logging
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as orbax_policies
from orbax.checkpoint.logging import AbstractLogger

from emergency_ckpt import (
    CheckpointManager,
    CheckpointManagerOptions,
    LocalCheckpointOptions,
    PersistentCheckpointOptions,
)
from emergency_ckpt.errors import (
    ConfigError,
    EmergencyCheckpointError,
    PersistentStoreError,
    StepOccupiedError,
)
from emergency_ckpt.persistent.store import PersistentStore
from tests.manager.states import OPTIONS, Opener, make_state, save_all


def options(local: dict[str, Any] | None = None, **persistent: Any) -> CheckpointManagerOptions:
    return CheckpointManagerOptions(
        local=LocalCheckpointOptions(**(local or {"save_interval_steps": 2, "max_to_keep": 1})),
        persistent=PersistentCheckpointOptions(**persistent),
    )


def small(mesh: Mesh) -> dict[str, Any]:
    return {"w": make_state(mesh, 0).params["w"]}


def committed(tmp_path: Path) -> list[int]:
    return sorted(int(path.name) for path in (tmp_path / "bucket").iterdir() if path.name.isdigit())


# When is saved.


def test_policies_that_need_nobody_decide_per_tier(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    state = small(mesh)
    any_of, every = orbax_policies.AnySavePolicy, orbax_policies.FixedIntervalPolicy
    chosen = any_of([orbax_policies.SpecificStepsPolicy({3, 8}), orbax_policies.InitialSavePolicy()])
    policies = options(local={"save_decision_policy": every(4)}, save_decision_policy=chosen)
    manager = opened(state, policies)
    assert [step for step in range(1, 10) if manager.save(step, state)] == [1, 3, 4, 8]
    manager.wait_until_finished()
    manager.check_for_errors()
    assert committed(tmp_path) == [1, 3, 8]


def test_a_step_without_a_save_asks_no_coordination_service_no_file_and_no_log(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = orbax_policies.AnySavePolicy(
        [orbax_policies.FixedIntervalPolicy(1000), orbax_policies.PreemptionCheckpointingPolicy()]
    )
    manager = opened(small(mesh), options(local={"save_decision_policy": every}, save_decision_policy=every))

    def nobody(*_: Any, **__: Any) -> Any:
        raise AssertionError("a step where nothing is due asked somebody")

    for owner, names in {
        type(manager._engine.job.coordinator): ["put", "get", "try_get", "put_once", "increment"],
        type(manager._engine.job.persistent.files): ["entries", "read", "write", "create"],
        logging.Logger: ["handle"],
    }.items():
        for name in names:
            monkeypatch.setattr(owner, name, nobody)
    assert not any(manager.save(step, None) for step in range(1, 1000))
    monkeypatch.undo()


def test_a_function_that_decides_hears_of_earlier_saves_and_is_asked_once_per_step(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    state, asked = small(mesh), []

    def growing(step: int, latest: int | None) -> bool:
        asked.append((step, latest))
        return latest is None or step >= 2 * latest

    manager = opened(state, options(should_save_fn=growing, local={"save_interval_steps": 3}))
    for step in range(1, 10):
        due = manager.should_save(step)
        assert manager.save(step, state) == due
        manager.wait_until_finished()
    assert asked == [
        (1, None),
        (2, 1),
        *((step, 2) for step in (3, 4)),
        *((step, 4) for step in range(5, 9)),
        (9, 8),
    ]
    assert committed(tmp_path) == [1, 2, 4, 8]
    manager = opened(state, options(should_save_fn=growing, local={"save_interval_steps": 100}))
    manager.restore(None)
    asked.clear()
    assert [step for step in range(9, 17) if manager.save(step, state)] == [16]
    assert asked[0] == (10, 8), "an earlier life's steps count, and no old step is asked about"


def test_a_policy_of_a_users_own_sees_the_metrics_of_earlier_saves(opened: Opener, mesh: Mesh) -> None:
    class OnProgress:
        def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
            seen.append([(info.step, info.metrics) for info in previous_steps])
            return True

    seen: list[list[tuple[int, Any]]] = []
    state = small(mesh)
    manager = opened(state, options(save_decision_policy=OnProgress(), local={"save_interval_steps": 100}))
    for step in range(1, 4):
        manager.save(step, state, metrics={"loss": 1 / step} if step != 2 else None)
        if step != 1:  # The first save may still be in progress when the second is asked about.
            manager.wait_until_finished()
    assert seen == [[], [(1, {"loss": 1.0})], [(1, {"loss": 1.0}), (2, None)]]


def test_force_asks_no_policy(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    def never(step: int, latest: int | None) -> bool:
        raise AssertionError("asked")

    manager = opened(small(mesh), options(should_save_fn=never, local={"should_save_fn": never}))
    assert manager.save(3, small(mesh), force=True)
    manager.wait_until_finished()
    assert committed(tmp_path) == [3]


def test_continuous_checkpointing_saves_as_often_as_it_can(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    policy = orbax_policies.ContinuousCheckpointingPolicy()
    manager = opened(small(mesh), options(save_decision_policy=policy, local={"save_interval_steps": 1}))
    for step in range(1, 4):
        manager.save(step, small(mesh))
        manager.wait_until_finished()
    assert committed(tmp_path) == [1, 2, 3]
    hourly = orbax_policies.ContinuousCheckpointingPolicy(minimum_interval_secs=3600)
    manager = opened(small(mesh), options(save_decision_policy=hourly, local={"save_interval_steps": 1}))
    manager.restore(None)
    for step in range(4, 7):
        manager.save(step, small(mesh))
    manager.wait_until_finished()
    assert committed(tmp_path) == [1, 2, 3], "the last one was committed a moment ago"
    assert manager.latest_step() == 6


def test_the_first_step_of_an_empty_persistent_tier_is_saved_there(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    state = small(mesh)
    chosen = orbax_policies.SpecificStepsPolicy([50])
    manager = opened(state, options(save_decision_policy=chosen))
    assert [step for step in range(1, 5) if manager.save(step, state)] == [1, 2, 4]
    manager = opened(state, options(save_interval_steps=1000))
    manager.restore(None)
    assert [step for step in range(5, 8) if manager.save(step, state)] == [5, 6]
    manager.wait_until_finished()
    assert committed(tmp_path) == [5]


# What is kept.


def test_a_metric_that_is_no_number_does_not_count(opened: Opener, mesh: Mesh) -> None:
    manager = opened(small(mesh), options(save_interval_steps=1))
    for step, loss in ((1, 0.5), (2, "low"), (3, None), (4, [0.1])):
        manager.save(step, small(mesh), metrics={"loss": loss})
    manager.wait_until_finished()
    assert manager.best_step("loss", "min") == 1


def test_the_best_steps_stay_and_the_best_is_found(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    best = orbax_policies.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=2)
    any_of = orbax_policies.AnyPreservationPolicy([orbax_policies.EveryNSteps(5), best])
    policies = options(save_interval_steps=1, preservation_policy=any_of)
    losses = {1: 9.0, 2: 3.0, 3: 1.0, 4: 4.0, 5: 8.0, 6: 7.0, 7: 6.0}
    state = small(mesh)
    manager = opened(state, policies)
    for step, loss in losses.items():
        manager.save(step, state, metrics={"loss": loss, "accuracy": -loss})
    manager.wait_until_finished()
    manager.check_for_errors()
    assert committed(tmp_path) == [2, 3, 5, 7], "the two best, every fifth, and the newest"
    assert manager.best_step() == 3
    assert manager.best_step("accuracy") == 3
    assert manager.best_step("loss") == 5
    assert manager.best_step("loss", mode="min") == 3
    assert manager.best_step("perplexity") is None
    with pytest.raises(ConfigError, match="mode is 'lowest'"):
        manager.best_step("loss", "lowest")  # pyright: ignore[reportArgumentType]
    manager = opened(state, OPTIONS)
    assert manager.best_step() == 7, "without a policy that ranks them, the newest"
    assert manager.best_step("loss", "min") == 3


def test_a_preservation_policy_that_fails_is_heard_and_deletes_nothing(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    class Failing:
        def should_preserve(self, checkpoints: Any, *, context: Any) -> Any:
            raise KeyError("no such metric")

    manager = opened(small(mesh), options(save_interval_steps=1, preservation_policy=Failing()))
    for step in range(1, 4):
        assert manager.save(step, small(mesh))
        with pytest.raises(PersistentStoreError, match=r"policy .* failed on the steps .*KeyError.*metric"):
            manager.wait_until_finished()
    assert committed(tmp_path) == [1, 2, 3]
    short = orbax_policies.CustomSteps([])
    short.should_preserve = lambda checkpoints, *, context: []  # type: ignore[method-assign]
    manager = opened(small(mesh), options(save_interval_steps=1, preservation_policy=short))
    manager.save(4, small(mesh))
    with pytest.raises(PersistentStoreError, match="0 answers to 4 steps"):
        manager.wait_until_finished()
    assert committed(tmp_path) == [1, 2, 3, 4]


def test_steps_of_plain_orbax_count_with_their_times_and_metrics(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    seen: list[list[tuple[int, Any, int]]] = []

    class All:
        def should_preserve(self, checkpoints: Any, *, context: Any) -> Any:
            seen.append([(c.step, c.metrics, int(c.time.timestamp())) for c in checkpoints])
            return [True] * len(checkpoints)

    state = small(mesh)
    root = tmp_path / "bucket"
    plain_options = ocp.CheckpointManagerOptions(best_fn=lambda m: m["loss"])
    with ocp.CheckpointManager(root, options=plain_options, item_names=("state",)) as plain:
        for step in (1, 2):
            args = ocp.args.Composite(state=ocp.args.StandardSave(state))
            plain.save(step, args=args, metrics={"loss": step / 2}, custom_metadata={"by": "orbax"})
    (root / "2/metrics/metrics").unlink()
    policies = options(save_interval_steps=1, preservation_policy=All())
    with CheckpointManager(ramdisk, root, mesh, state, options=policies) as manager:
        manager.restore_or_init(dict)
        manager.save(3, state, metrics={"loss": 0.1})
        manager.wait_until_finished()
        manager.check_for_errors()
        with ocp.CheckpointManager(root, item_names=("state",)) as plain:
            times = [plain.metadata(step).commit_timestamp_nsecs for step in (1, 2, 3)]
        assert [manager.metadata(step).commit_timestamp_nsecs for step in (1, 2, 3)] == times
        assert all(times)
        assert manager.metadata(1).custom_metadata == {"by": "orbax"}
        assert manager.metadata(1).metrics == {"loss": 0.5}
        assert manager.metadata(1).init_timestamp_nsecs
        seconds = [int(time / 1e9) for time in times]
        assert seen == [list(zip((1, 2, 3), ({"loss": 0.5}, None, {"loss": 0.1}), seconds, strict=True))]


def test_a_ramdisk_that_keeps_the_latest_n(opened: Opener, mesh: Mesh) -> None:
    latest = {"save_interval_steps": 1, "preservation_policy": orbax_policies.LatestN(3)}
    manager = opened(small(mesh), options(local=latest, save_interval_steps=1000))
    for step in range(1, 8):
        manager.save(step, small(mesh))
        manager.wait_until_finished()
    assert set(manager.all_steps()) >= {5, 6, 7}


# Other options.


def test_the_callback_comes_after_each_persistent_commit_and_its_errors_undo_nothing(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    found: list[list[int]] = []

    def look() -> None:
        found.append(committed(tmp_path))
        if len(found) == 2:
            raise RuntimeError("the callback's own")

    policies = dataclasses.replace(
        options(save_interval_steps=2), async_options=ocp.AsyncOptions(post_finalization_callback=look)
    )
    manager = opened(small(mesh), policies)
    for step in range(1, 5):
        manager.save(step, small(mesh))
    with pytest.raises(
        EmergencyCheckpointError, match=r"was committed, but the callback .* the callback's own"
    ):
        manager.wait_until_finished()
    assert found == [[1], [1, 2], [1, 2, 4]]


def test_temporary_directories_of_orbax_are_removed_on_request_only(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    foreign = tmp_path / "bucket/7.orbax-checkpoint-tmp-123"
    newer = tmp_path / "bucket/8.orbax-checkpoint-tmp-g999-abc-0"  # of a life of the run that has taken over
    for directory in (foreign, newer):
        (directory / "default").mkdir(parents=True)
    opened(small(mesh))
    assert foreign.exists()
    opened(small(mesh), dataclasses.replace(OPTIONS, cleanup_tmp_directories=True))
    assert not foreign.exists()
    assert newer.exists()


def test_temporary_directories_of_datasets_are_removed_on_request_as_well(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    temporary = tmp_path / "datasets/7.orbax-checkpoint-tmp-123"
    (temporary / "default").mkdir(parents=True)
    where = {"persistent_non_replicated_directory": tmp_path / "datasets"}
    opened(small(mesh), **where)
    assert temporary.exists()
    manager = opened(small(mesh), dataclasses.replace(OPTIONS, cleanup_tmp_directories=True), **where)
    state = ocp.args.PyTreeSave(small(mesh))
    manager.save(1, ocp.args.Composite(state=state, dataset=ocp.args.JsonSave({})))
    assert not temporary.exists(), "Orbax removes it in the background, and waits for that before it saves"


def test_a_read_only_ramdisk_is_restored_from_and_saved_to_no_more(opened: Opener, mesh: Mesh) -> None:
    save_all(opened(), mesh, range(1, 5))
    read_only = {"save_interval_steps": 2, "read_only": True}
    manager = opened(options=options(local=read_only, save_interval_steps=5))
    restored = manager.restore_or_init(lambda: pytest.fail("step 4 is on the ramdisk"))
    assert (restored.step, restored.source) == (4, "own slot")
    assert save_all(manager, mesh, range(5, 10)) == [5]


def test_metadata_of_the_run_is_where_plain_orbax_looks_and_stays(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    assert opened(small(mesh)).metadata().custom_metadata == {}
    manager = opened(small(mesh), metadata={"model": "small", "layers": [1, 2]})
    assert manager.metadata(None).custom_metadata == {"model": "small", "layers": [1, 2]}
    with ocp.CheckpointManager(tmp_path / "bucket") as plain:
        assert plain.metadata().custom_metadata == {"model": "small", "layers": [1, 2]}
    assert opened(small(mesh)).metadata().custom_metadata == {"model": "small", "layers": [1, 2]}
    assert opened(small(mesh), metadata={"model": "other"}).metadata().custom_metadata["model"] == "small"


def test_metadata_that_plain_orbax_wrote_is_returned(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path / "bucket", metadata={"by": "orbax"}):
        pass
    assert opened(small(mesh)).metadata().custom_metadata == {"by": "orbax"}


class Collecting(AbstractLogger):
    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def log_entry(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        self.entries.append(msg)
        if msg["operation"] == "save":
            raise OSError("the log is full")


def test_orbaxs_logger_gets_every_event_and_may_fail(
    opened: Opener, mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    logger = Collecting()
    absl_logging.get_absl_logger().addHandler(caplog.handler)
    manager = opened(logger=logger)
    save_all(manager, mesh, range(1, 2))
    absl_logging.get_absl_logger().removeHandler(caplog.handler)
    assert manager.restore(None) is not None
    found = {(entry["operation"], entry["step"]): entry for entry in logger.entries}
    assert set(found) == {("start", None), ("save", 1), ("drain", 1), ("restore", 1)}
    assert found["save", 1]["outcome"] == "complete"
    assert found["save", 1]["run"] == manager.run_id[:8]
    assert json.loads(json.dumps(found["drain", 1]))["result"] == "committed"
    assert "the logger failed on an event: OSError: the log is full" in caplog.text


@pytest.mark.parametrize(
    ("error", "counts"), [(PersistentStoreError("disk full"), True), (StepOccupiedError("no way"), False)]
)
def test_a_save_on_its_way_counts_as_an_earlier_one_as_long_as_its_drain_is_tried_again(
    opened: Opener, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, error: PersistentStoreError, counts: bool
) -> None:
    heard: list[int | None] = []

    def note(step: int, latest: int | None) -> bool:
        heard.append(latest)
        return step % 2 == 1

    manager = opened(small(mesh), options(should_save_fn=note, local={"save_interval_steps": 100}))
    may_end = threading.Event()
    commit = PersistentStore.commit

    def commit_later(store: PersistentStore, attempt: Any, *written: Any) -> Any:
        assert may_end.wait(60)
        if attempt.step == 1:
            return commit(store, attempt, *written)
        raise error

    monkeypatch.setattr(PersistentStore, "commit", commit_later)
    manager.save(1, small(mesh))
    manager.save(2, small(mesh))
    manager.save(3, small(mesh))
    manager.save(4, small(mesh))
    may_end.set()
    with pytest.raises(type(error), match=str(error)):
        manager.wait_until_finished()
    manager.save(6, small(mesh))
    assert heard == [None, 1, 1, 3, 3 if counts else 1]
    monkeypatch.setattr(PersistentStore, "commit", commit)
