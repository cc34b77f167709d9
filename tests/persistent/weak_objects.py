"""A directory taken for a bucket, on a server with conditional puts or with none that are worth the name.

For tests of the order of operations: something may happen before any of them, between look and put included.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from emergency_ckpt.errors import StoreUnsupportedError
from emergency_ckpt.persistent.conditions import RECORD
from emergency_ckpt.persistent.object_store.file_system import FileSystemStore
from emergency_ckpt.persistent.object_store.operations import ObjectInfo
from emergency_ckpt.persistent.object_store.probe import Honoured
from emergency_ckpt.persistent.step_files import seal
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.objects import ObjectsInDirectory

OPERATIONS = ("put", "put_if_absent", "put_if_unchanged", "delete", "delete_many", "head", "read", "list_pages")


class WeakObjects:
    """`before` is called before every operation. Versions are of the content, as on S3."""

    def __init__(self, root: str | os.PathLike[str], honoured: Honoured, before: Callable[[], None]):
        self._inner = FileSystemStore(root)
        self._honoured = honoured
        self._before = before

    def __getattr__(self, name: str) -> Any:
        if name in OPERATIONS:
            self._before()
        return getattr(self._inner, name)

    def put_if_absent(self, key: str, data: bytes) -> str | None:
        return self._conditional(key, data, None)

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> str | None:
        return self._conditional(key, data, version)

    def _conditional(self, key: str, data: bytes, version: str | None) -> str | None:
        self._before()
        if self._honoured is Honoured.YES:
            if version is None:
                return self._inner.put_if_absent(key, data)
            return self._inner.put_if_unchanged(key, data, version)
        if self._honoured is Honoured.REFUSED:
            raise StoreUnsupportedError("NotImplemented (HTTP 501)")
        if self._honoured is Honoured.NOT_ATOMIC:
            found: ObjectInfo | None = self._inner.head(key)
            if (found.version if found else None) != version:
                return None
            self._before()
        return self._inner.put(key, data)


def open_weak_store(
    root: str | os.PathLike[str], honoured: Honoured, before: Callable[[], None] = lambda: None
) -> PersistentStore:
    """The persistent directory on such a server, which a start has found to be like that."""
    files = ObjectsInDirectory(WeakObjects(root, honoured, before))  # type: ignore[arg-type]
    content = {"found": honoured.name, "why": "told by the test", "server": "", "time": 0}
    FileSystemStore(root).put(RECORD, seal(content))
    return PersistentStore(root, files=files)
