"""JAX's coordination client, used by threads in such a way that none of them is in C++ when Python ends.

A thread that comes back from there while the interpreter is being finalized is ended in its middle, and the
whole process with it, by SIGABRT: whoever started the job would not see the exit code.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

LONGEST_CALL_SECONDS = 2.0
"""No call in a thread may take longer; as long as that the end of the process waits for those under way."""
_MARGIN_SECONDS = 2.0
_PARKED_SECONDS = 60.0


class _Calls:
    """Those that are under way in threads other than the main one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._over = False

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        if threading.current_thread() is threading.main_thread():
            yield
            return
        with self._changed:
            over = self._over
            self._count += not over
        if over:
            time.sleep(_PARKED_SECONDS)  # Nobody needs the answer any more: the process is about to end.
            raise RuntimeError("UNAVAILABLE: the process is about to end")
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """None begins any more; waits for those that have begun, not for ever."""
        with self._changed:
            self._over = True
            self._changed.wait_for(lambda: not self._count, LONGEST_CALL_SECONDS + _MARGIN_SECONDS)


_calls = _Calls()
atexit.register(_calls.end)


class EndingClient:
    """The same methods as JAX's client."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any) -> Any:
            with _calls.under_way():
                return method(*args)

        return call
