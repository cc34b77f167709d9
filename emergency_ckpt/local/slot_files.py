"""The data files of all slots of one process: mapped at start, allocated in the background, replaced when lost.

A file is never cut or overwritten to make it fit: where another size is needed, a new one takes its place, so
that whoever still reads the old one reads on.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from emergency_ckpt.errors import LocalDirectoryError
from emergency_ckpt.local.capacity import measure_room
from emergency_ckpt.local.recovery import data_path
from emergency_ckpt.local.slot_file import SlotFile, try_lock


class SlotFiles:
    """Slot files by slot index. The caller keeps calls from overlapping."""

    def __init__(
        self,
        directory: Path | None,
        slot_bytes: int,
        numbers: Sequence[int],
        kept: Mapping[int, int],
        foreign: Iterable[int],
    ) -> None:
        """Opens the files.

        Args:
          directory: None for anonymous memory.
          numbers: per slot index the number in its file's name.
          kept: per index of a slot that holds a step, its bytes; these are prepared by `prepare_rest`.
          foreign: indices of slots that hold another run's step: opened only when they are taken.
        """
        self._directory = directory
        self._slot_bytes = slot_bytes
        self._numbers = tuple(numbers)
        self._files: list[SlotFile | None] = [None] * len(numbers)
        self._unprepared = [i for i in range(len(numbers)) if i in kept]
        self._preparers: list[threading.Thread] = []
        unopened = set(foreign)
        try:
            for index in range(len(numbers)):
                if index not in unopened:
                    self._files[index] = SlotFile(self.path(index), kept.get(index, slot_bytes))
        except BaseException:
            self.close()
            raise
        self._prepare(i for i in range(len(numbers)) if i not in kept and i not in unopened)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> SlotFile:
        file = self._files[index]
        if file is None:
            raise LocalDirectoryError(f"slot {index} of {self._directory} holds another run's step")
        return file

    def path(self, index: int) -> Path | None:
        return data_path(self._directory, self._numbers[index]) if self._directory else None

    @contextlib.contextmanager
    def locked(self, index: int) -> Iterator[bool]:
        """Locks a slot's file against pins of other processes meanwhile; False where one has it pinned."""
        file = self._files[index]
        if file is not None:
            try:
                yield file.lock()
            finally:
                file.unlock()
            return
        path = self.path(index)  # Another run's, not opened yet.
        assert path is not None
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            yield True
            return
        except OSError as error:
            raise LocalDirectoryError(
                f"cannot open the slot file {path}: {error.strerror}. Check the owner of the local checkpoint "
                "directory."
            ) from error
        try:
            yield try_lock(fd)
        finally:
            os.close(fd)

    def fit(self, index: int) -> None:
        """Gives a slot that is about to be written the size of a slot of this layout."""
        file, path = self._files[index], self.path(index)
        if file is not None and file.nbytes == self._slot_bytes:
            return
        reusable = file is None and path is not None and path.exists()
        self._open_new(index, reuse=reusable and path is not None and path.stat().st_size == self._slot_bytes)

    def replace(self, index: int) -> None:
        """A new file in the place of one that is lost. Views of the old one stay readable."""
        self._open_new(index, reuse=False)

    def lost(self) -> list[int]:
        """The slots whose files are not at their paths any more. Raises LocalDirectoryError."""
        try:
            return [i for i, file in enumerate(self._files) if file is not None and file.is_lost()]
        except OSError as error:
            raise LocalDirectoryError(
                f"cannot look at the slot files in {self._directory}: {error.strerror}. Check the local "
                "checkpoint directory and its owner."
            ) from error

    def failures(self) -> dict[int, str]:
        """The slots that have no memory, with the reason; those for which there is room now are tried again."""
        failed = {i: file.failure for i, file in enumerate(self._files) if file is not None and file.failure}
        if self._directory is not None and failed:
            room = measure_room(self._directory).available
            for index in list(failed):
                file = self[index]
                if file.missing_bytes() <= room:
                    room -= file.missing_bytes()
                    file.try_again()
                    self._prepare([index])
                    del failed[index]
        return {i: reason for i, reason in failed.items() if reason}

    def prepare_rest(self) -> None:
        """Prepares the slots that were found full, once: they are about to be overwritten or closed."""
        indices, self._unprepared = self._unprepared, []
        self._prepare(indices)

    def close(self) -> None:
        for file in self._files:
            if file is not None:
                file.close()
        for preparer in self._preparers:
            preparer.join()

    def _open_new(self, index: int, *, reuse: bool) -> None:
        path, old = self.path(index), self._files[index]
        if path is not None and not reuse:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise LocalDirectoryError(
                    f"cannot replace the slot file {path}: {error.strerror}. Check the owner of the local "
                    "checkpoint directory and that it is not mounted read-only."
                ) from error
        new = SlotFile(path, self._slot_bytes)
        if old is not None:
            old.close()
        self._files[index] = new
        self._unprepared = [i for i in self._unprepared if i != index]
        self._prepare([index])

    def _prepare(self, indices: Iterable[int]) -> None:
        files = [self[index] for index in indices]
        self._preparers = [thread for thread in self._preparers if thread.is_alive()]
        if files:
            thread = threading.Thread(
                target=_prepare_all, args=(files,), name="emergency_ckpt slots", daemon=True
            )
            thread.start()
            self._preparers.append(thread)


def _prepare_all(files: list[SlotFile]) -> None:
    for file in files:
        file.prepare()
