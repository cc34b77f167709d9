"""A caller that is held up before any operation on its files, while another one goes on.

For tests of what two do at the same time: every order in which one is overtaken, and overtakes, can be had.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from emergency_ckpt.errors import EmergencyCheckpointError
from emergency_ckpt.persistent.files import LocalFiles
from emergency_ckpt.persistent.object_store.probe import Honoured
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.weak_objects import WeakObjects, open_weak_store

_LIMIT_SECONDS = 60


class PacedFiles(LocalFiles):
    """A directory of a file system; `before` is called before every operation."""

    def __init__(self, root: str | os.PathLike[str], before: Callable[[], None]):
        super().__init__(root)
        self._before = before
        self.store = WeakObjects(root, Honoured.YES, before)  # type: ignore[assignment]

    def below(self, path: str) -> PacedFiles:
        return PacedFiles(self._root / path, self._before)

    def make_directory(self, path: str) -> None:
        self._before()
        super().make_directory(path)

    def delete_tree(self, path: str) -> None:
        self._before()
        super().delete_tree(path)

    def rename(self, source: str, target: str) -> None:
        self._before()
        super().rename(source, target)


def open_paced_store(root: str | os.PathLike[str], kind: str, before: Callable[[], None]) -> PersistentStore:
    if kind == "objects":
        return open_weak_store(root, Honoured.YES, before)
    return PersistentStore(root, files=PacedFiles(root, before))


class Paced:
    """Does one thing after another on a store, each up to an operation of this number, then to its end."""

    def __init__(self, root: str | os.PathLike[str], kind: str) -> None:
        self.store = open_paced_store(root, kind, self._before)
        self._left = 0
        self._held, self._go = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._told: object = None

    def start(self, call: Callable[[PersistentStore], object], operation: int) -> bool:
        """Until it is about to do the n-th operation; False where it has ended before."""
        self._held.clear()
        self._go.clear()
        self._left = operation
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()
        assert self._held.wait(_LIMIT_SECONDS)
        return self._left == 0

    def finish(self) -> object:
        """What came of it; an error of ours is returned."""
        assert self._thread is not None
        self._left = 0
        self._go.set()
        self._thread.join(_LIMIT_SECONDS)
        assert not self._thread.is_alive()
        return self._told

    def _run(self, call: Callable[[PersistentStore], object]) -> None:
        try:
            self._told = call(self.store)
        except EmergencyCheckpointError as error:
            self._told = error
        finally:
            self._held.set()

    def _before(self) -> None:
        if threading.current_thread() is not self._thread:
            return
        self._left -= 1
        if self._left == 0:
            self._held.set()
            assert self._go.wait(_LIMIT_SECONDS)
