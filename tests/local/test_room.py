"""No room on the ramdisk, at start and later: said, never fatal later, and what was sealed stays."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import LocalCapacityError, LocalDirectoryError
from emergency_ckpt.local.capacity import measure_room
from emergency_ckpt.local.file_system import file_system_type
from tests.local.namespaces import mount_tmpfs, run_in_namespace, unmount
from tests.local.test_store import (
    NO_WAIT,
    Directory,
    assert_restorable,
    fill,
    make_layout,
    manifests_on_disk,
    save,
)

MIB = 1024 * 1024


@contextlib.contextmanager
def filled(root: Path, leave: int = 0) -> Iterator[None]:
    """Another program takes all room on the ramdisk but `leave` bytes."""
    path = root / "another program"
    with path.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.tell() - leave))
    yield
    path.unlink()


def step(number: int) -> StepId:
    return StepId(1, number)


def no_room_at_start(root: Path) -> None:
    mount_tmpfs(root, "size=2m")
    with (
        filled(root, leave=64 * 1024),
        pytest.raises(LocalCapacityError, match=r"2 slots of 1Mi each: 1Mi are needed, 0Mi are available"),
    ):
        Directory(root).open()
    held = Directory(root)
    assert save(held.open(), step(1))
    held.close()


def manifest_without_room(root: Path) -> None:
    mount_tmpfs(root, "size=2m")
    held = Directory(root)
    store = held.open()
    for number in (1, 2):
        save(store, step(number))
    slot, _ = store.begin(step(3), NO_WAIT)
    assert slot is not None
    manifest = fill(store, slot)
    with filled(root):
        with pytest.raises(LocalCapacityError, match=r"the manifest of step 3 .* the ramdisk is full"):
            store.seal(slot, manifest)
        store.discard(slot)
        assert not list(root.glob("emergency_ckpt/0/*.tmp")), "half a manifest must not take the last room"
        assert_restorable(store, step(2))
    assert [h.step for h in store.verify()] == [step(1), step(2)]
    assert save(store, step(4))
    assert [h.step for h in held.open().verify()] == [step(1), step(2), step(4)]
    held.close()


def slot_without_room(root: Path) -> None:
    """A slot that cannot be allocated is left out, not tried save after save, until there is room again."""
    mount_tmpfs(root, "size=1m")
    held = Directory(root)
    store = held.open(make_layout(100_000))
    for number in (1, 2):
        save(store, step(number))
    slot, _ = store.begin(step(3), NO_WAIT)
    assert slot is not None
    reader = slot.data[:]
    store.discard(slot)
    lost = root / f"emergency_ckpt/0/slot_{slot.index}.data"
    lost.unlink()  # Its memory stays taken while somebody reads it.
    with filled(root):
        again, _ = store.begin(step(4), NO_WAIT)
        assert again is not None
        if again.index == slot.index:
            with pytest.raises(LocalCapacityError, match="ran full while slot"):
                again.wait_ready()
        store.discard(again)
        # With step 2 complete, the slot of step 1 serves instead.
        instead, _ = store.begin(step(5), NO_WAIT)
        assert instead is not None
        assert instead.index != slot.index
        store.seal(instead, fill(store, instead))
        with pytest.raises(LocalCapacityError, match=r"finds no slot: .*ran full while slot"):
            store.begin(step(6), NO_WAIT)
        assert store.sealed_steps() == (step(2), step(5))
    del reader
    assert save(store, step(6), outcome=None)
    assert_restorable(store, step(6))
    assert store.sealed_steps() == (step(2), step(5), step(6))
    held.close()


def no_room_for_the_lock_of_a_directory_made_anew(root: Path) -> None:
    mount_tmpfs(root, "size=1m,nr_inodes=20")
    held = Directory(root)
    store = held.open()
    save(store, step(1))
    for path in (root / "emergency_ckpt/0").iterdir():
        path.unlink()
    made: list[Path] = []
    with contextlib.suppress(OSError):
        while True:
            made.append(root / str(len(made)))
            made[-1].touch()
    with pytest.raises(LocalDirectoryError, match="No space left on device"):
        store.begin(step(2), NO_WAIT)
    assert store.sealed_steps() == ()
    for path in made[:-1]:
        path.unlink()
    assert save(store, step(3))
    held.close()


def a_fresh_ramdisk_is_mounted_over_the_old_one(root: Path) -> None:
    mount_tmpfs(root, "size=2m")
    held = Directory(root)
    store = held.open()
    save(store, step(1))
    mount_tmpfs(root, "size=2m")
    assert save(store, step(2))
    assert "was emptied, replaced or taken away" in "\n".join(held.messages)
    assert store.sealed_steps() == (step(2),)
    assert list(manifests_on_disk(root).values()) == [2]
    unmount(root)
    assert save(store, step(3)), "and back to the first one, which still has the first lock's file"
    assert store.sealed_steps() == (step(3),)
    held.close()


def a_ramdisk_without_a_size_and_a_ramfs(root: Path) -> None:
    for kind, options in (("tmpfs", "size=0"), ("ramfs", "mode=0777")):
        mount_tmpfs(root, options, kind)
        assert file_system_type(root) == kind
        assert measure_room(root).file_system > 100 * MIB
        held = Directory(root)
        store = held.open()
        for number in range(1, 5):
            assert save(store, step(number))
            assert_restorable(store, step(number))
        assert held.messages == []
        held.close()


def read_only_later(root: Path) -> None:
    """What a remount does: every file of the ramdisk can be read, none can be made, changed or removed."""
    mount_tmpfs(root, "size=2m")
    held = Directory(root)
    store = held.open()
    for number in (1, 2, 3):
        save(store, step(number))
    slot, _ = store.begin(step(4), NO_WAIT)
    assert slot is not None
    manifest = fill(store, slot)
    (root / "read-only").mkdir()
    _bind_read_only(root)
    for act in (lambda: store.seal(slot, manifest), lambda: store.begin(step(5), NO_WAIT)):
        with pytest.raises(LocalDirectoryError, match=f"({errno.EROFS}|Read-only file system)"):
            act()
    assert store.sealed_steps() == (step(2), step(3))
    assert [h.step for h in store.verify()] == [step(2), step(3)]
    unmount(root)
    store.discard(slot)
    assert save(store, step(6))
    assert StepId(1, 6) in {h.step for h in held.open().verify()}
    held.close()


def _bind_read_only(root: Path) -> None:
    subprocess.run(["mount", "--bind", str(root), str(root)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(root)], check=True)


@pytest.mark.parametrize(
    "scenario",
    [
        no_room_at_start,
        manifest_without_room,
        slot_without_room,
        no_room_for_the_lock_of_a_directory_made_anew,
        a_fresh_ramdisk_is_mounted_over_the_old_one,
        a_ramdisk_without_a_size_and_a_ramfs,
        read_only_later,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_the_store_on_a_ramdisk_of_its_own(scenario: Callable[[Path], None], ramdisk: Path) -> None:
    run_in_namespace(scenario, ramdisk)
