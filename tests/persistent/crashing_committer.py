"""Run as a script: writes a step and dies, without cleaning up, before the n-th operation on the store's files.

Arguments: a directory of roots, the first n, the one after the last, a kind of store. Prints n and exit code of
each try: 9 where it died, 0 where the step was committed before the n-th operation.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.objects import open_store
from tests.persistent.saving import save, small_state

CHANGES = ("create", "write", "make_directory", "delete_tree", "delete", "delete_many", "replace")


class Countdown:
    """Ends the process at the n-th operation that changes something."""

    def __init__(self, operations: int):
        self.left = operations

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            os._exit(9)


class Dying:
    """Files of any kind; counts what changes something."""

    def __init__(self, files: Any, countdown: Countdown):
        self._files = files
        self._countdown = countdown

    def __getattr__(self, name: str) -> Any:
        if name in CHANGES:
            self._countdown.tick()
        return getattr(self._files, name)

    def below(self, path: str) -> Dying:
        return Dying(self._files.below(path), self._countdown)


class DyingWithRenames(Dying):
    """Of files that have them."""

    def rename(self, source: str, target: str) -> None:
        self._countdown.tick()
        self._files.rename(source, target)


def main(root: str, operation: int, kind: str) -> None:
    intact = open_store(root, kind)
    generation = intact.newest_generation()
    assert generation is not None
    dying = DyingWithRenames if kind == "files" else Dying
    files: Any = dying(intact.files, Countdown(operation))
    store = PersistentStore(root, files=files)
    save(store, Attempt(generation, 20, "default", operation), small_state(2))


if __name__ == "__main__":
    for number in range(int(sys.argv[2]), int(sys.argv[3])):
        # Each try in a process of its own; nothing has started threads before the fork.
        if not (child := os.fork()):
            main(f"{sys.argv[1]}/{number}", number, sys.argv[4])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(number, os.waitstatus_to_exitcode(status))
