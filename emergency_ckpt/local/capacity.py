"""Room on the ramdisk: how many slots fit, found out at start instead of by a killed process.

tmpfs pages count against the memory limit of the container, so both the file system and the cgroup are asked.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from emergency_ckpt.errors import LocalCapacityError

MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Room:
    """Bytes that could still be written: on the file system, and within the memory limit (None: no limit)."""

    file_system: int
    memory_limit: int | None

    @property
    def available(self) -> int:
        return self.file_system if self.memory_limit is None else min(self.file_system, self.memory_limit)


def measure_room(directory: Path, cgroup: Path = Path("/sys/fs/cgroup")) -> Room:
    stats = os.statvfs(directory)
    return Room(stats.f_bavail * stats.f_frsize, _cgroup_room(cgroup))


def slots_that_fit(
    room: Room, slot_bytes: int, present_bytes: int, wanted: int, least: int, where: Path
) -> int:
    """How many of the `wanted` slots fit, at least `least`.

    Args:
      room: what is free now.
      slot_bytes: bytes of one slot.
      present_bytes: bytes that existing slot files of ours occupy already (they are reused).
      wanted: slots for full speed. least: slots without which no step can be kept safely.
      where: the directory, for the error.

    Raises LocalCapacityError with what is needed, what there is and which ramdisk size to ask for.
    """
    usable = room.available + present_bytes
    fitting = min(wanted, usable // slot_bytes) if slot_bytes else wanted
    if fitting < least:
        limit = (
            "the memory limit of this container"
            if room.memory_limit is not None and room.memory_limit < room.file_system
            else "the ramdisk"
        )
        raise LocalCapacityError(
            f"{where} has no room for {least} slots of {_mib(slot_bytes)} each: {_mib(least * slot_bytes)} are "
            f"needed, {_mib(usable)} are available ({limit} is what limits). Ask for a ramdisk of at least "
            f"{_mib(int(wanted * slot_bytes * 1.15))} per host and process (then {wanted} slots fit, with a "
            f"reserve of 15 %), or shard the state over more hosts."
        )
    return int(fitting)


def _cgroup_room(cgroup: Path) -> int | None:
    """Room within the memory limit of cgroup v2 or v1; None where there is no limit.

    Page cache that nothing used lately counts as room: the kernel drops it before it refuses memory. Pages of a
    tmpfs are not among it.
    """
    for limit_name, usage_name, stat_name, cache_key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            limit_text = (cgroup / limit_name).read_text().strip()
            usage_text = (cgroup / usage_name).read_text().strip()
        except OSError:
            continue
        if not limit_text.isdigit() or int(limit_text) > 2**60:
            return None
        usage = int(usage_text)
        reclaimable = min(usage, _statistic(cgroup / stat_name, cache_key))
        return max(0, int(limit_text) - usage + reclaimable)
    return None


def _statistic(path: Path, key: str) -> int:
    """One figure of a file of `key value` lines; 0 where it is not there."""
    if not path.exists():
        return 0
    for line in path.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return 0


def _mib(nbytes: int) -> str:
    return f"{-(-nbytes // MIB)}Mi"
