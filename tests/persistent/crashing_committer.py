"""Run as a script: writes a step and dies, without cleaning up, before the n-th operation on the store's files.

Arguments: a directory of roots, the first n and the one after the last. Prints n and exit code of each try: 9
where it died, 0 where the step was committed before the n-th operation.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.files import LocalFiles
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.saving import save, small_state


class Countdown:
    """Ends the process at the n-th operation that changes something."""

    def __init__(self, operations: int):
        self.left = operations

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            os._exit(9)


class DyingFiles(LocalFiles):
    def __init__(self, root: Any, countdown: Countdown):
        super().__init__(root)
        self._countdown = countdown

    def below(self, path: str) -> DyingFiles:
        return DyingFiles(self.locate(path), self._countdown)

    def create(self, path: str, data: bytes) -> bool:
        self._countdown.tick()
        return super().create(path, data)

    def write(self, path: str, data: bytes) -> None:
        self._countdown.tick()
        super().write(path, data)

    def make_directory(self, path: str) -> None:
        self._countdown.tick()
        super().make_directory(path)

    def delete_tree(self, path: str) -> None:
        self._countdown.tick()
        super().delete_tree(path)

    def rename(self, source: str, target: str) -> None:
        self._countdown.tick()
        super().rename(source, target)


def main(root: str, operation: int) -> None:
    generation = PersistentStore(root).newest_generation()
    assert generation is not None
    store = PersistentStore(root, files=DyingFiles(root, Countdown(operation)))
    save(store, Attempt(generation, 20, "default", operation), small_state(2))


if __name__ == "__main__":
    for number in range(int(sys.argv[2]), int(sys.argv[3])):
        # Each try in a process of its own; nothing has started threads before the fork.
        if not (child := os.fork()):
            main(f"{sys.argv[1]}/{number}", number)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(number, os.waitstatus_to_exitcode(status))
