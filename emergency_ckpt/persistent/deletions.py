"""Steps and leftovers that are deleted in the background, by one process of a job, and in nobody's way.

A step is taken out of sight first, then its bytes are deleted. Both may have the name of a step that is about
to be committed: a committer makes that directory free before it begins, and nothing is deleted in it from then
on. What fails is logged and tried again with the next deletions; what is left when the process ends is a
leftover to the next life of the run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

from emergency_ckpt.errors import EmergencyCheckpointError, PersistentStoreError
from emergency_ckpt.persistent.attempts import HiddenStep, PersistentStep
from emergency_ckpt.persistent.records import Generation
from emergency_ckpt.persistent.side_by_side import side_by_side
from emergency_ckpt.persistent.store import PersistentStore

_AT_A_TIME = 4
_LEFTOVERS_A_ROUND = 16
_FAILURES = (EmergencyCheckpointError, OSError)

Say = Callable[[int | None, str], None]
"""Gets the number of a step, where it is about one, and what there is to say."""


class Deletions:
    """What is to be deleted in one persistent directory, and the thread that does it. Thread-safe.

    `current` is the generation of this process: for one that is not the newest any more nothing is deleted.
    """

    def __init__(self, store: PersistentStore, current: Callable[[], Generation], tell: Say, warn: Say) -> None:
        self._store = store
        self._current = current
        self._tell = tell
        self._warn = warn
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        # By directory: steps that are still to be seen, and why they go; those whose bytes are there.
        self._steps: dict[str, tuple[PersistentStep, str]] = {}
        self._hidden: dict[str, HiddenStep] = {}
        # Whose leftovers go; the directories in which they may be, None as long as nobody has listed them.
        self._sweeper: Generation | None = None
        self._leftovers: list[str] | None = None
        self._seen_to: set[str] = set()
        self._newest: PersistentStep | None = None
        self._failed: set[str] = set()  # which are not tried again before there is more to do
        self._busy: set[str] = set()

    def delete(self, steps: Iterable[tuple[PersistentStep, str]], newest: PersistentStep | None) -> None:
        """Deletes these steps, and whatever could not be deleted before. Returns at once.

        `newest` is the newest step that stays, for the pointer to it.
        """
        with self._changed:
            self._steps.update((step.name, (step, why)) for step, why in steps)
            self._newest = newest
            self._begin()

    def clear(self, hidden: HiddenStep) -> None:
        """Deletes the bytes of a step that is out of sight already. Returns at once."""
        with self._changed:
            self._hidden[hidden.directory] = hidden
            self._begin()

    def sweep(self, current: Generation) -> None:
        """Removes what lives before this one have left. Returns at once."""
        with self._changed:
            self._sweeper, self._leftovers = current, None
            self._begin()

    def make_free(self, directory: str) -> None:
        """For a committer: deletes what is to be deleted in its step's directory, and nothing there afterwards.

        Raises PersistentStoreError where what was deleted cannot be cleared away.
        """
        with self._changed:
            concerned = self._thread is not None or self._sweeper is not None
        if not concerned:
            return
        with self._working_on(directory):
            if (wanted := self._steps.get(directory)) is not None:
                self._hide(*wanted)
            if (hidden := self._hidden.get(directory)) is not None:
                self._store.clear(hidden)
                self._forget(directory)
            if self._sweeper is not None and directory not in self._seen_to:
                try:
                    self._sweep(directory)
                except _FAILURES as error:
                    self._warn(None, f"leftovers of earlier lives in {directory} could not be removed: {error}")
            self._seen_to.add(directory)

    def wait_hidden(self, timeout: timedelta) -> bool:
        """Waits until deleted steps are out of sight, or cannot be taken out of it now."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open(self._steps), timeout.total_seconds())

    def wait_done(self, timeout: timedelta) -> bool:
        """Waits until nothing is left to be done but what failed; until then the directory may change."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._is_anything_open(), timeout.total_seconds())

    def close(self, timeout: timedelta) -> bool:
        """Waits for what is being deleted; False where some is left to the next life. Idempotent."""
        done = self.wait_done(timeout)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(5.0 if done else 0.0)
        return done

    # With the lock held.

    def _begin(self) -> None:
        self._failed.clear()
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="emergency_ckpt deletions", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _open(self, of: Iterable[str]) -> list[str]:
        return [each for each in of if each not in self._failed]

    def _is_anything_open(self) -> bool:
        if self._open(self._steps) or self._open(self._hidden) or self._newest is not None:
            return True
        if self._sweeper is None or "" in self._failed:
            return False
        return self._leftovers is None or bool(self._open(self._leftovers))

    # The thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._is_anything_open())
                if self._closed:
                    return
            try:
                self._work()
            except Exception as error:
                with self._changed:
                    self._failed |= {"", *self._steps, *self._hidden, *(self._leftovers or ())}
                    self._newest = None
                if not self._closed:
                    self._warn(None, f"deleting is tried again with the next deletion: {error}")
            with self._changed:
                self._changed.notify_all()

    def _work(self) -> None:
        """A round: all steps out of sight, then some bytes of them, then some leftovers."""
        self._check_current()
        with self._changed:
            wanted = [self._steps[name] for name in self._open(self._steps)]
        side_by_side(self._try_to_hide, wanted, _AT_A_TIME, "hiding steps")
        self._point_at_newest()
        with self._changed:
            self._changed.notify_all()
            hidden = [self._hidden[name] for name in self._open(self._hidden)][:_AT_A_TIME]
        if hidden:
            side_by_side(self._try_to_clear, hidden, _AT_A_TIME, "deleting steps")
            return
        if self._sweeper is None:
            return
        if self._leftovers is None:
            found = self._store.leftovers(self._sweeper)
            with self._changed:
                self._leftovers = [name for name in found if name not in self._seen_to]
        with self._changed:
            leftovers = self._open(self._leftovers)[:_LEFTOVERS_A_ROUND]
        side_by_side(self._try_to_sweep, leftovers, _AT_A_TIME, "removing leftovers")

    def _check_current(self) -> None:
        newest, current = self._store.newest_generation(), self._current()
        if newest is None or newest.number != current.number:
            raise PersistentStoreError("another life of the run has begun, which sees to what is left")

    def _try_to_hide(self, wanted: tuple[PersistentStep, str]) -> None:
        step, _ = wanted
        with self._working_on(step.name):
            if self._closed or self._steps.get(step.name) != wanted:
                return
            try:
                self._hide(*wanted)
            except _FAILURES as error:
                self._note_failure(
                    step.name, step.step_id.step, f"{step.step_id} could not be deleted: {error}"
                )

    def _hide(self, step: PersistentStep, why: str) -> None:
        hidden = self._store.hide_step(step)
        with self._changed:
            del self._steps[step.name]
            if hidden is not None:
                self._hidden[hidden.directory] = hidden
        self._tell(step.step_id.step, f"deleted the persistent {step.step_id}: {why}")

    def _try_to_clear(self, hidden: HiddenStep) -> None:
        with self._working_on(hidden.directory):
            if self._closed or self._hidden.get(hidden.directory) != hidden:
                return
            try:
                if self._store.clear(hidden, lambda: self._closed):
                    self._forget(hidden.directory)
            except _FAILURES as error:
                where = self._store.files.locate(hidden.directory)
                self._note_failure(hidden.directory, None, f"{where} could not be deleted: {error}")

    def _try_to_sweep(self, directory: str) -> None:
        with self._working_on(directory):
            if self._closed or directory in self._seen_to:
                self._seen(directory)
                return
            try:
                self._sweep(directory)
            except _FAILURES as error:
                text = f"leftovers of earlier lives in {directory} could not be removed: {error}"
                self._note_failure(directory, None, text)
            else:
                self._seen(directory)

    def _sweep(self, directory: str) -> None:
        assert self._sweeper is not None
        for name in self._store.remove_leftover(directory, self._sweeper):
            self._tell(None, f"removed {name}, which an earlier life of the run left uncommitted")

    def _point_at_newest(self) -> None:
        if (newest := self._newest) is None:
            return
        try:
            self._store.point_at(newest)
        except _FAILURES as error:
            self._warn(newest.step_id.step, f"the pointer to the newest step could not be written: {error}")
        with self._changed:
            if self._newest is newest:
                self._newest = None

    def _forget(self, directory: str) -> None:
        with self._changed:
            self._hidden.pop(directory, None)

    def _seen(self, directory: str) -> None:
        with self._changed:
            if self._leftovers is not None and directory in self._leftovers:
                self._leftovers.remove(directory)

    def _note_failure(self, directory: str, step: int | None, text: str) -> None:
        with self._changed:
            self._failed.add(directory)
        self._warn(step, f"{text}. It is tried again with the next deletion")

    @contextlib.contextmanager
    def _working_on(self, directory: str) -> Iterator[None]:
        """Nobody else works on it meanwhile. Each request has its time limit, and so has this."""
        with self._changed:
            self._changed.wait_for(lambda: directory not in self._busy)
            self._busy.add(directory)
        try:
            yield
        finally:
            with self._changed:
                self._busy.remove(directory)
                self._changed.notify_all()
