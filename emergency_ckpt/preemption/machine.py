"""Whose machine this is, as far as its firmware says: a few small files that Linux shows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

DMI = Path("/sys/class/dmi/id")


def firmware_says(word: str, names: Iterable[str], dmi: Path) -> bool:
    """Whether one of these files has a word, in lower case; files that cannot be read have none."""
    return any(_has(dmi / name, word) for name in names)


def _has(path: Path, word: str) -> bool:
    try:
        return word in path.read_text(errors="replace").lower()
    except OSError:
        return False
