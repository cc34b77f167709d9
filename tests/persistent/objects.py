"""Files that behave as objects do, in a local directory: no renames, versions, puts on condition.

A stand-in for an object store where the order of operations is tested; the real ones have tests of their own.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emergency_ckpt.persistent.files import Entry, LocalFiles
from emergency_ckpt.persistent.store import PersistentStore

KINDS = ("files", "objects")


class ObjectsInDirectory:
    """`root`: the directory; `lock`: a file whose lock makes a put on condition one operation."""

    def __init__(self, root: str | os.PathLike[str], lock: Path | None = None) -> None:
        self._files = LocalFiles(root)
        self._lock = lock or Path(root).with_suffix(".lock")

    def locate(self, path: str = "") -> str:
        return self._files.locate(path)

    def below(self, path: str) -> ObjectsInDirectory:
        return type(self)(self.locate(path), self._lock)

    def entries(self, path: str = "") -> list[Entry]:
        """Without empty directories: a store of objects has none."""
        found = self._files.entries(path)
        return [e for e in found if not e.is_directory or _has_files(Path(self.locate(path), e.name))]

    def read(self, path: str) -> bytes:
        return self._files.read(path)

    def create(self, path: str, data: bytes) -> bool:
        return self.replace(path, data, None) is not None

    def write(self, path: str, data: bytes) -> None:
        with self._locked():
            self._files.write(path, data)

    def make_directory(self, path: str) -> None:
        pass

    def delete_tree(self, path: str) -> None:
        self._files.delete_tree(path)

    def delete(self, path: str) -> None:
        Path(self.locate(path)).unlink(missing_ok=True)

    def modified(self, path: str) -> int:
        return self._files.modified(path)

    def version(self, path: str) -> str | None:
        try:
            found = os.stat(self.locate(path))
        except FileNotFoundError:
            return None
        return f"{found.st_ino}-{found.st_mtime_ns}"

    def replace(self, path: str, data: bytes, version: str | None) -> str | None:
        with self._locked():
            if self.version(path) != version:
                return None
            self._files.write(path, data)
            return self.version(path)

    def kvstore(self, path: str = "") -> dict[str, Any]:
        return self._files.kvstore(path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with open(self._lock, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _has_files(directory: Path) -> bool:
    return any(files for _, _, files in os.walk(directory))  # Which passes over what vanishes meanwhile.


def open_store(root: str | os.PathLike[str], kind: str) -> PersistentStore:
    return PersistentStore(root, files=ObjectsInDirectory(root) if kind == "objects" else None)
