"""Somebody empties, replaces or takes away the directory under a live store: it notices and goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import LocalDirectoryError
from emergency_ckpt.local.manifest import Manifest
from tests.local.test_store import (
    NO_WAIT,
    Directory,
    assert_restorable,
    content,
    directory,
    fill,
    make_layout,
    manifests_on_disk,
    save,
    store_files,
)

__all__ = ["directory"]


def step(number: int) -> StepId:
    return StepId(1, number)


def manifest_of(root: Path, number: int) -> Path:
    paths = root.glob("emergency_ckpt/*/slot_*.manifest")
    return next(p for p in paths if Manifest.from_bytes(p.read_bytes(), "test").step.step == number)


def empty(root: Path) -> None:
    for path in (root / "emergency_ckpt/0").iterdir():
        path.unlink()


def remove(root: Path) -> None:
    shutil.rmtree(root / "emergency_ckpt")


def replace(root: Path) -> None:
    remove(root)
    (root / "emergency_ckpt/0").mkdir(parents=True)
    (root / "emergency_ckpt/0/lock").touch()


@pytest.mark.parametrize("do", [empty, remove, replace])
def test_a_directory_that_was_emptied_is_made_anew_at_the_next_save(
    directory: Directory, do: Callable[[Path], None]
) -> None:
    store = directory.open()
    for number in (1, 2):
        save(store, step(number))
    do(directory.path)
    assert save(store, step(3), outcome=None)
    assert_restorable(store, step(3))
    assert store.sealed_steps() == (step(3),)
    assert store.sealed(step(2)) is None
    assert [h.step for h in store.verify()] == [step(3)]
    said = "\n".join(directory.messages)
    assert "was emptied, replaced or taken away while this manager uses it" in said
    for number in (1, 2):
        assert f"{step(number)} in slot" in said
    assert save(store, step(4), outcome=None)
    assert save(store, step(5), outcome=None)
    assert directory.messages == said.split("\n"), "it is said once"
    assert [h.step for h in directory.open().verify()] == [step(3), step(4), step(5)]


def test_what_was_lost_no_longer_speaks_for_overwriting_what_is_left(directory: Directory) -> None:
    store = directory.open(wanted_slots=2)
    for number in (1, 2):
        save(store, step(number))
    manifest_of(directory.path, 2).with_suffix(".data").unlink()
    assert save(store, step(3), outcome=None)
    assert store.sealed_steps() == (step(1), step(3))
    assert not save(store, step(4))
    store.settle(step(3), Outcome.COMPLETE)
    assert save(store, step(4))


def test_losses_are_noticed_when_the_store_is_verified(directory: Directory) -> None:
    store = directory.open()
    save(store, step(1))
    empty(directory.path)
    assert store.verify() == ()
    assert store.sealed_steps() == ()
    assert save(store, step(2))


def test_a_drain_goes_on_reading_a_slot_that_was_lost(directory: Directory) -> None:
    store = directory.open()
    save(store, step(1))
    pinned = store.pin(step(1))
    assert pinned is not None
    remove(directory.path)
    assert save(store, step(2))
    assert store.sealed_steps() == (step(2),)
    assert store.pin(step(1)) is None
    assert "a drain that reads it goes on" in "\n".join(directory.messages)
    assert pinned.find_damage() is None
    assert_restorable(store, step(1))
    store.unpin(pinned.index)
    assert store.sealed(step(1)) is None
    for number in (3, 4, 5):
        assert save(store, step(number), outcome=None) == (number < 5)
        assert (pinned.shard(0) == content(pinned.layout.shards[0], 1, pinned.shard(0).nbytes)).all()


def test_a_save_that_was_being_written_is_refused_and_the_next_one_goes_through(directory: Directory) -> None:
    store = directory.open()
    save(store, step(1))
    slot, _ = store.begin(step(2), NO_WAIT)
    assert slot is not None
    manifest = fill(store, slot)
    remove(directory.path)
    with pytest.raises(LocalDirectoryError, match="was emptied or replaced while step 2"):
        store.seal(slot, manifest)
    store.discard(slot)
    assert save(store, step(3))
    assert [h.step for h in directory.open().verify()] == [step(3)]


def test_a_slot_that_lost_its_file_while_written_is_not_sealed(directory: Directory) -> None:
    store = directory.open()
    slot, _ = store.begin(step(1), NO_WAIT)
    assert slot is not None
    manifest = fill(store, slot)
    for path in store_files(directory.path):
        path.unlink()
    with pytest.raises(LocalDirectoryError, match="was emptied or replaced"):
        store.seal(slot, manifest)
    assert manifests_on_disk(directory.path) == {}
    store.discard(slot)
    assert save(store, step(2))


def test_a_manifest_that_alone_was_removed_is_written_again(directory: Directory) -> None:
    store = directory.open()
    for number in (1, 2):
        save(store, step(number))
    manifest_of(directory.path, 2).unlink()
    assert save(store, step(3))
    assert "the manifest of step 2 (generation 1) was removed" in "\n".join(directory.messages)
    assert sorted(manifests_on_disk(directory.path).values()) == [1, 2, 3]
    assert [h.step for h in directory.open().verify()] == [step(1), step(2), step(3)]


def test_a_layout_file_that_alone_was_removed_is_written_again(directory: Directory) -> None:
    store = directory.open()
    save(store, step(1))
    next(directory.path.glob("emergency_ckpt/0/layout_*.json")).unlink()
    save(store, step(2))
    assert "was removed from" in directory.messages[-1]
    store = directory.open(make_layout(70_000))
    assert {h.step for h in store.verify()} == {step(1), step(2)}, "another job shape reads the layout file"


def test_a_slot_file_that_was_cut_is_lost_and_replaced(directory: Directory) -> None:
    store = directory.open()
    for number in (1, 2):
        save(store, step(number))
    os.truncate(manifest_of(directory.path, 2).with_suffix(".data"), 100)
    assert save(store, step(3))
    assert store.sealed_steps() == (step(1), step(3))


def test_without_the_ramdisk_the_save_is_refused_and_a_later_one_tries_again(directory: Directory) -> None:
    store = directory.open()
    save(store, step(1))
    aside = directory.path.with_name(directory.path.name + "-aside")
    directory.path.rename(aside)
    for number in (2, 3):
        with pytest.raises(LocalDirectoryError, match=r"does not exist\. Mount the ramdisk there"):
            store.begin(step(number), NO_WAIT)
        assert store.sealed_steps() == ()
    assert not directory.path.exists(), "what is no ramdisk must not be filled"
    shutil.rmtree(aside)
    directory.path.mkdir()
    assert save(store, step(4))
    assert [h.step for h in directory.open().verify()] == [step(4)]


OTHER_JOB = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from tests.local.test_store import *
    store = LocalStore(StoreOptions(Path(sys.argv[1]), 1, 3, 2), "run-b", make_layout(), 0, lambda m: None)
    assert save(store, StepId(1, 1), run="run-b")
    print(store.directory.name, flush=True)
    sys.stdin.read()
    assert store.verify()
    store.close()
"""


@contextlib.contextmanager
def other_job(root: Path) -> Iterator[subprocess.Popen[str]]:
    arguments = [textwrap.dedent(OTHER_JOB), str(root), str(Path(__file__).parents[2])]
    with subprocess.Popen(
        [sys.executable, "-c", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "0\n", "it takes the path that was emptied"
        yield process
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.mark.parametrize("do", [empty, remove])
def test_another_job_that_took_the_path_meanwhile_keeps_it(
    directory: Directory, do: Callable[[Path], None]
) -> None:
    store = directory.open()
    for number in (1, 2):
        save(store, step(number))
    slot, _ = store.begin(step(3), NO_WAIT)
    assert slot is not None
    manifest = fill(store, slot)
    do(directory.path)
    with other_job(directory.path) as other:
        before = manifests_on_disk(directory.path)
        with pytest.raises(LocalDirectoryError, match="was emptied or replaced"):
            store.seal(slot, manifest)
        store.discard(slot)
        with pytest.raises(LocalDirectoryError, match=f"and then process {other.pid} .*locked it"):
            store.begin(step(4), NO_WAIT)
        assert store.sealed_steps() == ()
        store.delete(2)
        store.settle(step(2), Outcome.ABANDONED)
        directory.close()
        assert manifests_on_disk(directory.path) == before
    assert [h.step for h in directory.open(run="run-b").verify()] == [step(1)]


def test_a_second_manager_takes_over_a_directory_that_was_emptied(directory: Directory) -> None:
    first = directory.open()
    save(first, step(1))
    remove(directory.path)
    second = Directory(directory.path)
    store = second.open()
    assert store.verify() == ()
    assert save(store, step(2))
    first.settle(step(1), Outcome.ABANDONED)
    first.close()
    assert [h.step for h in store.verify()] == [step(2)]
    second.close()
