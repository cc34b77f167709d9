"""A local directory taken for a bucket: no renames, versions, puts on condition.

For tests of the order of operations; the real stores have tests of their own.
"""

from __future__ import annotations

import os
from pathlib import Path

from emergency_ckpt.persistent.files import Entry, ObjectFiles
from emergency_ckpt.persistent.object_store.file_system import FileSystemStore
from emergency_ckpt.persistent.store import PersistentStore

KINDS = ("files", "objects")


class ObjectsInDirectory(ObjectFiles):
    """Without empty directories: a bucket has none."""

    def below(self, path: str) -> ObjectsInDirectory:
        return ObjectsInDirectory(self.store, self._key(path), self._conditions)

    def entries(self, path: str = "") -> list[Entry]:
        found = super().entries(path)
        return [e for e in found if not e.is_directory or _has_files(Path(self.locate(path), e.name))]


def _has_files(directory: Path) -> bool:
    return any(files for _, _, files in os.walk(directory))  # Which passes over what vanishes meanwhile.


def open_store(root: str | os.PathLike[str], kind: str) -> PersistentStore:
    return PersistentStore(root, files=ObjectsInDirectory(FileSystemStore(root)) if kind == "objects" else None)
