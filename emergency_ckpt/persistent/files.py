"""The persistent tier's view of a store: directories and small files, on a file system or in a bucket.

Everything above talks to `Files`. Paths are relative to a root, their parts joined by '/'. Both forms are made
of the operations of an object store; a file system adds directories of its own and a rename that is atomic.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from emergency_ckpt.errors import StoreUnsupportedError
from emergency_ckpt.persistent.object_store.file_system import (
    FileSystemStore,
    failing,
    make_directory,
    sync_directory,
)
from emergency_ckpt.persistent.object_store.operations import ObjectStore

_ANSWER_SECONDS = 120.0


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One name in a directory."""

    name: str
    is_directory: bool


class Files(Protocol):
    """The operations that the persistent tier needs. Failures not named here are PersistentStoreErrors.

    What `create`, `write` and `commit` made is durable on return.
    """

    def locate(self, path: str = "") -> str:
        """The full path or URL, for messages and for other programs."""
        ...

    def below(self, path: str) -> Files:
        """The same store with `path` as root."""
        ...

    def entries(self, path: str = "") -> list[Entry]:
        """What is in a directory, sorted by name; nothing if there is no such directory."""
        ...

    def read(self, path: str) -> bytes:
        """Content of a file. Raises FileNotFoundError, CorruptDataError for what is no file."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Writes a file unless one is there. Of several callers exactly one gets True."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Writes or replaces a file; a reader sees the old content or the new one."""
        ...

    def make_directory(self, path: str) -> None:
        """Makes a directory and its parents; nothing happens if it is there, or in a bucket, which has none."""
        ...

    def delete_tree(self, path: str) -> None:
        """Deletes a directory with all its content; nothing happens if there is none."""
        ...

    def commit(self, source: str, target: str) -> None:
        """Gives the directory `source` the name `target` in one atomic operation.

        Raises FileExistsError if `target` is there, FileNotFoundError if `source` is not, StoreUnsupportedError
        in a bucket, where directories have no names of their own.
        """
        ...

    def kvstore(self, path: str = "") -> dict[str, Any]:
        """TensorStore's key-value store specification of a directory."""
        ...


class ObjectFiles:
    """The files below a prefix of an object store."""

    def __init__(self, store: ObjectStore, prefix: str = ""):
        self.store = store
        self._prefix = prefix

    def locate(self, path: str = "") -> str:
        return self.store.locate(self._key(path))

    def below(self, path: str) -> ObjectFiles:
        return ObjectFiles(self.store, self._key(path))

    def entries(self, path: str = "") -> list[Entry]:
        inside = self._inside(path)
        found: list[Entry] = []
        for page in self.store.list_pages(inside, "/"):
            found += (Entry(info.key[len(inside) :], False) for info in page.objects)
            found += (Entry(prefix[len(inside) : -1], True) for prefix in page.prefixes)
        return sorted(entry for entry in found if entry.name)

    def read(self, path: str) -> bytes:
        return self.store.read(self._key(path))

    def create(self, path: str, data: bytes) -> bool:
        return self.store.put_if_absent(self._key(path), data) is not None

    def write(self, path: str, data: bytes) -> None:
        self.store.put(self._key(path), data)

    def make_directory(self, path: str) -> None:
        pass

    def delete_tree(self, path: str) -> None:
        for page in self.store.list_pages(self._inside(path)):
            self.store.delete_many([info.key for info in page.objects])

    def commit(self, source: str, target: str) -> None:
        raise StoreUnsupportedError(
            f"{self.locate(source)} cannot be renamed to {self.locate(target)}: it is in a bucket."
        )

    def kvstore(self, path: str = "") -> dict[str, Any]:
        return self.store.kvstore(self._inside(path))

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self._prefix, path.strip("/")) if part)

    def _inside(self, path: str) -> str:
        """What the keys of everything in a directory begin with."""
        key = self._key(path)
        return f"{key}/" if key else ""


class LocalFiles(ObjectFiles):
    """A directory of a (possibly shared) POSIX file system, `answer_seconds` being the limit for each look."""

    def __init__(self, root: str | os.PathLike[str], answer_seconds: float = _ANSWER_SECONDS):
        super().__init__(FileSystemStore(root, answer_seconds))
        self._root = Path(root).absolute()
        self._answer_seconds = answer_seconds

    def below(self, path: str) -> LocalFiles:
        return LocalFiles(self._root / path, self._answer_seconds)

    def make_directory(self, path: str) -> None:
        with failing("make directory", self.locate(path)):
            make_directory(self._root / path)

    def delete_tree(self, path: str) -> None:
        with failing("delete", self.locate(path)):
            while (self._root / path).exists():
                # A name that is gone already was deleted by somebody else at the same time.
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(self._root / path)

    def commit(self, source: str, target: str) -> None:
        with failing("commit", self.locate(target)):
            for directory, _, _ in os.walk(self._root / source, onerror=_raise):
                sync_directory(Path(directory))
            try:
                os.rename(self._root / source, self._root / target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileExistsError(errno.EEXIST, "exists", self.locate(target)) from error
                raise
            sync_directory((self._root / target).parent)


def _raise(error: OSError) -> None:
    raise error
