"""The notice that JAX's own handler of SIGTERM is: of some process of the job, once.

Which process got the signal is not known: the handler keeps it from Python, and the key has but a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from emergency_ckpt.jaxio.preemption import signalled
from emergency_ckpt.preemption.notice import Notice, parse_time, plain
from emergency_ckpt.preemption.signals import SIGNAL

# JAX looks for a signal that it has caught once a second, and writes down when it looked.
_JAX_LOOKS_SECONDS = 1.0


class _Process:
    """Several managers of one process see the same key of JAX."""

    signalled: ClassVar[str | None] = None


class JaxSignal:
    """What one manager makes of the key. For one thread."""

    def __init__(self, grace_seconds: float, read: Callable[[], str | None] = signalled) -> None:
        """`grace_seconds`: from a signal to the end of the process."""
        self._grace_seconds = grace_seconds
        self._read = read
        self._before = _Process.signalled
        self._known: str | None = None

    def look(self) -> Notice | None:
        """A notice that is new. Raises PeerFailedError where the coordination service cannot be reached."""
        said = self._read()
        if said is None or said == self._known:
            return None
        self._known = _Process.signalled = said
        notice = self._notice(said)
        # What an earlier manager of this process knew counts as long as it stands.
        return notice if said != self._before or notice.stands(time.time()) else None

    def _notice(self, said: str) -> Notice:
        detail = "a process of the job got SIGTERM; JAX heard it"
        try:
            received = parse_time(said)
        except ValueError:
            received, detail = time.time(), plain(f"{detail} at {said}", 200)
        deadline = max(received, received - _JAX_LOOKS_SECONDS + self._grace_seconds)
        return Notice(SIGNAL, "terminate", received, deadline, detail, plain(f"of jax {said}", 100))
