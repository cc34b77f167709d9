"""Repair in place: only what verifies counts, only what is missing is written, a crash costs nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import LocalDirectoryError
from emergency_ckpt.local.pins import pin_slot
from emergency_ckpt.local.repair import RepairSlot
from emergency_ckpt.local.store import LocalStore
from tests.local.partial import (
    OWN,
    SOLID,
    STEP,
    assert_good,
    damaged_store,
    layout,
    manifest_on_disk,
    manifest_paths,
    spoil,
    write,
)
from tests.local.test_store import NO_WAIT, Directory, content, directory, save

__all__ = ["directory"]
A_MINUTE = timedelta(minutes=1)


def begin(store: LocalStore, step: StepId = STEP) -> RepairSlot:
    slot = store.begin_repair(step)
    assert slot is not None
    return slot


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_repair_makes_a_slot_whole_bit_for_bit_whatever_the_order(
    directory: Directory, data: st.DataObject
) -> None:
    bad = data.draw(st.sets(st.sampled_from(SOLID), min_size=1))
    order = data.draw(st.permutations(sorted(bad)))
    store = directory.open(layout())
    store.delete(1)
    assert save(store, STEP)
    path = manifest_paths(directory)[STEP]
    before = path.read_bytes(), path.with_suffix(".data").read_bytes()
    spoil(directory, bad)
    store.verify()
    left = set(bad)
    with contextlib.ExitStack() as stack:
        slot = begin(store)
        stack.callback(store.end_repair, slot)
        while order:
            some, order = order[: (n := data.draw(st.integers(1, len(order))))], order[n:]
            for shard in some:
                write(slot, shard)
            assert store.repaired(slot, some) == ()
            left -= set(some)
            assert slot.missing == tuple(sorted(left))
            assert manifest_on_disk(directory).missing == tuple(OWN.index(shard) for shard in sorted(left))
            assert_good(store, set(OWN) - left)
    assert (path.read_bytes(), path.with_suffix(".data").read_bytes()) == before
    assert [h.missing for h in store.verify()] == [()]


def test_wrong_bytes_are_refused_and_may_be_written_again(directory: Directory) -> None:
    store = damaged_store(directory, SOLID[:3])
    slot = begin(store)
    write(slot, SOLID[0])
    slot.shard(SOLID[1])[:] = 7
    write(slot, SOLID[2], StepId(1, 2))  # Intact bytes of another step.
    assert store.repaired(slot, SOLID[:3]) == SOLID[1:3]
    assert slot.missing == SOLID[1:3]
    assert_good(store, {*OWN} - {*SOLID[1:3]})
    for shard in SOLID[1:3]:
        write(slot, shard)
    assert store.repaired(slot, SOLID[1:3]) == ()
    store.end_repair(slot)
    assert store.complete_steps() == ()
    store.learn_restorable([STEP])
    assert store.complete_steps() == (STEP,)


def test_nothing_but_missing_shards_can_be_written(directory: Directory) -> None:
    store = damaged_store(directory, SOLID[:2])
    slot = begin(store)
    for there in (SOLID[2], 0, 99):  # Good; not of this process; no shard at all.
        with pytest.raises(ValueError, match=f"shard {there} is not missing"):
            slot.shard(there)
        with pytest.raises(ValueError, match=f"shard {there} is not missing"):
            store.repaired(slot, [there])
    with pytest.raises(ValueError, match="read-only"):
        slot.data[0] = 1
    write(slot, SOLID[0])
    assert store.repaired(slot, [SOLID[0]]) == ()
    with pytest.raises(ValueError, match=f"shard {SOLID[0]} is not missing"):
        slot.shard(SOLID[0])
    store.end_repair(slot)
    store.end_repair(slot)
    with pytest.raises(ValueError, match="has ended"):
        slot.shard(SOLID[1])
    with pytest.raises(ValueError, match="has ended"):
        store.repaired(slot, [SOLID[1]])


def test_one_repair_at_a_time_and_only_of_what_lacks_shards(directory: Directory) -> None:
    store = damaged_store(directory, SOLID[:1])
    assert save(store, StepId(1, 2))
    assert store.begin_repair(StepId(1, 2)) is None, "it is whole"
    assert store.begin_repair(StepId(1, 3)) is None, "it is not here"
    slot = begin(store)
    assert store.begin_repair(STEP) is None
    store.end_repair(slot)
    again = begin(store)
    assert again.missing == SOLID[:1]
    write(again, SOLID[0])
    store.repaired(again, again.missing)
    store.end_repair(again)
    assert store.begin_repair(STEP) is None


def test_a_slot_under_repair_is_not_handed_out(directory: Directory) -> None:
    store = directory.open(layout(), wanted_slots=2)
    for number in (1, 2):
        assert save(store, StepId(1, number))
    spoil(directory, SOLID[:1], StepId(1, 1))
    store.verify()
    slot = begin(store)
    assert store.begin(StepId(1, 3), NO_WAIT)[1].startswith("no slot is free: slot 0 is being repaired")
    opened: list[object] = []
    waiting = threading.Thread(target=lambda: opened.append(store.begin(StepId(1, 3), A_MINUTE)[0]))
    waiting.start()
    store.end_repair(slot)
    waiting.join(60)
    assert opened[0] is not None


@pytest.mark.parametrize("how", ["delete", "abandon", "give up", "void"])
def test_a_step_that_goes_while_it_is_repaired_is_left_alone_until_the_end(
    directory: Directory, how: str
) -> None:
    store = directory.open(layout(), wanted_slots=2)
    assert save(store, STEP, outcome=None)
    spoil(directory, SOLID[:2])
    store.verify()
    slot = begin(store)
    if how == "delete":
        store.delete(STEP.step)
    elif how == "abandon":
        store.settle(STEP, Outcome.ABANDONED)
    elif how == "give up":
        store.give_up(STEP)
    else:
        store.activate([Activation(2, None)])
    write(slot, SOLID[0])
    assert save(store, StepId(2, 2), outcome=None)
    assert not save(store, StepId(2, 3), outcome=None)
    assert store.repaired(slot, [SOLID[0]]) == ()
    assert (STEP in manifest_paths(directory)) == (how != "delete")
    store.end_repair(slot)
    if how == "give up":
        assert_good(store, set(OWN) - {SOLID[1]})
    else:
        assert save(store, StepId(2, 3), outcome=None)


def test_a_newer_manager_waits_for_the_repair(directory: Directory) -> None:
    store = damaged_store(directory, SOLID[:2])
    slot = begin(store)
    second = Directory(directory.path)
    with pytest.raises(LocalDirectoryError, match="still writing or draining 1 slots"):
        second.open(layout(), takeover_wait=NO_WAIT)
    opened = threading.Thread(target=lambda: second.open(layout(), takeover_wait=A_MINUTE))
    opened.start()
    write(slot, SOLID[0])
    assert store.repaired(slot, [SOLID[0]]) == ()
    store.end_repair(slot)
    opened.join(60)
    assert second.store is not None
    assert [h.missing for h in second.store.verify()] == [(SOLID[1],)]
    with pytest.raises(LocalDirectoryError, match="taken over"):
        store.begin_repair(STEP)
    second.close()


def test_after_close_nothing_is_repaired_and_the_next_owner_leaves_the_slot_alone(directory: Directory) -> None:
    store = damaged_store(directory, SOLID[:1])
    slot = begin(store)
    memory = slot.shard(SOLID[0])
    later = directory.open(layout(), wanted_slots=2)
    with pytest.raises(LocalDirectoryError, match="is closed"):
        store.repaired(slot, [SOLID[0]])
    later.activate([Activation(2, None)])
    assert save(later, StepId(2, 1), outcome=None)
    memory[:] = 0
    taken, reason = later.begin(StepId(2, 2), NO_WAIT)
    assert taken is None
    assert f"slot {slot.index} is being drained by another process" in reason
    store.end_repair(slot)
    assert save(later, StepId(2, 2), outcome=None)


def test_a_repair_in_a_directory_that_was_emptied_is_refused(directory: Directory) -> None:
    store = damaged_store(directory, SOLID[:1])
    slot = begin(store)
    write(slot, SOLID[0])
    for path in (directory.path / "emergency_ckpt/0").iterdir():
        path.unlink()
    with pytest.raises(LocalDirectoryError, match="was emptied or replaced while step 1"):
        store.repaired(slot, [SOLID[0]])
    assert slot.missing == SOLID[:1]
    store.end_repair(slot)
    assert store.begin_repair(STEP) is None
    assert save(store, StepId(1, 2))


def test_slots_in_anonymous_memory_are_repaired_alike(directory: Directory) -> None:
    store = directory.open(layout(), directory=None, max_to_keep=0, wanted_slots=2)
    assert save(store, STEP)
    sealed = store.sealed(STEP)
    assert sealed is not None
    sealed.shard(SOLID[0])[:] ^= 1
    holding = store.verify_step(STEP)
    assert holding is not None
    slot = begin(store)
    write(slot, SOLID[0])
    assert store.repaired(slot, [SOLID[0]]) == ()
    store.end_repair(slot)
    assert_good(store, OWN)


KILLED_REPAIRER = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[2])
    from pathlib import Path
    from tests.local.partial import *
    from tests.local.test_store import content
    from emergency_ckpt.local import small_files
    from emergency_ckpt.local.store import LocalStore, StoreOptions

    calls = iter(range(int(sys.argv[3]), -1, -1))
    def counted(name):
        original = getattr(os, name)
        def call(*arguments, **options):
            step()
            result = original(*arguments, **options)
            step()
            return result
        return call
    def step():
        if next(calls) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    store = LocalStore(StoreOptions(Path(sys.argv[1]), 1, 3, 2), "run-a", layout(), 0, print)
    small_files.os.replace = counted("replace")
    plain = Path.write_bytes
    small_files.Path.write_bytes = lambda path, data: (plain(path, data[:9]), step(), plain(path, data))
    store.verify()
    slot = store.begin_repair(STEP)
    for shard in slot.missing:
        target = slot.shard(shard)
        data = content(layout().shards[shard], STEP.step, target.nbytes)
        target[: target.nbytes // 2] = data[: target.nbytes // 2]
        step()
        target[:] = data
        step()
        assert store.repaired(slot, [shard]) == ()
    store.end_repair(slot)
    print("done", flush=True)
"""


@pytest.mark.slow
def test_a_crash_between_any_two_steps_leaves_a_valid_slot_that_only_grows(directory: Directory) -> None:
    """Killed before the n-th step for every n: damage noted, shards written by halves, manifests replaced."""
    outcomes: list[int] = []
    for steps in range(60):
        directory.close()
        for path in manifest_paths(directory).values():
            path.unlink()
        store = directory.open(layout())
        assert save(store, STEP)
        spoil(directory, SOLID[:2])
        directory.close()
        arguments = [str(directory.path), str(Path(__file__).parents[2]), str(steps)]
        ended = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(KILLED_REPAIRER), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=100,
        )
        assert ended.returncode in (0, -signal.SIGKILL)
        store = directory.open(layout())
        on_disk = manifest_on_disk(directory)
        (holding,) = store.verify()
        if on_disk.missing:
            assert holding.missing == tuple(OWN[place] for place in on_disk.missing), (
                "it names what is good only"
            )
        assert set(holding.missing) <= set(SOLID[:2])
        assert_good(store, set(OWN) - set(holding.missing))
        outcomes.append(2 - len(holding.missing))
        if ended.returncode == 0:
            break
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {0, 1, 2}
    assert ended.returncode == 0


def test_shards_are_repaired_by_several_threads(directory: Directory) -> None:
    store = damaged_store(directory, SOLID)
    slot = begin(store)
    refused: list[tuple[int, ...]] = []

    def repair(shard: int) -> None:
        write(slot, shard)
        refused.append(store.repaired(slot, [shard]))

    threads = [threading.Thread(target=repair, args=(shard,)) for shard in SOLID]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    store.end_repair(slot)
    assert refused == [()] * len(SOLID)
    assert manifest_on_disk(directory).missing == ()
    assert_good(store, OWN)


def test_a_drain_of_good_shards_and_a_repair_go_on_together(directory: Directory) -> None:
    store = damaged_store(directory, SOLID[:1])
    pinned = store.pin(STEP)
    assert pinned is not None
    assert store.directory is not None
    with contextlib.ExitStack() as stack:
        outside = pin_slot(store.directory, pinned.index, "run-a", STEP)
        assert outside is not None
        stack.enter_context(outside)
        slot = begin(store)
        write(slot, SOLID[0])
        assert store.repaired(slot, [SOLID[0]]) == ()
        read = outside.open(layout()).shard(SOLID[1])
        expected = content(layout().shards[SOLID[1]], STEP.step, read.nbytes)
        np.testing.assert_array_equal(read, expected)
        store.end_repair(slot)
    store.unpin(pinned.index)
    assert os.path.exists(store.directory)
