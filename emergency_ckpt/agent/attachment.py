"""A trainer's hold on its agent: a request that stays open as long as the trainer lives.

The agent knows by it that somebody needs it; the trainer learns by it that the agent is gone.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from emergency_ckpt.agent.connection import Answer, PeerConnection
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.errors import PeerUnavailableError
from emergency_ckpt.preemption.notice import MAX_LINE_BYTES, Notice

# The agent says something every two seconds.
_SILENCE_LIMIT = timedelta(seconds=20)
_JOIN_SECONDS = 10.0
_open: weakref.WeakSet[Attachment] = weakref.WeakSet()


class Attachment:
    """Holds an attach request open, in a thread of its own, until it is closed.

    Raises PeerUnavailableError at construction where the agent does not take it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        timeout: timedelta = _SILENCE_LIMIT,
        dial: str | None = None,
        trainer: str | None = None,
        on_notice: Callable[[Notice], None] | None = None,
    ) -> None:
        self._on_notice = on_notice
        asked = [f"trainer={trainer}"] * (trainer is not None) + ["notices=1"] * (on_notice is not None)
        self._page = "/v1/attach" + "?" * bool(asked) + "&".join(asked)
        self._connection = PeerConnection(endpoint, timeout, dial)
        self._changed = threading.Condition()
        self._attached = False
        self._closed = False
        self._lost: PeerUnavailableError | None = None
        _open.add(self)
        self._thread = threading.Thread(target=self._hold, name="emergency_ckpt attach", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._attached or self._lost, 2 * timeout.total_seconds())
        if not self._attached:
            self.close()
            raise self._lost or PeerUnavailableError(f"the agent at {endpoint} does not take an attachment")

    @property
    def lost(self) -> PeerUnavailableError | None:
        """Why the agent does not know of this trainer any more; None while it does."""
        return self._lost

    def wait_lost(self, timeout: timedelta) -> bool:
        """Waits until the agent is gone; False when the time limit came first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._lost is not None, timeout.total_seconds())

    def close(self) -> None:
        """Lets go of the agent. Repeating it is fine."""
        self._closed = True
        self._connection.shut_down()
        self._thread.join(_JOIN_SECONDS)

    def let_go_in_child(self) -> None:
        """In a forked child: the request would outlive the parent here, who would seem to live."""
        self._connection.abandon()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hold(self) -> None:
        try:
            self._connection.exchange("GET", self._page, self._listen)
            lost = PeerUnavailableError(
                f"the agent at {self._connection.endpoint} has left. What to do: start it again.", "left"
            )
        except PeerUnavailableError as error:
            lost = error
        finally:
            self._connection.close()
        with self._changed:
            if not self._closed:
                self._lost = lost
            self._changed.notify_all()

    def _listen(self, answer: Answer) -> None:
        """Reads heartbeats, and notices between them, until there are no more."""
        line = bytearray()
        while byte := answer.read_byte():
            self._connection.extend()
            if byte != b"\n":
                line += byte[: MAX_LINE_BYTES - len(line)]
                continue
            self._hear(bytes(line))
            line.clear()
            with self._changed:
                if self._closed:
                    return
                self._attached = True
                self._changed.notify_all()

    def _hear(self, line: bytes) -> None:
        if line != b"." and self._on_notice is not None and not self._closed:
            try:
                notice = Notice.from_line(line)
            except ValueError:
                return  # A later version of the agent says more.
            self._on_notice(notice)


def attach(
    endpoint: Endpoint,
    timeout: timedelta = _SILENCE_LIMIT,
    dial: str | None = None,
    trainer: str | None = None,
    on_notice: Callable[[Notice], None] | None = None,
) -> Attachment:
    """Tells the agent that this process needs it, until the attachment is closed or this process ends.

    `timeout` is how long the agent may be silent, `trainer` the id under which this process registers what it
    works on; `on_notice` hears, in a thread of the attachment, of notices. Raises PeerUnavailableError.
    """
    return Attachment(endpoint, timeout, dial, trainer, on_notice)


def _let_go_in_child() -> None:
    for attachment in list(_open):
        attachment.let_go_in_child()


os.register_at_fork(after_in_child=_let_go_in_child)
