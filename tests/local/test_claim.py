"""One writer per directory: closed stores, second managers, forked children, trainers that are slow to exit."""

from __future__ import annotations

import contextlib
import os
import signal
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
from emergency_ckpt.errors import LocalDirectoryError
from emergency_ckpt.local.store import LocalStore, StoreOptions
from tests.local.test_store import NO_WAIT, assert_restorable, fill, make_layout, manifests_on_disk, save


class Stores:
    """Opens stores on one directory as managers of this process would, and closes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[str] = []
        self.opened: list[LocalStore] = []

    def open(self, takeover_wait: timedelta = timedelta(seconds=60), **options: timedelta) -> LocalStore:
        chosen = StoreOptions(self.path, 1, 3, 2, takeover_wait=takeover_wait, **options)  # type: ignore[arg-type]
        self.opened.append(LocalStore(chosen, "run-a", make_layout(), 0, self.messages.append))
        return self.opened[-1]


@pytest.fixture
def stores(ramdisk: Path) -> Iterator[Stores]:
    stores = Stores(ramdisk)
    yield stores
    for store in stores.opened:
        store.close()


def test_a_closed_store_changes_nothing_on_disk(stores: Stores) -> None:
    store = stores.open()
    save(store, StepId(1, 1))
    save(store, StepId(1, 2), outcome=None)
    pinned = store.pin(StepId(1, 2))
    assert pinned is not None
    slot, _ = store.begin(StepId(1, 3), NO_WAIT)
    assert slot is not None
    manifest = fill(store, slot)
    before = manifests_on_disk(stores.path)
    store.close()
    store.close()
    with pytest.raises(LocalDirectoryError, match="is closed"):
        store.begin(StepId(1, 4), NO_WAIT)
    with pytest.raises(LocalDirectoryError, match="is closed"):
        store.seal(slot, manifest)
    with pytest.raises(LocalDirectoryError, match="is closed"):
        store.pin(StepId(1, 1))
    with pytest.raises(LocalDirectoryError, match="is closed"):
        _ = slot.data
    store.discard(slot)
    store.unpin(pinned.index)
    store.settle(StepId(1, 2), Outcome.ABANDONED)
    store.give_up(StepId(1, 1))
    store.delete(1)
    store.activate([Activation(2, None)])
    assert manifests_on_disk(stores.path) == before
    assert {h.step for h in stores.open().verify()} == {StepId(1, 1), StepId(1, 2)}


def test_closing_wakes_who_waits_for_a_slot(stores: Stores) -> None:
    store = stores.open()
    for step in (1, 2, 3):
        save(store, StepId(1, step), outcome=None)
    raised: list[LocalDirectoryError] = []

    def wait_for_a_slot() -> None:
        try:
            store.begin(StepId(1, 4), timedelta(minutes=5))
        except LocalDirectoryError as error:
            raised.append(error)

    waiting = threading.Thread(target=wait_for_a_slot)
    waiting.start()
    store.close()
    waiting.join(60)
    assert not waiting.is_alive()
    assert "is closed" in str(raised[0])


def test_a_second_manager_of_the_process_takes_the_directory_over(stores: Stores) -> None:
    first = stores.open()
    save(first, StepId(1, 1))
    save(first, StepId(1, 2), outcome=None)
    second = stores.open()
    assert [h.step for h in second.verify()] == [StepId(1, 1), StepId(1, 2)]
    for refused in (lambda: first.begin(StepId(1, 3), NO_WAIT), lambda: first.pin(StepId(1, 1))):
        with pytest.raises(LocalDirectoryError, match="taken over by a newer manager"):
            refused()
    first.settle(StepId(1, 2), Outcome.ABANDONED)
    first.give_up(StepId(1, 1))
    first.close()
    assert sorted(manifests_on_disk(stores.path).values()) == [1, 2]
    for step in (3, 4, 5):
        assert save(second, StepId(2, step))
        assert_restorable(second, StepId(2, step))


def test_a_takeover_waits_for_the_slot_that_is_being_written(stores: Stores) -> None:
    """While it waits nothing new is begun; what was begun may be sealed and is found by the newer manager."""
    first = stores.open()
    slot, _ = first.begin(StepId(1, 1), NO_WAIT)
    assert slot is not None
    taken: list[LocalStore] = []
    taking = threading.Thread(target=lambda: taken.append(stores.open()))
    taking.start()

    def begin_until_refused() -> None:
        while True:  # Ends as soon as the takeover has begun, and by the limit of tests if it never does.
            other, _ = first.begin(StepId(1, 2), NO_WAIT)
            assert other is not None
            first.discard(other)

    with pytest.raises(LocalDirectoryError, match="taken over by a newer manager"):
        begin_until_refused()
    assert not taken
    first.seal(slot, fill(first, slot))
    taking.join(60)
    assert [h.step for h in taken[0].verify()] == [StepId(1, 1)]
    assert_restorable(taken[0], StepId(1, 1))


@pytest.mark.parametrize("unsettled", ["written", "drained"])
def test_a_takeover_from_a_manager_that_goes_on_writing_is_refused(stores: Stores, unsettled: str) -> None:
    first = stores.open()
    save(first, StepId(1, 1))
    slot = first.begin(StepId(1, 2), NO_WAIT)[0] if unsettled == "written" else None
    pinned = first.pin(StepId(1, 1)) if unsettled == "drained" else None
    with pytest.raises(LocalDirectoryError, match=r"still writing or draining 1 slots .* Close it"):
        stores.open(takeover_wait=NO_WAIT)
    if slot:
        first.seal(slot, fill(first, slot))
        first.settle(StepId(1, 2), Outcome.COMPLETE)
    if pinned:
        first.unpin(pinned.index)
    assert save(first, StepId(1, 3)), "the manager that stays can go on"
    assert StepId(1, 3) in {h.step for h in stores.open(takeover_wait=NO_WAIT).verify()}


def test_a_writer_that_outlives_its_store_does_not_reach_the_memory_of_the_next_one(stores: Stores) -> None:
    first = stores.open()
    slots = [first.begin(StepId(1, step), NO_WAIT)[0] for step in (1, 2, 3)]
    memories = [slot.data for slot in slots if slot is not None]
    assert len(memories) == 3
    first.close()
    second = stores.open(takeover_wait=NO_WAIT)
    assert second.directory == stores.path / "emergency_ckpt/0"
    assert save(second, StepId(2, 1))
    for memory in memories:
        memory[:] = 1
    assert_restorable(second, StepId(2, 1))


HOLDER = """
    import os, sys
    sys.path.insert(0, sys.argv[2])
    from tests.local.test_store import *
    store = LocalStore(StoreOptions(Path(sys.argv[1]), 1, 3, 2), "run-a", make_layout(), 0, print)
    assert save(store, StepId(1, 1))
    if sys.argv[3] == "forks" and os.fork() == 0:
        os.write(1, b"child\\n")
        sys.stdin.read()
        os._exit(0)
    os.write(1, b"holds\\n")
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(root: Path, does: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that saved a step in the directory and keeps it locked until its standard input ends."""
    arguments = [textwrap.dedent(HOLDER), str(root), str(Path(__file__).parents[2]), does]
    with subprocess.Popen(
        [sys.executable, "-c", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(2 if does == "forks" else 1)]
        assert "holds\n" in said
        yield process
        process.kill()


def test_a_forked_child_does_not_keep_the_directory_of_a_killed_trainer(stores: Stores) -> None:
    with holder(stores.path, "forks") as trainer:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait(60)
        # The child lives: it reads the standard input that ends with this block.
        store = stores.open(lock_wait=NO_WAIT)
        assert stores.messages == []
        assert store.directory == stores.path / "emergency_ckpt/0"
        assert [h.step for h in store.verify()] == [StepId(1, 1)]


FORKING = """
    import os, sys
    sys.path.insert(0, sys.argv[2])
    from tests.local.test_store import *
    store = LocalStore(StoreOptions(Path(sys.argv[1]), 1, 3, 2), "run-a", make_layout(), 0, print)
    if (child := os.fork()) == 0:
        try:
            store.begin(StepId(1, 1), NO_WAIT)
        except LocalDirectoryError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert save(store, StepId(1, 1))
"""


def test_a_forked_child_takes_no_slot_of_its_parent(stores: Stores) -> None:
    arguments = [textwrap.dedent(FORKING), str(stores.path), str(Path(__file__).parents[2])]
    subprocess.run([sys.executable, "-c", *arguments], check=True, timeout=60)
    assert [h.step for h in stores.open().verify()] == [StepId(1, 1)]


def test_the_lock_of_a_trainer_that_is_slow_to_exit_is_waited_for(stores: Stores, ramdisk: Path) -> None:
    messages: list[str] = []
    with holder(ramdisk, "waits") as trainer:

        def end_it(message: str) -> None:
            messages.append(message)
            trainer.kill()

        options = StoreOptions(ramdisk, 1, 3, 2, lock_wait=timedelta(seconds=60))
        store = LocalStore(options, "run-a", make_layout(), 0, end_it)
        stores.opened.append(store)
    assert ["has locked it" in message for message in messages] == [True]
    assert store.directory == ramdisk / "emergency_ckpt/0"
    assert [h.step for h in store.verify()] == [StepId(1, 1)]


def test_a_directory_that_stays_locked_is_passed_over_loudly(stores: Stores) -> None:
    with holder(stores.path, "waits") as trainer:
        store = stores.open(lock_wait=NO_WAIT)
    assert store.directory == stores.path / "emergency_ckpt/1"
    assert f"is still locked by process {trainer.pid} (" in stores.messages[-2]
    assert "after 0 s and is passed over" in stores.messages[-2]
    assert "They share the ramdisk" in stores.messages[-1]


def test_a_stopped_process_that_holds_the_lock_is_waited_for_with_a_limit_and_named(stores: Stores) -> None:
    with holder(stores.path, "waits") as trainer:
        trainer.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, trainer.pid, os.WSTOPPED)
        store = stores.open(lock_wait=timedelta(milliseconds=1))
        trainer.send_signal(signal.SIGCONT)
    assert store.directory == stores.path / "emergency_ckpt/1"
    waiting, passed_over, _ = stores.messages
    assert f"process {trainer.pid} (" in waiting
    assert "is stopped (SIGCONT lets it go on)" in passed_over


def test_a_locked_directory_without_steps_of_this_run_is_passed_over_at_once(stores: Stores) -> None:
    with holder(stores.path, "waits") as trainer:
        options = StoreOptions(stores.path, 1, 3, 2, lock_wait=timedelta(minutes=10))
        store = LocalStore(options, "run-b", make_layout(), 0, stores.messages.append)
        stores.opened.append(store)
    (message,) = stores.messages
    assert f"is in use by process {trainer.pid} (" in message
