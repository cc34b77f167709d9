"""What all processes of the job heard of preemption, as each of them sees it.

Every notice that asks for a save is here on every process within moments, with the process that heard it; of a
signal that JAX's own handler took it is not known which process got it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from typing import ClassVar, Protocol

from emergency_ckpt.jaxio.preemption import Told
from emergency_ckpt.preemption.notice import Notice, parse_time, plain
from emergency_ckpt.preemption.signals import SIGNAL

# JAX looks for a signal that it has caught once a second, and writes down when it looked.
_JAX_LOOKS_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class JobNotice:
    """A notice that asks for a save, and which process heard it.

    Attributes:
      process: its index: `terminate` means that the host of this process goes away. None: some process of the
        job got a SIGTERM; JAX does not say which.
      notice: its times are those of the clock of that process's host.
    """

    process: int | None
    notice: Notice


class Channel(Protocol):
    """How processes tell each other (`jaxio.preemption.PreemptionQuery`). From any thread."""

    @property
    def service_runs(self) -> bool: ...

    @property
    def process_index(self) -> int: ...

    @property
    def process_count(self) -> int: ...

    def announce(self, notice: bytes) -> str: ...

    def told(self) -> Told: ...


class _Process:
    """Several managers of one process see the same key of JAX."""

    signalled: ClassVar[str | None] = None


class JobNotices:
    """Those of one manager. Safe to use from any thread."""

    def __init__(self, channel: Channel, grace_seconds: float) -> None:
        """`grace_seconds`: from a signal to the end of the process."""
        self._channel = channel
        self._grace_seconds = grace_seconds
        self._guard = threading.Lock()
        self._known: list[JobNotice] = []
        self._before = _Process.signalled
        self._read_signal: str | None = None

    @property
    def known(self) -> tuple[JobNotice, ...]:
        """In the order in which this process learnt of them, each once."""
        with self._guard:
            return tuple(self._known)

    def announce(self, notice: Notice) -> str:
        """Tells all processes what this one heard. Returns what comes of it."""
        self._add(JobNotice(self._channel.process_index, notice))
        return self._channel.announce(notice.to_line())

    def look(self) -> list[JobNotice]:
        """What is new. Raises PeerFailedError where the others cannot be reached."""
        told = self._channel.told()
        found: list[JobNotice] = []
        for process, line in told.notices:
            with contextlib.suppress(ValueError):  # A later version says more.
                found.append(JobNotice(process, Notice.from_line(line)))
        if told.signalled is not None and self._is_unread(told.signalled):
            signalled = self._of_jax(told.signalled)
            # What an earlier manager of this process knew counts as long as it stands.
            if told.signalled != self._before or signalled.stands(time.time()):
                found.append(JobNotice(None, signalled))
        return [notice for notice in found if self._add(notice)]

    def _is_unread(self, signalled: str) -> bool:
        with self._guard:
            is_unread = signalled != self._read_signal
            self._read_signal = _Process.signalled = signalled
            return is_unread

    def _of_jax(self, said: str) -> Notice:
        detail = "a process of the job got SIGTERM; JAX heard it"
        try:
            received = parse_time(said)
        except ValueError:
            received, detail = time.time(), plain(f"{detail} at {said}", 200)
        deadline = max(received, received - _JAX_LOOKS_SECONDS + self._grace_seconds)
        return Notice(SIGNAL, "terminate", received, deadline, detail)

    def _add(self, notice: JobNotice) -> bool:
        with self._guard:
            is_new = all(
                (notice.process, notice.notice.key) != (known.process, known.notice.key)
                for known in self._known
            )
            if is_new:
                self._known.append(notice)
            return is_new
