"""Which kind of file system a directory lies on, as /proc/self/mountinfo says.

Slots belong into memory; elsewhere everything works and is slower, which is said once and never an error.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(r"\\([0-7]{3})")


def file_system_type(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """The type of the file system that holds `path` ('tmpfs', 'ext4', ...); None where it cannot be told."""
    path = path.resolve()
    try:
        lines = mounts.read_text(errors="replace").splitlines()
        device = os.stat(path).st_dev
    except OSError:
        return None
    found: tuple[bool, int, int] = (False, -1, -1)
    kind: str | None = None
    for order, line in enumerate(lines):
        mount, _, source = line.partition(" - ")
        fields = mount.split(" ")
        if len(fields) < 5 or not source:
            continue
        point = Path(_ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), fields[4]))
        if not path.is_relative_to(point):
            continue
        # The deepest mount point of this very device; of several at one place, the last covers the others.
        same_device = fields[2] == f"{os.major(device)}:{os.minor(device)}"
        rank = (same_device, len(point.parts), order)
        if rank > found:
            found, kind = rank, source.split(" ")[0]
    return kind


def slow_warning(directory: Path) -> str | None:
    """What to know about slots that are not in memory; None where they are, or where it cannot be told."""
    kind = file_system_type(directory)
    if kind is None or kind in IN_MEMORY:
        return None
    return (
        f"the local checkpoint directory {directory} lies on {kind}, not on a tmpfs: local saves are as slow "
        "as that file system, and what lies there may outlive a reboot. For saves at the speed of memory, "
        "mount a tmpfs there or choose a directory on one (such as /dev/shm)."
    )
