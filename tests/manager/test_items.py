"""Items beside the state: saved by Orbax's handlers, in one commit with the arrays, laid out as Orbax does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from grain.checkpoint import CheckpointRestore, CheckpointSave
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import BestN

from emergency_ckpt import (
    CheckpointManagerOptions,
    LocalCheckpointOptions,
    PersistentCheckpointOptions,
    StepAlreadyExistsError,
)
from emergency_ckpt.agent import draining
from emergency_ckpt.errors import (
    ConfigError,
    ExtrasError,
    NoRestorableStepError,
    PersistentStoreError,
    UnsupportedStateError,
)
from tests.manager.states import Opener, Unreliable, assert_same, make_state

Composite, JsonSave, JsonRestore = ocp.args.Composite, ocp.args.JsonSave, ocp.args.JsonRestore


class Note:
    def __init__(self, text: str) -> None:
        self.text = text


class NoteHandler(ocp.CheckpointHandler):
    """A handler as a user writes one."""

    def save(self, directory: epath.Path, args: NoteSave) -> None:
        if not args.item.text:
            raise ValueError("an empty note")
        (directory / "deep").mkdir()
        (directory / "deep/note.txt").write_text(args.item.text)

    def restore(self, directory: epath.Path, args: NoteRestore) -> Note:
        return Note((directory / "deep/note.txt").read_text())


@ocp.args.register_with_handler(NoteHandler, for_save=True)
@dataclasses.dataclass
class NoteSave(ocp.args.CheckpointArgs):
    item: Note


@ocp.args.register_with_handler(NoteHandler, for_restore=True)
@dataclasses.dataclass
class NoteRestore(ocp.args.CheckpointArgs):
    pass


def grain_iterator() -> Any:
    return iter(grain.MapDataset.range(1000).to_iter_dataset())


def save_with_items(manager: Any, mesh: Mesh, step: int, iterator: Any) -> None:
    args = Composite(
        state=ocp.args.PyTreeSave(make_state(mesh, step)),
        about=JsonSave({"step": step, "nested": {"a": [1, None]}}),
        dataset=CheckpointSave(iterator),
        note=NoteSave(Note(f"note of {step}")),
    )
    assert manager.save(step, args)
    manager.wait_until_finished()
    manager.check_for_errors()


@pytest.mark.parametrize("tier", ["ramdisk", "persistent"])
def test_items_come_back_with_the_arrays_of_their_step(
    opened: Opener, mesh: Mesh, ramdisk: Path, tier: str
) -> None:
    manager, iterator = opened(), grain_iterator()
    for step, count in ((10, 3), (12, 2)):
        for _ in range(count):
            next(iterator)
        save_with_items(manager, mesh, step, iterator)
    if tier == "persistent":
        for manifest in ramdisk.rglob("*.manifest"):
            manifest.unlink()
    wanted = Composite(about=JsonRestore(), dataset=CheckpointRestore(grain_iterator()), note=NoteRestore())
    found = opened().restore(None, wanted)
    step, position = (12, 5) if tier == "ramdisk" else (10, 3)
    assert_same(found.state, make_state(mesh, step))
    assert found.about == {"step": step, "nested": {"a": [1, None]}}
    assert next(found.dataset) == position
    assert found.note.text == f"note of {step}"


def test_plain_orbax_restores_the_items_of_our_steps(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    manager = opened()
    save_with_items(manager, mesh, 10, grain_iterator())
    manager.close()
    names = ("default", "about", "dataset", "note")
    with ocp.CheckpointManager(tmp_path / "bucket", item_names=names) as plain:
        found = plain.restore(10, args=Composite(about=JsonRestore(), note=NoteRestore()))
    assert found.about["step"] == 10
    assert found.note.text == "note of 10"
    assert (tmp_path / "bucket/10/dataset/process_0-of-1.json").is_file()


def test_items_that_plain_orbax_wrote_are_restored(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    state = {"w": make_state(mesh, 3).params["w"]}
    with ocp.CheckpointManager(tmp_path / "bucket") as plain:
        args = Composite(state=ocp.args.StandardSave(state), about=JsonSave({"by": "orbax"}))
        plain.save(3, args=args)
    found = opened(state).restore(3, Composite(about=JsonRestore()))
    assert_same(found.state, state)
    assert found.about == {"by": "orbax"}


def test_an_item_that_is_not_there_leaves_everything_as_it_was(opened: Opener, mesh: Mesh) -> None:
    save_with_items(opened(), mesh, 10, grain_iterator())
    manager = opened()
    with pytest.raises(ExtrasError, match="item 'other' is wanted, but the step holds \\['about', 'dataset'"):
        manager.restore(None, Composite(other=JsonRestore()))
    assert manager.restore(None, Composite(about=JsonRestore())).about["step"] == 10


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"about": JsonSave({"a": object()})}, "item 'about' is no JSON: Object of type object"),
        ({"note": NoteSave(Note(""))}, r"item 'note' .*NoteHandler raised ValueError: an empty note"),
        ({"odd": ocp.args.CheckpointArgs()}, r"no handler is known for item 'odd' with CheckpointArgs"),
    ],
)
def test_an_item_that_fails_is_named_and_the_save_is_abandoned(
    opened: Opener, mesh: Mesh, bad: dict[str, Any], said: str
) -> None:
    manager = opened()
    with pytest.raises(ExtrasError, match=said):
        manager.save(2, Composite(state=ocp.args.PyTreeSave(make_state(mesh, 2)), **bad))
    manager.wait_until_finished()
    assert manager.latest_complete_step() is None
    save_with_items(manager, mesh, 4, grain_iterator())
    assert manager.latest_complete_step() == 4


@pytest.mark.parametrize(
    "name", ["metrics", "default", "items", "process_metadata", "emergency_ckpt_x", "_a", "n" * 101]
)
def test_names_that_something_else_has_are_refused(opened: Opener, mesh: Mesh, name: str) -> None:
    args = Composite(state=ocp.args.PyTreeSave(make_state(mesh, 2)), **{name: JsonSave({})})
    with pytest.raises(UnsupportedStateError, match=f"an item cannot be called '{name}'"):
        opened().save(2, args)


def test_a_handler_that_is_given_as_a_class_is_made_once_and_closed(opened: Opener, mesh: Mesh) -> None:
    class Counting(NoteHandler):
        made, closed = 0, 0

        def __init__(self) -> None:
            Counting.made += 1

        def close(self) -> None:
            Counting.closed += 1

    manager = opened(item_handlers={"note": Counting})
    for step in (2, 4):
        save_with_items(manager, mesh, step, grain_iterator())
    assert manager.restore(4, Composite(note=NoteRestore())).note.text == "note of 4"
    for _ in range(2):
        manager.close()
    assert (Counting.made, Counting.closed) == (1, 1)


def test_handlers_are_found_as_in_orbax(opened: Opener, mesh: Mesh) -> None:
    class Shouting(NoteHandler):
        def restore(self, directory: epath.Path, args: NoteRestore) -> Note:
            return Note(super().restore(directory, args).text.upper())

    save_with_items(opened(), mesh, 10, grain_iterator())
    by_name = opened(item_handlers={"note": Shouting()})
    assert by_name.restore(None, Composite(note=NoteRestore())).note.text == "NOTE OF 10"
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(None, NoteRestore, Shouting())
    registered = opened(handler_registry=registry)
    assert registered.restore(None, Composite(note=NoteRestore())).note.text == "NOTE OF 10"
    with pytest.raises(ConfigError, match="exclude each other"):
        opened(item_handlers={}, handler_registry=registry)


def test_a_dataset_too_large_for_the_commit_has_a_directory_of_its_own(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    def save(manager: Any, step: int, mark: int) -> None:
        large = {"mark": mark, "padding": "x" * 2**20}
        args = Composite(state=ocp.args.PyTreeSave(make_state(mesh, step)), dataset=JsonSave(large))
        assert manager.save(step, args)
        manager.wait_until_finished()
        manager.check_for_errors()

    wanted = Composite(dataset=JsonRestore())
    directory = tmp_path / "datasets"
    manager = opened(persistent_non_replicated_directory=directory)
    for step in (5, 10, 12):
        save(manager, step, step)
    manager = opened(persistent_non_replicated_directory=directory)
    assert manager.restore(5, wanted).dataset["mark"] == 5
    save(manager, 10, -10)  # The 10 of the life that the restore has ended is replaced.
    assert manager.restore(10, wanted).dataset["mark"] == -10
    save(manager, 12, 12)
    with pytest.raises(ExtrasError, match=r"item 'dataset' is wanted, .* kept for the steps \[5, 10\]"):
        manager.restore(12, wanted)


def save_large_dataset(manager: Any, mesh: Mesh, step: int, **how: Any) -> None:
    large = JsonSave({"mark": step, "padding": "x" * 2**20})
    manager.save(step, Composite(state=ocp.args.PyTreeSave(make_state(mesh, step)), dataset=large), **how)
    manager.wait_until_finished()


def dataset_steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir())


def committed_steps(bucket: Path) -> list[int]:
    return sorted(int(path.name) for path in bucket.iterdir() if path.name.isdigit())


def test_a_dataset_that_is_missing_leaves_later_steps_as_they_were(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    options = CheckpointManagerOptions(
        local=LocalCheckpointOptions(save_interval_steps=1, max_to_keep=3),
        persistent=PersistentCheckpointOptions(save_interval_steps=5),
    )
    how = {"options": options, "persistent_non_replicated_directory": tmp_path / "datasets"}
    manager = opened(**how)
    for step in range(5, 11):
        save_large_dataset(manager, mesh, step)
    manager, wanted = opened(**how), Composite(dataset=JsonRestore())
    with pytest.raises(ExtrasError, match="item 'dataset' is wanted"):
        manager.restore(9, wanted)
    assert manager.latest_step() == 10
    assert manager.restore(10, wanted).dataset["mark"] == 10


def test_a_step_never_meets_the_dataset_of_a_life_that_a_restore_has_ended(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    directory = tmp_path / "datasets"
    manager = opened(persistent_non_replicated_directory=directory)
    save_large_dataset(manager, mesh, 5)
    save_large_dataset(manager, mesh, 8, force=True)
    manager = opened(persistent_non_replicated_directory=directory)
    manager.restore(5)
    save_large_dataset(manager, mesh, 8)  # This 8 is on the ramdisks only, and its dataset is nowhere.
    manager = opened(persistent_non_replicated_directory=directory)
    assert manager.latest_step() == 8
    with pytest.raises(ExtrasError, match=r"Elsewhere it is kept for the steps \[5\]"):
        manager.restore(8, Composite(dataset=JsonRestore()))


def test_a_dataset_goes_only_when_its_step_is_gone(
    opened: Opener, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CheckpointManagerOptions(
        persistent=PersistentCheckpointOptions(save_interval_steps=5, max_to_keep=1)
    )
    directory = tmp_path / "datasets"
    manager = opened(options=options, persistent_non_replicated_directory=directory)
    for step in (5, 10):
        save_large_dataset(manager, mesh, step)
    with monkeypatch.context() as patch:
        Unreliable(patch, draining, "write_part", PersistentStoreError("disk full"), times=99)
        with pytest.raises(PersistentStoreError, match="disk full"):
            save_large_dataset(manager, mesh, 15)
        assert dataset_steps(directory) == [10, 15]
        assert committed_steps(tmp_path / "bucket") == [10]
    save_large_dataset(manager, mesh, 20)
    save_large_dataset(manager, mesh, 25)
    assert dataset_steps(directory) == [20, 25]
    manager.delete(25)
    assert dataset_steps(directory) == [20]


def test_datasets_are_kept_for_the_steps_that_a_policy_preserves(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    best = BestN(get_metric_fn=lambda metrics: metrics["score"], n=2, keep_checkpoints_without_metrics=False)
    options = CheckpointManagerOptions(
        persistent=PersistentCheckpointOptions(save_interval_steps=1, preservation_policy=best)
    )
    directory = tmp_path / "datasets"
    manager = opened(options=options, persistent_non_replicated_directory=directory)
    for step, score in enumerate((1, 9, 2, 8, 3, 4)):
        save_large_dataset(manager, mesh, step, metrics={"score": score})
    assert manager.best_step() == 1
    assert committed_steps(tmp_path / "bucket") == [1, 3, 5]
    assert dataset_steps(directory) == [1, 3, 4, 5]


def test_a_step_that_reaches_the_persistent_tier_later_has_its_dataset_there(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    directory = tmp_path / "datasets"
    manager = opened(persistent_non_replicated_directory=directory)
    for step in (1, 2):
        save_large_dataset(manager, mesh, step)
    assert dataset_steps(directory) == [1]
    save_large_dataset(manager, mesh, 2, force=True)
    with pytest.raises(StepAlreadyExistsError):
        save_large_dataset(manager, mesh, 1, force=True)
    assert dataset_steps(directory) == committed_steps(tmp_path / "bucket") == [1, 2]


def test_the_last_step_is_finished_with_its_dataset(opened: Opener, mesh: Mesh, tmp_path: Path) -> None:
    directory = tmp_path / "datasets"
    manager = opened(persistent_non_replicated_directory=directory)
    save_large_dataset(manager, mesh, 1)
    large = JsonSave({"padding": "x" * 2**20})
    manager.finish(3, Composite(state=ocp.args.PyTreeSave(make_state(mesh, 3)), dataset=large))
    assert dataset_steps(directory) == committed_steps(tmp_path / "bucket") == [1, 3]


@pytest.mark.parametrize("handlers", [NoteHandler(), {"dataset": NoteHandler}])
@pytest.mark.parametrize("length", [10, 2**20])
def test_handlers_by_name_serve_the_directory_of_datasets_too(
    opened: Opener, mesh: Mesh, tmp_path: Path, handlers: Any, length: int
) -> None:
    manager = opened(item_handlers=handlers, persistent_non_replicated_directory=tmp_path / "datasets")
    state = ocp.args.PyTreeSave(make_state(mesh, 5))
    manager.save(5, Composite(state=state, dataset=NoteSave(Note("x" * length))))
    assert len(manager.restore(5, Composite(dataset=NoteRestore())).dataset.text) == length
    assert dataset_steps(tmp_path / "datasets") == [5]


def test_a_dataset_without_a_handler_among_those_by_name_is_an_error_that_says_so(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    directory = tmp_path / "datasets"
    manager = opened(item_handlers={"note": NoteHandler()}, persistent_non_replicated_directory=directory)
    state = ocp.args.PyTreeSave(make_state(mesh, 5))
    with pytest.raises(ConfigError, match=r"item_handlers name \['note'\], and not 'dataset'"):
        manager.save(5, Composite(state=state, dataset=JsonSave({})))


def test_a_small_dataset_comes_back_with_a_step_of_the_ramdisk(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    manager = opened(persistent_non_replicated_directory=tmp_path / "datasets")
    save_with_items(manager, mesh, 10, grain_iterator())
    iterator = grain_iterator()
    next(iterator)
    save_with_items(manager, mesh, 12, iterator)
    manager = opened(persistent_non_replicated_directory=tmp_path / "datasets")
    found = manager.restore(None, Composite(dataset=CheckpointRestore(grain_iterator())))
    assert next(found.dataset) == 1
    assert sorted(p.name for p in (tmp_path / "datasets").iterdir()) == ["10"]


def test_items_and_extras_share_one_limit(opened: Opener, mesh: Mesh) -> None:
    state = ocp.args.PyTreeSave(make_state(mesh, 2))
    with pytest.raises(ExtrasError, match="the largest is 'about'"):
        opened().save(
            2, Composite(state=state, about=JsonSave({"x": "y" * 2**20})), extras={"small": np.ones(3)}
        )


def test_a_step_that_is_nowhere_is_still_an_error_of_its_own(opened: Opener) -> None:
    with pytest.raises(NoRestorableStepError):
        opened().restore(None, Composite(about=JsonRestore()))
