"""How many trainers live, told by the requests that they hold open.

That works across containers, where pids mean nothing; a trainer that dies lets go of its request.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Trainers:
    """The trainers that are attached, and since when nobody needed this agent. Of one event loop."""

    def __init__(self) -> None:
        self.count = 0
        self._in_use = 0
        self._idle_since = time.monotonic()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While a trainer is attached."""
        self.count += 1
        try:
            with self.in_use():
                yield
        finally:
            self.count -= 1

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While something is done for somebody."""
        self._in_use += 1
        try:
            yield
        finally:
            self._in_use -= 1
            self._idle_since = time.monotonic()

    def idle_seconds(self) -> float:
        """How long nobody has been attached and nobody was served; 0 while somebody is."""
        return 0.0 if self._in_use else time.monotonic() - self._idle_since
