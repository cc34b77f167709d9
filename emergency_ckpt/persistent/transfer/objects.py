"""Single files from one store to another: many at a time, within a budget of memory, each whole or not."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash

from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.persistent.files import ObjectFiles
from emergency_ckpt.persistent.object_store.file_system import failing, make_directory

_PIECE_BYTES = 16 * 1024**2


@dataclasses.dataclass(frozen=True, slots=True)
class Copying:
    """How much at a time: `streams` files, and about `memory_bytes` of them, or one file that is larger."""

    streams: int = 8
    memory_bytes: int = 1024**3


class Copier:
    """Copies files of one directory to another one. `copied` is called with the bytes of each piece."""

    def __init__(
        self, source: ObjectFiles, target: ObjectFiles, copying: Copying, copied: Callable[[int], None]
    ) -> None:
        self._source = source
        self._target = target
        self._copying = copying
        self._copied = copied
        self._budget = _Budget(copying.memory_bytes)

    def copy(self, sizes: Collection[tuple[str, int]], read_back: Callable[[str, int], bool]) -> None:
        """Copies these files (path and size); those for which `read_back` says so are read and compared.

        Raises FileNotFoundError for a file that is not at the source any more, CorruptDataError for one that
        is not at the target what was put there, PersistentStoreError.
        """

        def one(path: str, size: int) -> None:
            digest = self._copy(path, size)
            if read_back(path, size) and self._digest(self._target, path, size) != digest:
                raise CorruptDataError(
                    f"{self._target.locate(path)} does not read as what was written to it just now. Copy again;"
                    " if that does not help, look at the store."
                )

        self._in_parallel(one, sizes)

    def differing(
        self, sizes: Collection[tuple[str, int]], there: Callable[[str], int | None]
    ) -> list[tuple[str, int]]:
        """Those of these files that are not at the target with the same bytes; reads what has the same size."""
        wanted = [(path, size) for path, size in sizes if there(path) != size]
        maybe = [(path, size) for path, size in sizes if there(path) == size]
        guard = threading.Lock()

        def compare(path: str, size: int) -> None:
            if self._digest(self._source, path, size) != self._digest(self._target, path, size):
                with guard:
                    wanted.append((path, size))

        self._in_parallel(compare, maybe)
        return sorted(wanted)

    def _in_parallel(self, call: Callable[[str, int], None], sizes: Collection[tuple[str, int]]) -> None:
        """The largest first, so that none is left over at the end. The first failure is raised."""
        failed = threading.Event()

        def run(path: str, size: int) -> None:
            if failed.is_set():
                return
            try:
                call(path, size)
            except BaseException:
                failed.set()
                raise

        in_order = sorted(sizes, key=lambda each: -each[1])
        with concurrent.futures.ThreadPoolExecutor(self._copying.streams, "emergency_ckpt copying") as pool:
            try:
                for each in [pool.submit(run, path, size) for path, size in in_order]:
                    each.result()
            except BaseException:  # Ctrl-C included: nothing more begins.
                failed.set()
                raise

    def _copy(self, path: str, size: int) -> str:
        if self._target.is_bucket:
            with self._budget.held(size):
                data = self._source.read(path)
                self._target.write(path, data)
            self._copied(len(data))
            return xxhash.xxh3_128_hexdigest(data)
        hashed = xxhash.xxh3_128()
        with failing("write", self._target.locate(path)), _scratch(Path(self._target.locate(path))) as file:
            for piece in self._pieces(self._source, path, size):
                hashed.update(piece)
                file.write(piece)
                self._copied(len(piece))
        return hashed.hexdigest()

    def _digest(self, files: ObjectFiles, path: str, size: int) -> str:
        hashed = xxhash.xxh3_128()
        for piece in self._pieces(files, path, size):
            hashed.update(piece)
        return hashed.hexdigest()

    def _pieces(self, files: ObjectFiles, path: str, size: int) -> Iterator[bytes]:
        for start in range(0, max(size, 1), _PIECE_BYTES):
            with self._budget.held(min(_PIECE_BYTES, size)):
                yield files.store.read(_key(files, path), start, start + _PIECE_BYTES)


class _Budget:
    """Bytes that may be in memory at a time; what is larger than all of them goes alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def held(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            # Each holder gives back what it has within the limits of one operation of the store.
            self._changed.wait_for(lambda: not self._used or self._used + nbytes <= self._most)
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and durable. What a kill leaves of it no listing tells."""
    make_directory(target.parent)
    path = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(path, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(path, target)
    finally:
        path.unlink(missing_ok=True)


def _key(files: ObjectFiles, path: str) -> str:
    return files.inside() + path
