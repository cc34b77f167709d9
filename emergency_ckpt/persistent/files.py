"""Byte-level operations on the persistent tier, and their form for file systems.

Everything above talks to `Files`, so that another kind of store needs only these operations. Paths are
relative to a root, their parts joined by '/'. What `create`, `write` and `rename` made is durable on return.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.bounded import within

_ANSWER_SECONDS = 120.0


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One name in a directory."""

    name: str
    is_directory: bool


class Files(Protocol):
    """The operations that the persistent tier needs. Failures not named here are PersistentStoreErrors."""

    def locate(self, path: str = "") -> str:
        """The full path, for messages and for other programs."""
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
        """Makes a directory and its parents; nothing happens if it is there."""
        ...

    def delete_tree(self, path: str) -> None:
        """Deletes a directory with all its content; nothing happens if there is none."""
        ...

    def modified(self, path: str) -> int:
        """When a directory was last written to: nanoseconds of Unix time. Raises FileNotFoundError."""
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

        Where the store does not honour conditions, this looks first and writes then.
        """
        ...

    def delete(self, path: str) -> None:
        """Deletes a file; nothing happens if there is none."""
        ...


class LocalFiles:
    """A directory of a (possibly shared) POSIX file system.

    `answer_seconds` is the limit for each single look into it: a mount whose server is gone never answers.
    """

    def __init__(self, root: str | os.PathLike[str], answer_seconds: float = _ANSWER_SECONDS):
        self._root = Path(root).absolute()
        self._answer_seconds = answer_seconds

    def locate(self, path: str = "") -> str:
        return str(self._root / path)

    def below(self, path: str) -> LocalFiles:
        return LocalFiles(self._root / path, self._answer_seconds)

    def entries(self, path: str = "") -> list[Entry]:
        def listed() -> list[Entry]:
            with self._failing("list", path):
                try:
                    with os.scandir(self._root / path) as found:
                        return sorted(Entry(e.name, e.is_dir()) for e in found)
                except FileNotFoundError:
                    return []

        return within(self._answer_seconds, f"listing {self.locate(path)}", listed)

    def read(self, path: str) -> bytes:
        def content() -> bytes:
            with self._failing("read", path):
                return _read_file(self._root / path)

        return within(self._answer_seconds, f"reading {self.locate(path)}", content)

    def create(self, path: str, data: bytes) -> bool:
        target = self._root / path
        with self._failing("create", path):
            _make_directory(target.parent)
            scratch = _write_durably(target.with_name(f".{target.name}.{uuid.uuid4().hex}"), data)
            try:
                return self._link(scratch, target, data)
            finally:
                scratch.unlink()
                _sync_directory(target.parent)

    def write(self, path: str, data: bytes) -> None:
        target = self._root / path
        with self._failing("write", path):
            _make_directory(target.parent)
            os.replace(_write_durably(target.with_name(f".{target.name}.{uuid.uuid4().hex}"), data), target)
            _sync_directory(target.parent)

    def make_directory(self, path: str) -> None:
        with self._failing("make directory", path):
            _make_directory(self._root / path)

    def delete_tree(self, path: str) -> None:
        with self._failing("delete", path):
            while (self._root / path).exists():
                # A name that is gone already was deleted by somebody else at the same time.
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(self._root / path)

    def rename(self, source: str, target: str) -> None:
        with self._failing("rename", target):
            for directory, _, _ in os.walk(self._root / source, onerror=_raise):
                _sync_directory(Path(directory))
            try:
                os.rename(self._root / source, self._root / target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileExistsError(errno.EEXIST, "exists", self.locate(target)) from error
                raise
            _sync_directory((self._root / target).parent)

    def modified(self, path: str) -> int:
        with self._failing("look at", path):
            return (self._root / path).stat().st_mtime_ns

    def kvstore(self, path: str = "") -> dict[str, Any]:
        return {"driver": "file", "path": self.locate(path).rstrip("/") + "/"}

    def _link(self, scratch: Path, target: Path, data: bytes) -> bool:
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

    @contextlib.contextmanager
    def _failing(self, operation: str, path: str) -> Iterator[None]:
        """Turns what the operating system says into an error that names operation and path."""
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            raise
        except OSError as error:
            raise PersistentStoreError(
                f"could not {operation} {self.locate(path)}: {error.strerror or error}."
                f" Check that the persistent directory is mounted, writable and not full."
            ) from error


def _read_file(path: Path) -> bytes:
    """Content of a regular file; a pipe or a device in its place may never end, or act."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise CorruptDataError(f"{path} should be a file and is none (its mode is {mode:#o}). Remove it.")
    return path.read_bytes()


def _raise(error: OSError) -> None:
    raise error


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, f"{path} is no directory") from error


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


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
