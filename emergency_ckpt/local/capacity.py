"""Room on the ramdisk: how many slots fit, found out at start instead of by a killed process.

tmpfs pages count against the memory limit of the container, so both the file system and the cgroup are asked.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from emergency_ckpt.errors import LocalCapacityError
from emergency_ckpt.local.file_system import IN_MEMORY, file_system_type

MIB = 1024 * 1024
_CGROUP = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


@dataclasses.dataclass(frozen=True)
class Room:
    """Bytes that could still be written: on the file system, and within the memory limit (None: no limit)."""

    file_system: int
    memory_limit: int | None

    @property
    def available(self) -> int:
        return self.file_system if self.memory_limit is None else min(self.file_system, self.memory_limit)


def measure_room(directory: Path, cgroup: Path = _CGROUP, own_groups: Path = _OWN_GROUPS) -> Room:
    """Room for slots below `directory`. The memory limit counts for file systems in memory only."""
    stats = os.statvfs(directory)
    in_memory = file_system_type(directory) in (*IN_MEMORY, None)
    # A ramfs, or a tmpfs without a size, gives no figure of its own.
    free = stats.f_bavail * stats.f_frsize if stats.f_blocks else _free_memory()
    return Room(free, memory_limit_room(cgroup, own_groups) if in_memory else None)


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
            f"needed, {usable // MIB}Mi are available ({limit} is what limits). Ask for a ramdisk of at least "
            f"{_mib(int(wanted * slot_bytes * 1.15))} per host and process (then {wanted} slots fit, with a "
            f"reserve of 15 %), or shard the state over more hosts, or let several slices share what all of "
            "them hold (local_checkpoint_spread=True)."
        )
    return int(fitting)


def memory_limit_room(cgroup: Path = _CGROUP, own_groups: Path = _OWN_GROUPS) -> int | None:
    """Room within the memory limits of this process's cgroup and those above it (v2 or v1); None: no limit.

    Page cache that nothing used lately counts as room: the kernel drops it before it refuses memory. Pages of a
    tmpfs are not among it.
    """
    rooms = [
        room
        for group in _groups(own_groups, controller="")
        if (room := _room_in(cgroup / group, "memory.max", "memory.current", "inactive_file")) is not None
    ]
    rooms += [
        room
        for group in _groups(own_groups, controller="memory")
        if (
            room := _room_in(
                cgroup / "memory" / group,
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        )
        is not None
    ]
    return min(rooms, default=None)


def _groups(own_groups: Path, controller: str) -> list[Path]:
    """The cgroup of this process and all above it, relative to the root of the hierarchy, which is always one.

    Inside a container the path may name groups that cannot be seen there: those have no files, and the root is
    the container's own.
    """
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = Path(path.strip("/"))
            return [own, *own.parents] if own.parts else [own]
    return [Path()]


def _room_in(group: Path, limit_name: str, usage_name: str, cache_key: str) -> int | None:
    try:
        limit_text = (group / limit_name).read_text().strip()
        usage_text = (group / usage_name).read_text().strip()
    except OSError:
        return None
    if not limit_text.isdigit() or int(limit_text) > 2**60:
        return None
    usage = int(usage_text)
    reclaimable = min(usage, _statistic(group / "memory.stat", cache_key))
    return max(0, int(limit_text) - usage + reclaimable)


def _free_memory() -> int:
    """Memory that the machine can give without swapping; 0 where it does not say."""
    available = _statistic(Path("/proc/meminfo"), "MemAvailable:")
    return available * 1024


def _statistic(path: Path, key: str) -> int:
    """One figure of a file of `key value` lines; 0 where it is not there."""
    if not path.exists():
        return 0
    for line in filter(None, path.read_text().splitlines()):
        name, *values = line.split()
        if name == key and values and values[0].isdigit():
            return int(values[0])
    return 0


def _mib(nbytes: int) -> str:
    """What is asked for, rounded up; what there is, is rounded down, so that the two never read alike."""
    return f"{-(-nbytes // MIB)}Mi"
