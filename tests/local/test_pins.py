"""A slot that another process drains is not overwritten until that process lets it go, or dies."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import CorruptDataError, LocalDirectoryError
from emergency_ckpt.local.pins import SlotPin, pin_slot
from emergency_ckpt.local.store import LocalStore
from tests.local.test_store import (
    NO_WAIT,
    SIZE,
    Directory,
    assert_restorable,
    content,
    directory,
    make_layout,
    manifests_on_disk,
    save,
)

__all__ = ["directory"]
A_MINUTE = timedelta(minutes=1)
DRAINED = "slot 0 is being drained by another process"


def step(number: int) -> StepId:
    return StepId(1, number)


def pin(store: LocalStore, number: int, slot: int = 0) -> SlotPin:
    assert store.directory is not None
    pinned = pin_slot(store.directory, slot, "run-a", step(number))
    assert pinned is not None
    return pinned


def two_slots(directory: Directory) -> LocalStore:
    store = directory.open(wanted_slots=2)
    for number in (1, 2):
        assert save(store, step(number))
    return store


DRAINING = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from tests.local.test_store import *
    from emergency_ckpt.local.pins import pin_slot
    pin = pin_slot(Path(sys.argv[1]), 0, "run-a", StepId(1, 1))
    assert pin is not None
    slot = pin.open(make_layout())
    print("pinned", flush=True)
    sys.stdin.read()
    assert slot.find_damage() is None
    pin.close()
"""


@contextlib.contextmanager
def draining(store: LocalStore) -> Iterator[subprocess.Popen[str]]:
    """Another process, which has pinned step 1 in slot 0 until its input ends."""
    arguments = [textwrap.dedent(DRAINING), str(store.directory), str(Path(__file__).parents[2])]
    with subprocess.Popen(
        [sys.executable, "-c", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "pinned\n"
        yield process


def begun_when(store: LocalStore, ends: object) -> int:
    """The slot that a waiting `begin` gets once `ends` is called."""
    opened: list[int] = []

    def wait() -> None:
        slot, _ = store.begin(step(3), A_MINUTE)
        assert slot is not None
        opened.append(slot.index)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert callable(ends)
    ends()
    waiting.join(60)
    return opened[0]


def test_a_slot_drained_by_another_process_is_not_taken_until_that_ends(directory: Directory) -> None:
    store = two_slots(directory)
    with draining(store) as process:
        slot, reason = store.begin(step(3), NO_WAIT)
        assert slot is None
        assert DRAINED in reason
        assert_restorable(store, step(1))
        assert process.stdin is not None
        assert begun_when(store, process.stdin.close) == 0
        assert process.wait(60) == 0, "it read the bytes that it had pinned"


def test_the_pin_of_a_process_that_is_killed_is_gone(directory: Directory) -> None:
    store = two_slots(directory)
    with draining(store) as process:
        assert not save(store, step(3))
        assert begun_when(store, process.kill) == 0


def test_another_slot_is_taken_where_there_is_one(directory: Directory) -> None:
    store = directory.open(wanted_slots=3)
    for number in (1, 2, 3):
        assert save(store, step(number))
    with pin(store, 1):
        slot, _ = store.begin(step(4), NO_WAIT)
        assert slot is not None
        assert slot.index == 1


@pytest.mark.parametrize("how", ["abandon", "delete", "void", "give up"])
def test_a_step_that_is_given_up_stays_readable_for_the_other_process(directory: Directory, how: str) -> None:
    store = directory.open(wanted_slots=2)
    assert save(store, step(1), outcome=None)
    with pin(store, 1) as pinned:
        slot = pinned.open(make_layout())
        if how == "abandon":
            store.settle(step(1), Outcome.ABANDONED)
        elif how == "delete":
            store.delete(1)
        elif how == "void":
            store.activate([Activation(2, None)])
        else:
            store.give_up(step(1))
        for number in (2, 3, 4):
            assert save(store, StepId(2, number), outcome=None) == (number == 2)
        assert DRAINED in store.begin(StepId(2, 9), NO_WAIT)[1]
        assert slot.find_damage() is None
    assert save(store, StepId(2, 5), outcome=None)


@pytest.mark.parametrize("size", [SIZE // 2, SIZE, 3 * SIZE])
def test_a_pin_outlives_the_owner_and_protects_from_the_next_one(directory: Directory, size: int) -> None:
    store = two_slots(directory)
    with pin(store, 1) as pinned:
        slot = pinned.open(make_layout())
        store.delete(1)
        for run in ("run-a", "run-b"):
            later = directory.open(make_layout(size), run=run, wanted_slots=2)
            later.activate([Activation(2, None)])
            taken = [save(later, StepId(2, number), outcome=None, run=run) for number in range(4)]
            assert taken.count(True) <= 2
            assert slot.find_damage() is None
    assert pin_slot(directory.path / "emergency_ckpt/0", 0, "run-a", step(1)) is None


def test_another_runs_step_that_is_being_drained_is_not_overwritten(directory: Directory) -> None:
    two_slots(directory)
    directory.close()
    where = directory.path / "emergency_ckpt/0"
    pinned = pin_slot(where, 0, "run-a", step(1))
    assert pinned is not None
    with pinned:
        slot = pinned.open(make_layout())
        store = directory.open(run="run-b", wanted_slots=2)
        assert [save(store, step(n), outcome=None, run="run-b") for n in (7, 8)] == [True, False]
        assert sorted(manifests_on_disk(directory.path).values()) == [1, 7]
        assert slot.find_damage() is None
    assert save(store, step(8), outcome=None, run="run-b")


def test_only_what_was_asked_for_is_pinned(directory: Directory) -> None:
    store = two_slots(directory)
    where = store.directory
    assert where is not None
    assert pin_slot(where, 0, "run-b", step(1)) is None
    assert pin_slot(where, 0, "run-a", step(2)) is None
    assert pin_slot(where, 0, "run-a", StepId(2, 1)) is None
    assert pin_slot(where, 7, "run-a", step(1)) is None
    assert pin_slot(where / "absent", 0, "run-a", step(1)) is None
    manifest = where / "slot_0.manifest"
    written = manifest.read_bytes()
    manifest.write_bytes(written[:-3])
    assert pin_slot(where, 0, "run-a", step(1)) is None
    manifest.write_bytes(written)
    (where / "slot_0.data").rename(where / "aside")
    assert pin_slot(where, 0, "run-a", step(1)) is None
    os.mkfifo(where / "slot_0.data")
    assert pin_slot(where, 0, "run-a", step(1)) is None, "and a fifo is not waited for"


def test_a_closed_pin_gives_nothing_and_protects_nothing(directory: Directory) -> None:
    store = two_slots(directory)
    pinned = pin(store, 1)
    kept = pinned.open(make_layout()).shard(0)
    with pytest.raises(CorruptDataError, match="names layout"):
        pinned.open(make_layout(7))
    pinned.close()
    pinned.close()
    with pytest.raises(LocalDirectoryError, match="pin it again"):
        pinned.open(make_layout())
    assert save(store, step(3))
    assert (kept == content(make_layout().shards[0], 3, SIZE)).all(), "it is read-only, and shows what is there"
    assert not kept.flags.writeable


def test_several_processes_pin_one_slot_and_the_last_one_lets_it_go(directory: Directory) -> None:
    store = two_slots(directory)
    first, second = pin(store, 1), pin(store, 1)
    first.close()
    assert not save(store, step(3))
    second.close()
    assert save(store, step(3))


def fork_with_a_pin(path: str) -> None:
    """Runs in a process of its own: one that has threads, as pytest's may, must not fork."""
    held = Directory(Path(path))
    store = two_slots(held)
    pinned = pin(store, 1)
    end, ends = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ends)
        os.read(end, 1)  # Until the parent has closed its end.
        os._exit(0)
    try:
        pinned.close()
        assert save(store, step(3))
    finally:
        os.close(ends)
        os.waitpid(child, 0)
    held.close()


def test_a_forked_child_keeps_no_pin(directory: Directory) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
    code += f"from tests.local.test_pins import fork_with_a_pin; fork_with_a_pin({str(directory.path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


RACING = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from tests.local.test_store import *
    from emergency_ckpt.local.manifest import read_manifest
    from emergency_ckpt.local.pins import pin_slot
    where, count = Path(sys.argv[1]), 0
    print("ready", flush=True)
    while count < 60:
        for number in range(3):
            manifest = read_manifest(where / f"slot_{number}.manifest")
            pin = manifest and pin_slot(where, number, "run-a", manifest.step)
            if pin:
                with pin:
                    damage = pin.open(make_layout()).find_damage()
                    assert damage is None, damage
                count += 1
"""


def test_pins_and_saves_that_race_never_meet(directory: Directory) -> None:
    """Whatever was pinned is whole while it is pinned, and the saves go on."""
    store = directory.open()
    assert save(store, step(0))
    arguments = [textwrap.dedent(RACING), str(store.directory), str(Path(__file__).parents[2])]
    with subprocess.Popen([sys.executable, "-c", *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        number = saved = 0
        while process.poll() is None:
            number += 1
            saved += save(store, step(number))
        assert process.returncode == 0
    assert saved > 0
    assert save(store, step(number + 1))
