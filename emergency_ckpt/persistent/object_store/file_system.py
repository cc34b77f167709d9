"""A directory in the form of an object store. What was put is durable on return, and appears whole.

An object is written under a name of its own, which no listing tells, and then gets its name in one operation.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from emergency_ckpt.errors import CorruptDataError, PersistentStoreError, StoreFullError, StorePermissionError
from emergency_ckpt.persistent.bounded import within
from emergency_ckpt.persistent.object_store.operations import ObjectInfo, Page
from emergency_ckpt.persistent.object_store.urls import check_key

_T = TypeVar("_T")
_SCRATCH = re.compile(r"\..+\.[0-9a-f]{32}")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
REFUSALS = (*_FULL, *_FORBIDDEN)
_ADVICE = {
    errno.EROFS: "It is mounted read-only: mount it for writing.",
    errno.EACCES: "Let the user of this job list, read and write there.",
    errno.ENOSPC: "Delete something there, or make it larger.",
    errno.EDQUOT: "Delete something there, or raise the quota of the user.",
    errno.ENOTDIR: "Something in the path is a file: remove it, or give another directory.",
    errno.ESTALE: "The directory was removed or its server was replaced: mount it again.",
    errno.ENOTCONN: "The server of the mount is gone: mount it again.",
}
_USUAL_ADVICE = "Check that the persistent directory is mounted, writable and not full."


class FileSystemStore:
    """The files below a directory of a (possibly shared) POSIX file system.

    `answer_seconds` is the limit for each operation: a mount whose server is gone never answers. Writing has as
    much time as it takes, since a thread that is left behind could write later.
    """

    def __init__(self, root: str | os.PathLike[str], answer_seconds: float = 120.0):
        self._root = Path(root).absolute()
        self._answer_seconds = answer_seconds

    def locate(self, key: str = "") -> str:
        return str(self._root / key)

    @property
    def server(self) -> str:
        return ""

    def check(self, prefix: str = "") -> None:
        directory = prefix.removesuffix("/")
        self._answered("list", directory, lambda: self._scan(directory))

    def list_pages(self, prefix: str = "", delimiter: str = "") -> Iterator[Page]:
        directory = prefix.removesuffix("/")
        if prefix and not prefix.endswith("/"):
            raise PersistentStoreError(
                f"a file system lists whole directories, not what begins with {self.locate(prefix)}:"
                " end it with '/'"
            )
        found, directories = self._answered("list", directory, lambda: self._scan(directory))
        if delimiter:
            yield Page(tuple(found), tuple(directories))
            return
        yield Page(tuple(found))
        for inner in directories:
            yield from self.list_pages(inner)

    def head(self, key: str) -> ObjectInfo | None:
        def look() -> ObjectInfo | None:
            try:
                return _info(key, self._path(key).stat())
            except (FileNotFoundError, NotADirectoryError):
                return None

        return self._answered("look at", key, look)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        def content() -> bytes:
            path = self._path(key)
            # A pipe or a device in place of a file may never end, or act.
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode):
                raise CorruptDataError(
                    f"{path} should be a file and is none (its mode is {mode:#o}). Remove it."
                )
            with open(path, "rb") as file:
                file.seek(start)
                return file.read() if stop is None else file.read(max(stop - start, 0))

        return self._answered("read", key, content)

    def put(self, key: str, data: bytes) -> str:
        target = self._path(key)
        with self._failing("write", key), _scratch(target, data) as scratch:
            version = _version(scratch.stat())
            os.replace(scratch, target)
        return version

    def put_if_absent(self, key: str, data: bytes) -> str | None:
        target = self._path(key)
        with self._failing("create", key), _scratch(target, data) as scratch:
            version = _version(scratch.stat())
            return version if _link(scratch, target, data) else None

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> str | None:
        target = self._path(key)
        with self._failing("replace", key):
            try:
                lock = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    if _version(target.stat()) != version:
                        return None
                except FileNotFoundError:
                    return None
                return self.put(key, data)
            finally:
                os.close(lock)

    def delete(self, key: str) -> None:
        with self._failing("delete", key), contextlib.suppress(FileNotFoundError):
            self._path(key).unlink()

    def delete_many(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.delete(key)

    def kvstore(self, prefix: str = "") -> dict[str, Any]:
        return {"driver": "file", "path": self.locate(prefix).rstrip("/") + "/"}

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _scan(self, directory: str) -> tuple[list[ObjectInfo], list[str]]:
        """Files and directories in a directory, by their keys; nothing if there is no such directory."""
        before = f"{directory}/" if directory else ""
        files: list[ObjectInfo] = []
        directories: list[str] = []
        try:
            with os.scandir(self._root / directory) as entries:
                for entry in entries:
                    if entry.is_dir():
                        directories.append(f"{before}{entry.name}/")
                    elif not _SCRATCH.fullmatch(entry.name):
                        with contextlib.suppress(FileNotFoundError):
                            files.append(_info(before + entry.name, entry.stat(follow_symlinks=False)))
        except FileNotFoundError:
            return [], []
        return sorted(files), sorted(directories)

    def _answered(self, operation: str, key: str, call: Callable[[], _T]) -> _T:
        doing = {"list": "listing", "read": "reading", "look at": "looking at"}[operation]

        def translated() -> _T:
            with self._failing(operation, key):
                return call()

        return within(self._answer_seconds, f"{doing} {self.locate(key)}", translated)

    @contextlib.contextmanager
    def _failing(self, operation: str, key: str) -> Iterator[None]:
        with failing(operation, self.locate(key)):
            yield


@contextlib.contextmanager
def failing(operation: str, path: str) -> Iterator[None]:
    """Turns what the operating system says into an error that names operation and path."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, PersistentStoreError):
        raise
    except OSError as error:
        said = error.strerror or str(error)
        raise system_failure(f"could not {operation} {path}", error.errno or 0, said) from error


def system_failure(what: str, number: int, said: str = "") -> PersistentStoreError:
    """What an error of the operating system with this number means."""
    kind = StoreFullError if number in _FULL else PersistentStoreError
    kind = StorePermissionError if number in _FORBIDDEN else kind
    return kind(f"{what}: {said or os.strerror(number)}. {_ADVICE.get(number, _USUAL_ADVICE)}")


def make_directory(path: Path) -> None:
    """Makes a directory and its parents. Raises NotADirectoryError where something else has its name."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, f"{path} is no directory") from error


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _scratch(target: Path, data: bytes) -> Iterator[Path]:
    """A durable file of this content beside `target`; afterwards it is gone and the directory is durable."""
    make_directory(target.parent)
    path = _write_durably(target.with_name(f".{target.name}.{uuid.uuid4().hex}"), data)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        sync_directory(target.parent)


def _link(scratch: Path, target: Path, data: bytes) -> bool:
    """Gives `scratch` its name unless that is taken; a hard link does so with the content complete."""
    try:
        os.link(scratch, target)
    except FileExistsError:
        # Over NFS a repeated request reports EEXIST for a link that this very call has made.
        return scratch.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        return _create_exclusively(target, data)
    return True


def _write_durably(path: Path, data: bytes) -> Path:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return path


def _create_exclusively(path: Path, data: bytes) -> bool:
    """Create-if-absent where hard links are not supported."""
    try:
        _write_durably(path, data)
    except FileExistsError:
        return False
    return True


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, found.st_size, _version(found))


def _version(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns}-{found.st_size}-{found.st_ino}"
