"""The layouts of one local directory: a manifest names its layout by hash, the layout lies in a file beside it.

A layout is used only if it has the hash that its name says. Those that a manifest still needs are kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.local.small_files import read_file, replace_file

_MAX_BYTES = 1024 * 1024 * 1024


class LayoutFiles:
    """Layouts by hash; `directory` None: only those that were given."""

    def __init__(self, directory: Path | None, own: Layout) -> None:
        self._directory = directory
        self._own = own
        self._known = {own.hash: own}

    @property
    def own(self) -> str:
        """Hash of the layout by which slots are sealed now."""
        return self._own.hash

    def get(self, layout_hash: str) -> Layout:
        """Raises CorruptDataError for a layout that is missing or damaged."""
        layout = self._known.get(layout_hash)
        if layout is None:
            path = self._path(layout_hash)
            data = read_file(path, "layout", _MAX_BYTES) if path else None
            if data is None:
                raise CorruptDataError(
                    f"the layout {layout_hash[:40]!r} named by a manifest is missing in {self._directory}"
                )
            layout = Layout.from_bytes(data)
            if layout.hash != layout_hash:
                raise CorruptDataError(f"the layout file {path} does not have the content that its name says")
            self._known[layout_hash] = layout
        return layout

    def write_own(self, needed: Collection[str] | None) -> None:
        """Puts the own layout in place; removes those that are neither known nor `needed` (None: all are)."""
        path = self._path(self._own.hash)
        if path is None:
            return
        for other in path.parent.glob("layout_*"):
            layout_hash = other.stem.removeprefix("layout_")
            unneeded = needed is not None and layout_hash not in self._known and layout_hash not in needed
            if other.suffix == ".tmp" or unneeded:
                other.unlink()
        self._write(self._own)

    def write_missing(self) -> list[str]:
        """Writes those again that were read here and are gone; returns their names."""
        known = [(layout, self._path(layout.hash)) for layout in self._known.values()]
        missing = [layout for layout, path in known if path is not None and not path.exists()]
        for layout in missing:
            self._write(layout)
        return [layout.hash for layout in missing]

    def _write(self, layout: Layout) -> None:
        path = self._path(layout.hash)
        if path is not None:
            replace_file(path, layout.to_bytes(), f"the layout {layout.hash}")

    def _path(self, layout_hash: str) -> Path | None:
        if self._directory is None or not re.fullmatch(r"[0-9a-f]{32}", layout_hash):
            return None
        return self._directory / f"layout_{layout_hash}.json"
