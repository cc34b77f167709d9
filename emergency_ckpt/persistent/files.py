"""The persistent tier's view of a store: directories and small files, on a file system or in a bucket.

Everything above talks to `Files`. Paths are relative to a root, their parts joined by '/'. Both forms are made
of the operations of an object store; a file system adds directories of its own and a rename that is atomic.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from emergency_ckpt.errors import PersistentStoreError, StoreUnsupportedError
from emergency_ckpt.persistent.object_store.file_system import (
    FileSystemStore,
    failing,
    make_directory,
    sync_directory,
)
from emergency_ckpt.persistent.object_store.operations import ObjectStore
from emergency_ckpt.persistent.object_store.probe import ConditionalPuts
from emergency_ckpt.persistent.side_by_side import side_by_side

Conditions = Callable[[], ConditionalPuts | None]
"""What a store makes of conditional puts; None where that is not known, and they are made use of."""

_ANSWER_SECONDS = 120.0
# The directories of a step's writers lie two levels below it; a server far away answers many at a time.
_DEPTH = 2
_DELETED_AT_A_TIME = 8


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One name in a directory."""

    name: str
    is_directory: bool


class Files(Protocol):
    """The operations that the persistent tier needs. Failures not named here are PersistentStoreErrors.

    What `create`, `write`, `replace` and `rename` made is durable on return.
    """

    @property
    def is_bucket(self) -> bool:
        """Whether every file is an object that one request puts, and every read a request."""
        ...

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

    def delete(self, path: str) -> None:
        """Deletes a file; nothing happens if there is none."""
        ...

    def delete_tree(self, path: str) -> None:
        """Deletes a directory with all its content; nothing happens if there is none."""
        ...

    def modified(self, path: str) -> int:
        """When a directory was last written to: nanoseconds of Unix time, 0 where the store does not say."""
        ...

    def kvstore(self, path: str = "") -> dict[str, Any]:
        """TensorStore's key-value store specification of a directory."""
        ...


@runtime_checkable
class RenamingFiles(Files, Protocol):
    """Files whose directories can be renamed."""

    def rename(self, source: str, target: str) -> None:
        """Gives the directory `source` the name `target` in one atomic operation.

        Raises FileExistsError if `target` is there, FileNotFoundError if `source` is not.
        """
        ...


class VersionedFiles(Files, Protocol):
    """Files that can be replaced on condition that nobody else did so meanwhile, as objects can."""

    def below(self, path: str) -> VersionedFiles: ...

    def version(self, path: str) -> str | None:
        """What tells the content of a file from any other that it had or will have; None if there is none."""
        ...

    def replace(self, path: str, data: bytes, version: str | None) -> str | None:
        """Writes a file that is still of this version, or still absent; returns its new one, None if it is not.

        Where the store does not honour conditions, this looks first, writes then, and reads what it wrote.
        """
        ...

    def walk(self, path: str = "") -> Iterator[list[str]]:
        """All files below a directory, some at a time, by their paths in it: one request for each thousand."""
        ...

    def delete_many(self, paths: Iterable[str]) -> None:
        """Deletes files, many at a time; nothing happens for those that are not there."""
        ...

    def honours_conditions(self) -> bool:
        """False where `create` and `replace` look and then put, so that somebody may come in between."""
        ...


class ObjectFiles:
    """The files below a prefix of an object store."""

    is_bucket: bool = True

    def __init__(self, store: ObjectStore, prefix: str = "", conditions: Conditions = lambda: None):
        self.store = store
        self._prefix = prefix
        self._conditions = conditions

    def relying_on(self, conditions: Conditions) -> Self:
        """The same files, with what is known of the store's conditional puts; asked when it is needed."""
        files = copy.copy(self)
        files._conditions = conditions
        return files

    def locate(self, path: str = "") -> str:
        return self.store.locate(self._key(path))

    def below(self, path: str) -> ObjectFiles:
        return ObjectFiles(self.store, self._key(path), self._conditions)

    def entries(self, path: str = "") -> list[Entry]:
        inside = self.inside(path)
        found: list[Entry] = []
        for page in self.store.list_pages(inside, "/"):
            found += (Entry(info.key[len(inside) :], False) for info in page.objects)
            found += (Entry(prefix[len(inside) : -1], True) for prefix in page.prefixes)
        return sorted(entry for entry in found if entry.name)

    def read(self, path: str) -> bytes:
        return self.store.read(self._key(path))

    def create(self, path: str, data: bytes) -> bool:
        return self.replace(path, data, None) is not None

    def write(self, path: str, data: bytes) -> None:
        self.store.put(self._key(path), data)

    def make_directory(self, path: str) -> None:
        pass

    def delete_tree(self, path: str) -> None:
        pages = self.store.list_pages(self.inside(path))
        self.store.delete_many(info.key for page in pages for info in page.objects)

    def delete(self, path: str) -> None:
        self.store.delete(self._key(path))

    def walk(self, path: str = "") -> Iterator[list[str]]:
        inside = self.inside(path)
        for page in self.store.list_pages(inside):
            yield [found for info in page.objects if (found := info.key[len(inside) :])]

    def delete_many(self, paths: Iterable[str]) -> None:
        self.store.delete_many(self._key(path) for path in paths)

    def version(self, path: str) -> str | None:
        found = self.store.head(self._key(path))
        return found.version if found else None

    def replace(self, path: str, data: bytes, version: str | None) -> str | None:
        key = self._key(path)
        known = self._conditions()
        if known is None or (known.can_create if version is None else known.can_replace):
            try:
                if version is None:
                    return self.store.put_if_absent(key, data)
                return self.store.put_if_unchanged(key, data, version)
            except StoreUnsupportedError:
                pass
        return self._look_and_put(key, data, version)

    def _look_and_put(self, key: str, data: bytes, version: str | None) -> str | None:
        """What a store without conditions allows: what came between look and put is not noticed, later is."""
        found = self.store.head(key)
        if (found.version if found else None) != version:
            return None
        self.store.put(key, data)
        found = self.store.head(key)
        try:
            return found.version if found is not None and self.store.read(key) == data else None
        except FileNotFoundError:
            return None

    def honours_conditions(self) -> bool:
        known = self._conditions()
        return known is None or known.can_replace

    def modified(self, path: str) -> int:
        return 0  # A prefix has no time of its own.

    def kvstore(self, path: str = "") -> dict[str, Any]:
        return self.store.kvstore(self.inside(path))

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self._prefix, path.strip("/")) if part)

    def inside(self, path: str = "") -> str:
        """What the keys of everything in a directory begin with."""
        key = self._key(path)
        return f"{key}/" if key else ""


class LocalFiles(ObjectFiles):
    """A directory of a (possibly shared) POSIX file system, `answer_seconds` being the limit for each look."""

    is_bucket = False

    def __init__(self, root: str | os.PathLike[str], answer_seconds: float = _ANSWER_SECONDS):
        super().__init__(FileSystemStore(root, answer_seconds))
        self._root = Path(root).absolute()
        self._answer_seconds = answer_seconds

    def below(self, path: str) -> LocalFiles:
        return LocalFiles(self._root / path, self._answer_seconds)

    def make_directory(self, path: str) -> None:
        with failing("make directory", self.locate(path)):
            try:
                make_directory(self._root / path)
            except FileNotFoundError as error:
                raise PersistentStoreError(
                    f"could not make directory {self.locate(path)}: nothing can be made in its parents. Check"
                    " that the persistent directory is mounted."
                ) from error

    def delete_tree(self, path: str) -> None:
        with failing("delete", self.locate(path)):
            while (self._root / path).exists():
                side_by_side(_remove, _directories(self._root / path, _DEPTH), _DELETED_AT_A_TIME, "deleting")
                _remove(self._root / path)

    def rename(self, source: str, target: str) -> None:
        with failing("rename", self.locate(target)):
            for directory, _, _ in os.walk(self._root / source, onerror=_raise):
                sync_directory(Path(directory))
            try:
                os.rename(self._root / source, self._root / target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileExistsError(errno.EEXIST, "exists", self.locate(target)) from error
                raise
            sync_directory((self._root / target).parent)

    def modified(self, path: str) -> int:
        with failing("look at", self.locate(path)):
            return (self._root / path).stat().st_mtime_ns


def _directories(root: Path, depth: int) -> Iterator[Path]:
    """The directories that many levels below `root`."""
    try:
        inside = [Path(entry.path) for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for path in inside:
        if depth == 1:
            yield path
        else:
            yield from _directories(path, depth - 1)


def _remove(path: Path) -> None:
    # A name that is gone already was deleted by somebody else at the same time.
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def _raise(error: OSError) -> None:
    raise error
