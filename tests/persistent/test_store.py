"""The persistent root: one run id, unique generations, activations, steps and what is left of attempts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError, StaleGenerationError
from emergency_ckpt.persistent.attempts import Attempt, StepNames
from emergency_ckpt.persistent.files import Entry, LocalFiles
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.store import PersistentStore, without_void
from tests.persistent.saving import assert_same, read_shards, save, small_state

RACE = """
import sys
from emergency_ckpt.persistent.store import PersistentStore
for i in range(25):
    store = PersistentStore(f"{sys.argv[1]}/{i}")
    print(store.run_id(), store.mint_generation(0, None).number)
"""


def test_racing_processes_get_one_run_id_and_different_generations(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    lines = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    for together in zip(*lines, strict=True):
        run_ids, numbers = zip(*(line.split() for line in together), strict=True)
        assert len(set(run_ids)) == 1
        assert sorted(numbers) == ["1", "2", "3"]


def test_a_run_id_stays_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    run_id = PersistentStore(tmp_path).run_id()
    assert PersistentStore(tmp_path).run_id() == run_id
    (tmp_path / "emergency_ckpt/run_id").write_text(run_id[:8])
    with pytest.raises(CorruptDataError, match="should hold a UUID"):
        PersistentStore(tmp_path).run_id()


def test_a_generation_is_above_all_that_was_seen_and_keeps_its_parent(tmp_path: Path) -> None:
    store = PersistentStore(tmp_path)
    assert store.newest_generation() is None
    first = store.mint_generation(0, None)
    second = store.mint_generation(7, StepId(1, 40))
    third = store.mint_generation(2, StepId(0, 40))
    assert [g.number for g in (first, second, third)] == [1, 8, 9]
    assert store.newest_generation() == third
    assert len({first.nonce, second.nonce, third.nonce}) == 3


def test_a_run_id_that_a_crash_left_empty_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "emergency_ckpt").mkdir()
    (tmp_path / "emergency_ckpt/run_id").write_text("")
    run_id = PersistentStore(tmp_path).run_id()
    assert str(uuid.UUID(run_id)) == run_id
    assert PersistentStore(tmp_path).run_id() == run_id


def cut_short(path: Path, left: int) -> None:
    """What a writer leaves that dies between opening the file's final name and its last byte."""
    path.write_bytes(path.read_bytes()[:left])


@pytest.mark.parametrize("left", [0, 1, 20])
def test_a_generation_whose_record_was_cut_short_is_burnt(tmp_path: Path, left: int) -> None:
    store = PersistentStore(tmp_path)
    first = store.mint_generation(0, None)
    store.mint_generation(1, None)
    cut_short(tmp_path / "emergency_ckpt/generations/00000002.json", left)
    with pytest.raises(StaleGenerationError, match=r"the newest in .* is 2 \(unknown\)"):
        store.check_generation(Attempt(first, 10, "default"))
    third = store.mint_generation(0, None)
    assert third.number == 3
    store.check_generation(Attempt(third, 10, "default"))


@pytest.mark.parametrize("left", [0, 1, 20])
def test_an_activation_that_was_cut_short_was_not_written(tmp_path: Path, left: int) -> None:
    store = PersistentStore(tmp_path)
    store.record_activation(Activation(1, None))
    store.record_activation(Activation(2, 10))
    cut_short(tmp_path / "emergency_ckpt/activations/00000002.json", left)
    assert store.activations() == (Activation(1, None),)
    store.record_activation(Activation(2, 20))
    assert store.activations() == (Activation(1, None), Activation(2, 20))


def test_the_next_generation_starts_after_an_activation_that_was_cut_short(tmp_path: Path) -> None:
    store = PersistentStore(tmp_path)
    store.record_activation(Activation(1, None))
    store.record_activation(Activation(2, 10))
    cut_short(tmp_path / "emergency_ckpt/activations/00000002.json", 0)
    store.record_activation(Activation(3, 5))
    assert store.activations() == (Activation(1, None), Activation(3, 5))
    store.record_activation(Activation(4, 6))
    assert store.activations() == (Activation(1, None), Activation(3, 5), Activation(4, 6))


def test_a_damaged_older_activation_is_refused(tmp_path: Path) -> None:
    store = PersistentStore(tmp_path)
    for activation in (Activation(1, None), Activation(2, 10)):
        store.record_activation(activation)
    cut_short(tmp_path / "emergency_ckpt/activations/00000001.json", 20)
    with pytest.raises(CorruptDataError, match=r"00000001.json is damaged"):
        store.activations()


def test_an_activation_is_recorded_once(tmp_path: Path) -> None:
    store = PersistentStore(tmp_path)
    for activation in (Activation(3, 20), Activation(1, None), Activation(3, 20)):
        store.record_activation(activation)
    assert store.activations() == (Activation(1, None), Activation(3, 20))
    with pytest.raises(PersistentStoreError, match="generation 3 began from step 20, not 30"):
        store.record_activation(Activation(3, 30))


def test_void_steps_are_listed_until_they_are_filtered_out(tmp_path: Path) -> None:
    store = PersistentStore(tmp_path)
    first = store.mint_generation(0, None)
    for step in (10, 20, 30):
        save(store, Attempt(first, step, "default"), small_state(step))
    second = store.mint_generation(1, StepId(1, 10))
    store.record_activation(Activation(2, 10))
    save(store, Attempt(second, 15, "default"), small_state(15))
    assert [s.step_id for s in store.steps()] == [StepId(1, 10), StepId(1, 20), StepId(1, 30), StepId(2, 15)]
    left = without_void(store.steps(), store.activations())
    assert [s.step_id for s in left] == [StepId(1, 10), StepId(2, 15)]
    store.delete_step(left[0])
    store.delete_step(left[0])
    assert not Path(left[0].location).exists()
    assert [s.step_id.step for s in store.steps()] == [20, 30, 15]


def test_a_step_that_is_deleted_while_it_is_listed_is_not_taken_for_another_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PersistentStore(tmp_path)
    save(store, Attempt(store.mint_generation(0, None), 5, "default"), small_state(5))
    listing = LocalFiles.entries
    met: list[str] = []

    def entries(files: LocalFiles, path: str = "") -> list[Entry]:
        """Of the step a listing as one gets it from a directory whose files are just being deleted."""
        found = listing(files, path)
        if path != "5" or met:
            return found
        met.append(path)
        (tmp_path / "5").rename(tmp_path / "gone")
        return [entry for entry in found if not entry.name.startswith("emergency_ckpt")]

    monkeypatch.setattr(LocalFiles, "entries", entries)
    assert store.steps() == []
    assert met


def test_a_void_step_is_replaced_and_a_valid_one_is_not(tmp_path: Path) -> None:
    store = PersistentStore(tmp_path)
    first = store.mint_generation(0, None)
    save(store, Attempt(first, 10, "default"), small_state(1))
    save(store, Attempt(first, 20, "default"), small_state(2))
    second = store.mint_generation(1, StepId(1, 10))
    with pytest.raises(
        PersistentStoreError, match=r"holds step 20 \(generation 1\), which no restore made void"
    ):
        save(store, Attempt(second, 20, "default"), small_state(3))
    store.record_activation(Activation(2, 10))
    save(store, Attempt(second, 20, "default", ordinal=1), small_state(3))
    assert [s.step_id for s in store.steps()] == [StepId(1, 10), StepId(2, 20)]
    assert_same(read_shards(StepReader(tmp_path / "20")), small_state(3))
    with pytest.raises(PersistentStoreError, match="which no restore made void"):
        save(store, Attempt(second, 10, "default"), small_state(4))
    assert_same(read_shards(StepReader(tmp_path / "10")), small_state(1))


def test_a_generation_that_was_replaced_cannot_commit(tmp_path: Path) -> None:
    store = PersistentStore(tmp_path)
    old = store.mint_generation(0, None)
    store.mint_generation(1, None)
    with pytest.raises(StaleGenerationError, match=r"of generation 1 .* the newest in .* is 2"):
        save(store, Attempt(old, 10, "default"), small_state())
    assert store.steps() == []


def test_leftovers_of_older_generations_go_and_everything_else_stays(tmp_path: Path) -> None:
    store = PersistentStore(tmp_path)
    old = store.mint_generation(0, None)
    save(store, Attempt(old, 1, "default"), small_state())
    store.begin(Attempt(old, 10, "default"))
    new = store.mint_generation(1, None)
    store.begin(Attempt(new, 10, "default"))
    (tmp_path / "11.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "7.orbax-checkpoint-tmp-removed-0abc").mkdir()
    removed = store.remove_leftovers(new)
    assert sorted(removed) == [
        f"10.orbax-checkpoint-tmp-g1-{old.nonce}-0",
        "7.orbax-checkpoint-tmp-removed-0abc",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1",
        f"10.orbax-checkpoint-tmp-g2-{new.nonce}-0",
        "11.orbax-checkpoint-tmp",
        "emergency_ckpt",
    ]
    store.abandon(Attempt(new, 10, "default"))
    assert not (tmp_path / f"10.orbax-checkpoint-tmp-g2-{new.nonce}-0").exists()


class Noting(LocalFiles):
    """Files that note what is read."""

    read_paths: ClassVar[list[str]] = []

    def read(self, path: str) -> bytes:
        self.read_paths.append(self.locate(path))
        return super().read(path)

    def below(self, path: str) -> Noting:
        return Noting(self.locate(path))


def test_listing_reads_one_record_per_life_and_the_side_files_of_other_runs_once(tmp_path: Path) -> None:
    stores = [PersistentStore(tmp_path / name) for name in ("own", "other")]
    for store, steps in zip(stores, ((10, 20, 30), (40,)), strict=True):
        store.run_id()
        generation = store.mint_generation(0, None)
        for step in steps:
            save(store, Attempt(generation, step, "default"), small_state())
    shutil.copytree(tmp_path / "other/40", tmp_path / "own/40")
    store = PersistentStore(tmp_path / "own", files=Noting(tmp_path / "own"))
    Noting.read_paths.clear()
    for _ in range(3):
        assert [s.step_id for s in store.steps()] == [StepId(0, 40), *(StepId(1, s) for s in (10, 20, 30))]
    assert [s.written_by_us for s in store.steps()] == [False, True, True, True]
    (side,) = (tmp_path / "own/40").glob("emergency_ckpt.[0-9]*.json")
    records = tmp_path / "own/emergency_ckpt"
    assert sorted(Noting.read_paths) == sorted(
        map(str, [records / "generations/00000001.json", side, records / "run_id"])
    )


@given(st.integers(0, 10**9), st.sampled_from([None, "step", "a_b"]), st.sampled_from([None, 1, 6]))
def test_a_step_is_found_under_the_name_it_was_given(step: int, prefix: str | None, digits: int | None) -> None:
    names = StepNames(prefix, digits)
    assert names.step(names.name(step)) == step
    assert names.step(names.name(step) + ".orbax-checkpoint-tmp") is None


@given(st.text(max_size=12))
def test_only_its_own_name_is_a_steps_name(name: str) -> None:
    for names in (StepNames(), StepNames("step"), StepNames(None, 4)):
        step = names.step(name)
        assert step is None or names.name(step) == name


def test_create_gives_the_file_to_one_and_a_file_is_replaced_whole(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    assert files.create("a/b", b"one")
    assert not files.create("a/b", b"two")
    assert files.read("a/b") == b"one"
    files.write("a/b", b"three")
    assert files.read("a/b") == b"three"
    assert [entry.name for entry in files.entries("a")] == ["b"]


def test_a_directory_is_committed_only_to_a_free_name(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write("new/x", b"1")
    files.write("old/x", b"2")
    with pytest.raises(FileExistsError):
        files.rename("new", "old")
    with pytest.raises(FileNotFoundError):
        files.rename("nothing", "other")
    files.rename("new", "other")
    assert files.read("other/x") == b"1"
    assert files.entries("new") == []


def test_a_store_that_cannot_be_written_is_an_error_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = PersistentStore(tmp_path / "file" / "root")
    with pytest.raises(
        PersistentStoreError, match=f"could not create {tmp_path}/file/root/emergency_ckpt/run_id"
    ):
        store.run_id()
