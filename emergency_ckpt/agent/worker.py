"""A worker: requests done one after the other in a thread of its own, whose errors wait for whoever asks."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Generic, TypeVar

from emergency_ckpt.errors import EmergencyCheckpointError

Request = TypeVar("Request")
_LOOK_SECONDS = 0.5


def join_all(threads: Collection[threading.Thread], seconds: float) -> None:
    """Waits for the ends of all of them, so long in all at most."""
    for thread in threads:
        thread.join(seconds / len(threads))


class Worker(Generic[Request]):
    """One thread and its queue.

    Args:
      name: of the thread, and of the worker in messages.
      work: does one request. What it raises is kept as an error and does not end the thread.
    """

    def __init__(self, name: str, work: Callable[[Request], None]) -> None:
        self._name = name
        self._work = work
        self._requests: queue.Queue[Request | None] = queue.Queue()
        self._idle = threading.Condition()
        self._open = 0
        self._errors: list[EmergencyCheckpointError] = []
        self._thread = threading.Thread(target=self._run, name=f"emergency_ckpt {name}", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queues a request. Raises EmergencyCheckpointError when the worker was closed."""
        if not self._thread.is_alive():
            raise EmergencyCheckpointError(f"the {self._name} worker has ended and takes no {request}")
        with self._idle:
            self._open += 1
        self._requests.put(request)

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or being done."""
        return self._open > 0

    def note(self, error: EmergencyCheckpointError) -> None:
        """Keeps an error for `take_errors`."""
        with self._idle:
            self._errors.append(error)

    def take_errors(self) -> list[EmergencyCheckpointError]:
        """Errors since the last call, oldest first."""
        with self._idle:
            errors, self._errors = self._errors, []
        return errors

    def wait(self, timeout: timedelta, interrupted: Callable[[], bool] | None = None) -> bool:
        """Waits until every request is done.

        False when the time limit came first, or `interrupted` was true, which is asked now and then.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        with self._idle:
            while True:
                left = max(deadline - time.monotonic(), 0.0)
                look = left if interrupted is None else min(left, _LOOK_SECONDS)
                if self._idle.wait_for(lambda: self._open == 0, look):
                    return True
                if time.monotonic() >= deadline or (interrupted is not None and interrupted()):
                    return False

    def close(self, timeout: timedelta) -> bool:
        """Finishes what was submitted and ends the thread; False when the time limit came first."""
        done = self.wait(timeout)
        self._requests.put(None)
        self._thread.join(5.0 if done else 0.0)
        return done

    def _run(self) -> None:
        while (request := self._requests.get()) is not None:
            try:
                self._work(request)
            except EmergencyCheckpointError as error:
                self.note(error)
            except Exception as error:  # The next request may succeed: whoever asks is told.
                wrapped = EmergencyCheckpointError(f"{self._name} failed: {type(error).__name__}: {error}")
                wrapped.__cause__ = error
                self.note(wrapped)
            with self._idle:
                self._open -= 1
                self._idle.notify_all()
