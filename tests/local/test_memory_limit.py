"""A memory limit smaller than the ramdisk: said with both figures, before the kernel kills anybody.

A file system of the test's own is mounted where the kernel shows the limits of cgroups.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import LocalCapacityError
from emergency_ckpt.local.capacity import MIB, Room, measure_room, slots_that_fit
from emergency_ckpt.local.slot_file import SlotFile
from tests.local.namespaces import mount_tmpfs, run_in_namespace
from tests.local.test_store import Directory, assert_restorable, save

CGROUP = Path("/sys/fs/cgroup")
LIMIT = timedelta(seconds=30)


def limit_to(room: int) -> None:
    """The kernel's figures for a group that may take so many bytes more."""
    (CGROUP / "memory.max").write_text(f"{100 * MIB + room}\n")
    (CGROUP / "memory.current").write_text(f"{100 * MIB}\n")


def ramdisk_within_a_limit(root: Path, room: int) -> None:
    mount_tmpfs(root, "size=64m")
    mount_tmpfs(CGROUP, "size=1m")
    limit_to(room)


def slots_beyond_the_limit_are_refused_at_start(root: Path) -> None:
    ramdisk_within_a_limit(root, 100_000)
    assert measure_room(root).memory_limit == 100_000
    with pytest.raises(
        LocalCapacityError,
        match=r"1Mi are needed, 0Mi are available \(the memory limit of this container is what limits\)",
    ):
        Directory(root).open()
    limit_to(32 * MIB)
    held = Directory(root)
    store = held.open()
    assert save(store, StepId(1, 1))
    assert_restorable(store, StepId(1, 1))
    held.close()


def a_slot_beyond_the_limit_is_refused_when_it_is_allocated(root: Path) -> None:
    ramdisk_within_a_limit(root, 3 * MIB)
    for path in (root / "slot", None):
        slot = SlotFile(path, 4 * MIB)
        slot.prepare()
        named = path or "in memory"
        with pytest.raises(
            LocalCapacityError,
            match=f"has room for {3 * MIB} bytes, slot {named} needs {4 * MIB} more. Raise the limit",
        ):
            slot.wait_ready(LIMIT)
        assert slot.missing_bytes() == 4 * MIB, "nothing may be taken that could be the last page"
        limit_to(4 * MIB)
        slot.try_again()
        slot.prepare()
        slot.wait_ready(LIMIT)
        slot.data[:] = 1
        limit_to(0)
        slot.prepare()
        slot.wait_ready(LIMIT)  # What it has counts already.
        assert slot.data[-1] == 1
        slot.close()
        limit_to(3 * MIB)


@pytest.mark.parametrize(
    "scenario",
    [slots_beyond_the_limit_are_refused_at_start, a_slot_beyond_the_limit_is_refused_when_it_is_allocated],
    ids=lambda scenario: scenario.__name__,
)
def test_within_a_memory_limit(scenario: Callable[[Path], None], ramdisk: Path) -> None:
    run_in_namespace(scenario, ramdisk)


@pytest.mark.parametrize(
    ("room", "limits"),
    [
        (Room(MIB, None), "the ramdisk"),
        (Room(MIB, 2 * MIB), "the ramdisk"),
        (Room(2 * MIB, MIB), "the memory limit of this container"),
    ],
)
def test_the_error_names_what_limits_and_needed_is_never_what_is_available(room: Room, limits: str) -> None:
    with pytest.raises(LocalCapacityError, match=rf"\({limits} is what limits\)") as refused:
        slots_that_fit(room, MIB // 2 + 1, 0, 3, 2, Path("/ramdisk"))
    assert "2 slots of 1Mi each: 2Mi are needed, 1Mi are available" in str(refused.value)
    assert "a ramdisk of at least 2Mi" in str(refused.value)


def test_slots_that_are_there_already_need_no_more_room() -> None:
    assert slots_that_fit(Room(0, 0), MIB, 3 * MIB, 3, 2, Path("/ramdisk")) == 3
