"""What a source of notices is. Every call of one has a time limit, and `close` ends what is running."""

from __future__ import annotations

from typing import Protocol

from emergency_ckpt.preemption.notice import Notice


class SourceError(Exception):
    """A look that failed: no answer, or one that makes no sense. It is tried again."""


class NotHereError(Exception):
    """A source that has nothing to say on this machine; the message says why."""


class Source(Protocol):
    """Where notices come from. Of one thread, but for `close`.

    Attributes:
      name: in notices and log lines.
      period_seconds: between two looks; 0 where a look waits by itself.
    """

    name: str
    period_seconds: float

    def look(self) -> Notice | None:
        """What there is to say now; the same again and again as long as it holds.

        Raises SourceError, and NotHereError where it is of no use to look again.
        """
        ...

    def close(self) -> None:
        """From any thread: a look that is running ends, and so does every later one."""
        ...
