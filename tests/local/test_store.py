"""The store keeps the newest step through crashes, damage and lack of room (invariants 2 and 3)."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import xxhash

from emergency_ckpt.core.checksums import block_seed, copy_and_checksum
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.shards import BLOCK_BYTES, Box, Shard
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import (
    CorruptDataError,
    ForeignRunError,
    LocalCapacityError,
    LocalDirectoryError,
    UnsupportedStateError,
)
from emergency_ckpt.local import manifest as manifests
from emergency_ckpt.local.capacity import Room, slots_that_fit
from emergency_ckpt.local.manifest import FORMAT, Manifest
from emergency_ckpt.local.recovery import Foreign, Found, data_path, make_room
from emergency_ckpt.local.slot_views import OpenSlot
from emergency_ckpt.local.store import LocalStore, StoreOptions

NO_WAIT = timedelta(0)
SIZE = 50_000


def make_layout(size: int = SIZE) -> Layout:
    leaves = [LeafSpec("a", (size,), "uint8"), LeafSpec("b", (3, 5), "float32")]
    return Layout.build(leaves, {0: [Shard(leaf.name, Box.whole(leaf.shape)) for leaf in leaves]}, (0,))


class Directory:
    """A ramdisk directory and the stores opened on it, one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[str] = []
        self.store: LocalStore | None = None

    def open(self, layout: Layout | None = None, run: str = "run-a", **options: object) -> LocalStore:
        self.close()
        chosen = StoreOptions(
            **{"directory": self.path, "max_to_keep": 1, "wanted_slots": 3, "least_slots": 2} | options  # type: ignore[arg-type]
        )
        self.store = LocalStore(chosen, run, layout or make_layout(), 0, self.messages.append)
        return self.store

    def close(self) -> None:
        if self.store:
            self.store.close()
            self.store = None


@pytest.fixture
def directory(ramdisk: Path) -> Iterator[Directory]:
    held = Directory(ramdisk)
    yield held
    held.close()


def content(shard: Shard, step: int, nbytes: int) -> np.ndarray:
    return np.random.default_rng([step, len(shard.leaf)]).integers(0, 256, nbytes, dtype=np.uint8)


def fill(store: LocalStore, slot: OpenSlot, run: str = "run-a", listed: bool = True) -> Manifest:
    slot.wait_ready()
    checksums = []
    for entry in store.layout.slot_entries(0):
        shard = store.layout.shards[entry.shard]
        seed = block_seed(slot.step.generation, shard, store.layout.leaf[shard.leaf].dtype)
        target = slot.data[entry.offset : entry.offset + entry.nbytes]
        checksums.append(copy_and_checksum(content(shard, slot.step.step, entry.nbytes), target, seed))
    return Manifest(run, "n", slot.step, store.layout.hash, 0, 1, tuple(checksums), listed=listed)


def save(
    store: LocalStore, step: StepId, outcome: Outcome | None = Outcome.COMPLETE, run: str = "run-a"
) -> bool:
    slot, _ = store.begin(step, NO_WAIT)
    if slot is None:
        return False
    store.seal(slot, fill(store, slot, run))
    if outcome:
        store.settle(step, outcome)
    return True


def assert_restorable(store: LocalStore, step: StepId) -> None:
    sealed = store.sealed(step)
    assert sealed is not None
    assert sealed.find_damage() is None
    for index in store.layout.process_shards[0]:
        expected = content(store.layout.shards[index], step.step, store.layout.shard_nbytes[index])
        np.testing.assert_array_equal(sealed.shard(index), expected)


def test_a_sealed_step_is_found_whole_after_a_restart(directory: Directory) -> None:
    assert save(directory.open(), StepId(1, 7))
    store = directory.open()
    (holding,) = store.verify()
    assert holding.step == StepId(1, 7)
    assert holding.position == 0
    assert_restorable(store, StepId(1, 7))


def test_of_several_damaged_blocks_the_first_is_named(directory: Directory) -> None:
    large, tiny = LeafSpec("a", (2 * BLOCK_BYTES + 5,), "uint8"), LeafSpec("b", (7,), "uint8")
    shards = [Shard(leaf.name, Box.whole(leaf.shape)) for leaf in (large, tiny)]
    store = directory.open(Layout.build([large, tiny], {0: shards}, (0,)))
    assert save(store, StepId(1, 7))
    sealed = store.sealed(StepId(1, 7))
    assert sealed is not None
    for shard, offset, named in (
        (1, 6, "block 0 of shard b"),
        (0, -1, "block 2 of shard a"),
        (0, 0, "block 0 of shard a"),
    ):
        sealed.shard(shard)[offset] ^= 1
        damage = sealed.find_damage()
        assert damage is not None
        assert damage.startswith(named)


def test_slots_are_recycled_and_the_newest_complete_step_stays(directory: Directory) -> None:
    store = directory.open()
    for step in range(10):
        assert save(store, StepId(1, step))
        assert_restorable(store, StepId(1, step))
    assert len(list(store.directory.glob("slot_*.data"))) == 3  # type: ignore[union-attr]


def test_without_known_outcomes_nothing_is_overwritten(directory: Directory) -> None:
    store = directory.open()
    assert [save(store, StepId(1, step), outcome=None) for step in range(5)] == [True, True, True, False, False]
    slot, reason = store.begin(StepId(1, 9), NO_WAIT)
    assert slot is None
    assert "no newer step is known to be complete" in reason


def test_an_abandoned_step_is_gone_and_its_slot_is_free(directory: Directory) -> None:
    store = directory.open()
    save(store, StepId(1, 1))
    save(store, StepId(1, 2), Outcome.ABANDONED)
    assert store.sealed_steps() == (StepId(1, 1),)
    assert [h.step for h in directory.open().verify()] == [StepId(1, 1)]


def test_a_pinned_slot_is_not_reused_until_it_is_unpinned(directory: Directory) -> None:
    store = directory.open(wanted_slots=2)
    save(store, StepId(1, 1))
    pinned = store.pin(StepId(1, 1))
    assert pinned is not None
    assert save(store, StepId(1, 2))
    assert not save(store, StepId(1, 3))
    store.unpin(pinned.index)
    assert save(store, StepId(1, 3))


def test_steps_left_behind_by_a_restore_are_void(directory: Directory) -> None:
    store = directory.open()
    for step in (1, 2):
        save(store, StepId(1, step))
    store.activate([Activation(2, 1)])
    assert store.sealed_steps() == (StepId(1, 1),)
    assert save(store, StepId(2, 2))
    reopened = directory.open()
    reopened.activate([Activation(2, 1)])
    assert set(reopened.sealed_steps()) == {StepId(1, 1), StepId(2, 2)}


def test_activations_are_remembered_in_manifests(directory: Directory) -> None:
    store = directory.open()
    slot, _ = store.begin(StepId(3, 9), NO_WAIT)
    assert slot
    manifest = fill(store, slot)
    store.seal(slot, Manifest(**{**vars(manifest), "activations": (Activation(3, 8),)}))
    assert directory.open().activations == (Activation(3, 8),)


@pytest.mark.parametrize("offset", [0, 12_345, SIZE - 1, 53_248 + 59])
def test_a_flipped_bit_costs_its_shard_only(directory: Directory, offset: int) -> None:
    store = directory.open()
    save(store, StepId(1, 1))
    save(store, StepId(1, 2))
    directory.close()
    (path,) = [p for p in store_files(directory.path) if flip_if_step_two(p, offset)]
    store = directory.open()
    shard = 0 if offset < SIZE else 1
    assert {h.step.step: h.missing for h in store.verify()} == {1: (), 2: (shard,)}
    assert "1 of 2 shards of step 2 (generation 1) in slot " in directory.messages[-1]
    assert f" damaged: {store.layout.shards[shard]}. " in directory.messages[-1]
    assert path.exists()


def store_files(root: Path) -> list[Path]:
    return sorted(root.glob("emergency_ckpt/*/slot_*.data"))


def flip_if_step_two(data: Path, offset: int) -> bool:
    manifest = data.with_suffix(".manifest")
    if not manifest.exists() or Manifest.from_bytes(manifest.read_bytes(), "test").step.step != 2:
        return False
    with data.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
    return True


@pytest.mark.parametrize("cut", [0, 1, 40, 200, -1])
def test_a_truncated_manifest_empties_its_slot_only(directory: Directory, cut: int) -> None:
    store = directory.open()
    save(store, StepId(1, 1))
    path = next(store.directory.glob("*.manifest"))  # type: ignore[union-attr]
    save(store, StepId(1, 2))
    directory.close()
    path.write_bytes(path.read_bytes()[:cut])
    assert [h.step for h in directory.open().verify()] == [StepId(1, 2)]


def test_an_edited_manifest_is_refused(directory: Directory) -> None:
    store = directory.open()
    save(store, StepId(1, 1))
    path = next(store.directory.glob("*.manifest"))  # type: ignore[union-attr]
    directory.close()
    path.write_bytes(path.read_bytes().replace(b'"step":[1,1]', b'"step":[9,9]'))
    assert directory.open().verify() == ()
    assert "is damaged: its first line is" in directory.messages[0]


def test_a_damaged_layout_file_is_refused(directory: Directory) -> None:
    save(directory.open(), StepId(1, 1))
    directory.close()
    path = next(directory.path.glob("emergency_ckpt/0/layout_*.json"))
    path.write_bytes(path.read_bytes().replace(b'"uint8"', b'"int8 "'))
    other = make_layout(SIZE + 1)
    assert directory.open(other).verify() == ()


def test_a_truncated_slot_file_is_refused(directory: Directory) -> None:
    save(directory.open(), StepId(1, 1))
    directory.close()
    path = next(p for p in store_files(directory.path) if p.with_suffix(".manifest").exists())
    os.truncate(path, 100)
    assert directory.open().verify() == ()


def test_another_job_shape_takes_over_the_slots(directory: Directory) -> None:
    save(directory.open(), StepId(1, 1))
    store = directory.open(make_layout(3 * SIZE))
    (holding,) = store.verify()
    assert holding.layout == make_layout().hash
    store.activate([Activation(2, None)])
    for step in range(4):
        assert save(store, StepId(2, step))
        assert_restorable(store, StepId(2, step))


def test_a_foreign_run_is_refused_where_that_is_wanted(directory: Directory) -> None:
    save(directory.open(), StepId(1, 1))
    with pytest.raises(
        ForeignRunError, match=r"is not of this run, run-b: step 1 \(generation 1\) of run run-a"
    ):
        directory.open(run="run-b", foreign_run="error")


def test_a_foreign_run_is_evicted_loudly_when_its_room_is_needed_and_not_before(directory: Directory) -> None:
    save(directory.open(), StepId(1, 1))
    store = directory.open(make_layout(2 * SIZE), run="run-b")
    assert store.verify() == ()
    assert store.sealed_steps() == ()
    for step in (1, 2):
        assert save(store, StepId(1, step), outcome=None, run="run-b")
    (at_start,) = directory.messages
    assert "this run, run-b, does not use: slot 0: step 1 (generation 1) of run run-a." in at_start
    assert "its persistent directory may have been emptied or replaced" in at_start
    assert save(store, StepId(1, 3), outcome=None, run="run-b")
    message = directory.messages[-1]
    assert message.endswith(": step 1 (generation 1) of run run-a")
    assert_restorable(store, StepId(1, 3))
    assert {h.step.step for h in directory.open(make_layout(2 * SIZE), run="run-b").verify()} == {1, 2, 3}


def test_steps_in_another_format_wait_for_the_version_that_wrote_them(directory: Directory) -> None:
    """A start with the wrong version of the package must not cost the right one its steps."""
    save(directory.open(), StepId(1, 1))
    (manifest,) = directory.path.rglob("*.manifest")
    written = manifest.read_bytes()
    manifest.write_bytes(written.replace(FORMAT.encode(), b"emergency_ckpt manifest 999", 1))
    store = directory.open(make_layout(2 * SIZE))
    assert store.verify() == ()
    assert store.promised() == StepId(1, 1)
    assert "is in the format 'emergency_ckpt manifest 999'" in directory.messages[0]
    assert "start the version of this package that wrote them" in directory.messages[0]
    for step in (2, 3):
        assert save(store, StepId(2, step), outcome=None)
    with pytest.raises(ForeignRunError, match="another version of this package"):
        directory.open(foreign_run="error")
    manifest.write_bytes(written)
    assert StepId(1, 1) in [h.step for h in directory.open().verify()]


@pytest.mark.parametrize("size", [SIZE // 2, SIZE, 3 * SIZE])
def test_a_run_finds_its_steps_after_another_one_started_by_mistake(directory: Directory, size: int) -> None:
    save(directory.open(), StepId(1, 1))
    sizes = {
        path: path.stat().st_size
        for path in store_files(directory.path)
        if path.with_suffix(".manifest").exists()
    }
    store = directory.open(make_layout(size), run="run-b")
    for step in range(5):
        assert save(store, StepId(1, step), run="run-b")
    assert {path: path.stat().st_size for path in sizes} == sizes
    store = directory.open()
    assert [h.step for h in store.verify()] == [StepId(1, 1)]
    assert_restorable(store, StepId(1, 1))
    assert save(store, StepId(1, 2))


@pytest.mark.parametrize(
    ("slot_blocks", "capacity_blocks", "kept", "evicted"),
    [
        (8, 64, {0, 3}, set()),  # 0 and 3 stay beside a new slot 1: 8 + 8 + 8 blocks.
        (16, 41, {0, 3}, set()),  # 0 grows to 16, 1 is new: 16 + 16 + 8.
        (16, 39, {0}, {3}),
        (6, 16, {0}, {3}),
        (6, 13, set(), {0, 3}),  # 0 is larger than a slot: only without it two fit.
    ],
)
def test_foreign_steps_give_way_at_start_where_the_slots_do_not_fit_beside_them(
    tmp_path: Path, slot_blocks: int, capacity_blocks: int, kept: set[int], evicted: set[int]
) -> None:
    found = Found({0, 3, 4}, foreign={i: Foreign("a step", "0" * 32) for i in (0, 3)})
    for index in found.numbers:
        data_path(tmp_path, index).write_bytes(bytes(8 * 4096))
    messages: list[str] = []

    def measure(directory: Path) -> Room:
        used = sum(path.stat().st_blocks * 512 for path in directory.iterdir())
        return Room(max(0, capacity_blocks * 4096 - used), None)

    assert make_room(tmp_path, found, slot_blocks * 4096, 2, 2, messages.append, measure) == [0, 1]
    assert {int(path.stem[-1]) for path in tmp_path.iterdir()} == kept
    assert set(found.foreign) == kept
    assert {int(message.split(" from slot ")[1][0]) for message in messages} == evicted


def test_a_missing_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(LocalDirectoryError, match="does not exist"):
        Directory(tmp_path / "absent").open()


def test_too_little_room_is_an_error_that_says_what_to_ask_for() -> None:
    with pytest.raises(LocalCapacityError, match=r"240Mi are needed, 100Mi are available .*at least 414Mi"):
        slots_that_fit(Room(100 * 2**20, None), 120 * 2**20, 0, wanted=3, least=2, where=Path("/local"))


def test_room_for_two_of_three_slots_means_two() -> None:
    assert slots_that_fit(Room(2**30, 2**29), 2**27, 2**27, wanted=9, least=2, where=Path("/local")) == 5


def test_slots_without_a_ramdisk_serve_as_a_staging_area(directory: Directory) -> None:
    store = directory.open(directory=None, max_to_keep=0, wanted_slots=2)
    for step in range(5):
        slot, _ = store.begin(StepId(1, step), NO_WAIT, pins=1)
        assert slot is not None
        store.seal(slot, fill(store, slot))
        store.settle(StepId(1, step), Outcome.COMPLETE)
        assert_restorable(store, StepId(1, step))
        store.unpin(slot.index)


def manifests_on_disk(root: Path) -> dict[str, int]:
    paths = root.glob("emergency_ckpt/*/slot_*.manifest")
    return {path.name: Manifest.from_bytes(path.read_bytes(), "test").step.step for path in paths}


def test_after_deleting_the_newest_step_the_one_before_is_protected(directory: Directory) -> None:
    store = directory.open()
    for step in (1, 2, 3):
        save(store, StepId(1, step))
    store.delete(3)
    assert store.complete_steps() == (StepId(1, 1), StepId(1, 2))
    assert sorted(manifests_on_disk(directory.path).values()) == [1, 2]
    assert [save(store, StepId(1, step), outcome=None) for step in (4, 5, 6)] == [True, True, False]
    assert_restorable(store, StepId(1, 2))


def test_deleting_a_number_deletes_it_in_every_generation(directory: Directory) -> None:
    store = directory.open()
    save(store, StepId(1, 4))
    save(store, StepId(2, 4), outcome=None)
    store.delete(4)
    assert store.sealed_steps() == ()
    assert directory.open().verify() == ()


def test_a_deleted_step_that_is_being_drained_stays_readable_for_the_drain_only(directory: Directory) -> None:
    store = directory.open()
    save(store, StepId(1, 1))
    pinned = store.pin(StepId(1, 1))
    assert pinned is not None
    store.delete(1)
    assert manifests_on_disk(directory.path) == {}
    assert store.sealed_steps() == ()
    assert store.pin(StepId(1, 1)) is None
    assert_restorable(store, StepId(1, 1))
    store.unpin(pinned.index)
    assert store.sealed(StepId(1, 1)) is None


def test_what_was_known_to_be_complete_is_remembered_in_manifests(directory: Directory) -> None:
    store = directory.open()
    assert store.promised() is None
    for step, promised in ((2, None), (3, StepId(1, 2))):
        slot, _ = store.begin(StepId(1, step), NO_WAIT)
        assert slot is not None
        store.seal(slot, dataclasses.replace(fill(store, slot), promised=promised))
    directory.close()
    for path in store_files(directory.path):
        path.write_bytes(b"\0" * path.stat().st_size)
    store = directory.open()
    assert store.verify() == ()
    assert store.promised() == StepId(1, 2)
    store.activate([Activation(2, 1)])
    assert store.promised() is None


def test_a_manifest_that_would_not_be_read_again_is_refused(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "_MAX_BYTES", 1000)
    store = directory.open()
    slot, _ = store.begin(StepId(1, 1), NO_WAIT)
    assert slot is not None
    with pytest.raises(UnsupportedStateError, match=r"the manifest of step 1 .* 1000 at most"):
        store.seal(slot, dataclasses.replace(fill(store, slot), values={"text": "a" * 1000}))
    store.discard(slot)
    save(store, StepId(1, 2))
    assert_restorable(store, StepId(1, 2))


@pytest.mark.parametrize("promised", [b"[1]", b"[1,2,3]", b"[-1,2]", b'"ab"', b"[1,null]", b"7"])
def test_a_manifest_with_a_promise_that_is_no_step_is_refused(promised: bytes) -> None:
    manifest = Manifest("run-a", "n", StepId(1, 1), "0" * 32, 0, 1, (), promised=StepId(4, 5))
    body = manifest.to_bytes().partition(b"\n")[2]
    assert Manifest.from_bytes(manifest.to_bytes(), "test") == manifest
    changed = body.replace(b"[4,5]", promised)
    data = f"{FORMAT} {xxhash.xxh3_128_hexdigest(changed)}\n".encode() + changed
    with pytest.raises(CorruptDataError, match="unusable field"):
        Manifest.from_bytes(data, "test")


def test_a_manifest_that_cannot_be_removed_leaves_everything_as_it_was(directory: Directory) -> None:
    store = directory.open(wanted_slots=2)
    save(store, StepId(1, 1))
    save(store, StepId(1, 2))
    (name,) = (name for name, step in manifests_on_disk(directory.path).items() if step == 1)
    path = directory.path / "emergency_ckpt/0" / name
    content = path.read_bytes()
    path.unlink()
    path.mkdir()  # What no `unlink` removes.
    with pytest.raises(LocalDirectoryError, match=f"cannot remove the manifest {path}"):
        store.begin(StepId(1, 3), NO_WAIT)
    assert store.sealed_steps() == (StepId(1, 1), StepId(1, 2))
    assert_restorable(store, StepId(1, 1))
    path.rmdir()
    path.write_bytes(content)
    assert save(store, StepId(1, 3))


def test_an_interrupt_while_a_slot_is_taken_leaves_the_slot_free(ramdisk: Path) -> None:
    first = Directory(ramdisk)
    for step in (1, 2):
        save(first.open(wanted_slots=2), StepId(1, step), outcome=None)
    first.close()
    pressed: list[str] = []

    def interrupt(message: str) -> None:
        pressed.append(message)
        if "evicting" in message and len(pressed) == 2:
            raise KeyboardInterrupt

    store = LocalStore(StoreOptions(ramdisk, 1, 2, 2), "run-b", make_layout(), 0, interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.begin(StepId(1, 1), NO_WAIT)
    assert len(manifests_on_disk(ramdisk)) == 2
    for step in (1, 2):
        assert save(store, StepId(1, step), outcome=None, run="run-b")
    store.close()


KILLED_WRITER = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from tests.local.test_store import *
    store = LocalStore(StoreOptions(Path(sys.argv[1]), 1, 3, 2), "run-a", make_layout(), 0, print)
    step = max((h.step.step for h in store.verify()), default=0)
    while True:
        step += 1
        if step > 1:
            store.settle(StepId(1, step - 1), Outcome.COMPLETE)
        assert save(store, StepId(1, step), None)
        print(step, flush=True)
"""


def test_sigkill_at_any_moment_leaves_the_newest_sealed_step(directory: Directory) -> None:
    """The writer says a step after it is sealed; whatever it said before the kill must be there, whole."""
    for round_number in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED_WRITER), directory.path, Path(__file__).parents[2]],
            stdout=subprocess.PIPE,
            text=True,
        ) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(3 + 7 * round_number)]
            writer.send_signal(signal.SIGKILL)
            said = lines + writer.stdout.readlines()
        newest_said = max(int(line) for line in said if line.endswith("\n"))
        store = directory.open()
        newest = max(h.step for h in store.verify())
        assert newest.step >= newest_said
        assert_restorable(store, newest)
        directory.close()
