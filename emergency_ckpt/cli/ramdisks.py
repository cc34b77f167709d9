"""Which directories of slots lie below a directory: its own, or those of the processes of a launched job."""

from __future__ import annotations

from pathlib import Path

from emergency_ckpt.core.locations import is_url
from emergency_ckpt.local.claim import directories

_MOST_PROCESSES = 1000


def slot_directories(location: str) -> list[Path]:
    """The roots of ramdisks at or right below a location; none for a URL, or where there are none."""
    if is_url(location):
        return []
    root = Path(location)
    try:
        if directories(root):
            return [root]
        inner = sorted(path for path in root.iterdir() if path.is_dir())[:_MOST_PROCESSES]
        return [path for path in inner if directories(path)]
    except OSError:
        return []
