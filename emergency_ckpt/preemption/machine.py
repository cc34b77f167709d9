"""Whose machine this is, as far as its firmware says, and which start of it: a few files that Linux shows."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path

DMI = Path("/sys/class/dmi/id")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def firmware_says(word: str, names: Iterable[str], dmi: Path) -> bool:
    """Whether one of these files has a word, in lower case; files that cannot be read have none."""
    return any(_has(dmi / name, word) for name in names)


def boot_id() -> str:
    """Names this start of the machine, and no other machine's; its name where Linux does not say."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return socket.gethostname()


def _has(path: Path, word: str) -> bool:
    try:
        return word in path.read_text(errors="replace").lower()
    except OSError:
        return False
