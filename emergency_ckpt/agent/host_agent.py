"""The agent of this host as one trainer uses it: attached as long as the trainer lives, told what it works on.

An agent that was lost is started again when it is needed next. Goodbye is said at the manager's own end: an
agent whose trainer ends without it sees to what is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import secrets
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from emergency_ckpt.agent.attachment import Attachment, attach
from emergency_ckpt.agent.draining import Stop
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.options import AgentOptions
from emergency_ckpt.agent.order_client import OrderClient
from emergency_ckpt.agent.orders import Destination, Registration, Share
from emergency_ckpt.agent.presence import Presence
from emergency_ckpt.agent.progress import Progress
from emergency_ckpt.agent.record import AgentRecord, agent_directory, agent_lives, read_record
from emergency_ckpt.agent.starting import ensure_agent
from emergency_ckpt.core.retrying import store_error
from emergency_ckpt.errors import (
    AgentStartError,
    CorruptDataError,
    LocalDirectoryError,
    PeerUnavailableError,
    StaleGenerationError,
)
from emergency_ckpt.preemption.notice import Notice

_LOOK = timedelta(seconds=2)
_TRIES = 3
_NO_ANSWER = ("unreachable", "timeout")
_T = TypeVar("_T")
_TELL = timedelta(seconds=5)
_HURRIED_SECONDS = 2.0


class HostAgent:
    """Finds or starts the agent of `root` when it is needed. Safe to use from any thread.

    All methods raise AgentStartError, LocalDirectoryError or PeerUnavailableError where there is no agent that
    does what is asked.
    """

    def __init__(
        self, root: Path, options: AgentOptions, on_notice: Callable[[Notice], None] | None = None
    ) -> None:
        """`on_notice`: hears, in a thread of the attachment, of the notices of the agent."""
        self._on_notice = on_notice
        self._root = root
        self._options = options
        self._trainer = secrets.token_hex(16)
        self._guard = threading.Lock()
        self._attachment: Attachment | None = None
        self._record: AgentRecord | None = None
        self._registration: Registration | None = None
        self._presence: Presence | None = None
        self._closed = False

    def connect(self) -> Endpoint:
        """Attaches to the agent, if that is not so already; returns where others reach it."""
        with self._guard:
            return self._connected().endpoint

    def hold_on(self, *, starts: bool) -> None:
        """Attaches to the agent that runs, if that is not so already; `starts`: also where none runs yet.

        Does nothing once this is closed.
        """
        with self._guard:
            held = self._attachment is not None and self._attachment.lost is None
            if not self._closed and not held and (starts or agent_lives(agent_directory(self._root))):
                self._connected()

    def register(self, registration: Registration) -> None:
        """Tells the agent what this trainer works on from now on, and every later agent."""
        with self._guard:
            record = self._connected()
            self._registration = registration
            OrderClient.of_this_host(record).register(self._trainer, registration)

    def pass_on(self, notice: Notice, process: int | None) -> None:
        """Tells the agent that the host of a process goes away, which it cannot know; None: of some process."""
        with self._guard:
            client = OrderClient.of_this_host(self._connected())
        client.pass_on(notice, process)

    def drain(self, destination: Destination, share: Share, stop: Stop) -> int:
        """Has the agent carry out a share; returns the bytes of the part. `stop` is asked again and again.

        An answer that got lost is asked for again: the agent knows the order, and is at work on it.

        Raises what `draining.carry_out` raises.
        """
        client, drain = _answered(lambda: self._begin(destination, share))
        told = False
        while True:
            report = _answered(lambda: client.look(drain, _LOOK))
            if report.ending == "done":
                return report.nbytes
            if report.ending == "superseded":
                raise StaleGenerationError(report.reason)
            if report.ending == "corrupt":
                raise CorruptDataError(report.reason)
            if report.ending is not None:
                raise store_error(report.cause, report.reason)
            if not told and (reason := stop()) is not None:
                _answered(functools.partial(client.give_up, drain, reason))
                told = True

    def _begin(self, destination: Destination, share: Share) -> tuple[OrderClient, str]:
        with self._guard:
            client = OrderClient.of_this_host(self._connected())
        return client, client.begin(destination, share)

    def tell_progress(self, progress: Progress) -> None:
        """Tells the agent how far this trainer is; does nothing where none is attached."""
        with self._guard:
            held = self._attachment is not None and self._attachment.lost is None and not self._closed
            record = self._record if held else None
        if record is not None:
            OrderClient.of_this_host(record, _TELL).tell_progress(self._trainer, progress)

    @property
    def closed(self) -> bool:
        """Whether nothing more is asked of the agent."""
        return self._closed

    def close(self, *, is_done: bool = True) -> None:
        """Says goodbye and lets go. The agent stays as long as somebody needs it. Repeating it is fine.

        Not `is_done`: without a word, as one that dies does, so that the agent sees to what is left; where it
        does not answer just now, the end of this process lets go.
        """
        self._closed = True
        if not self._guard.acquire(timeout=-1 if is_done else _HURRIED_SECONDS):
            return
        try:
            attachment, self._attachment = self._attachment, None
            told = not is_done or self._registration is None or self._say_goodbye()
            if self._presence is not None and not is_done:
                self._presence.close()  # First, so that the agent finds nobody when the attachment ends.
            if attachment is not None:
                attachment.close()
            if self._presence is not None:
                self._presence.close(told=told)
        finally:
            self._guard.release()

    def _say_goodbye(self) -> bool:
        """To the agent that runs now, which may be another one; False where none heard it."""
        with contextlib.suppress(PeerUnavailableError, CorruptDataError, LocalDirectoryError):
            record = read_record(agent_directory(self._root))
            if record is not None:
                OrderClient.of_this_host(record).say_goodbye(self._trainer)
                return True
        return False

    def _connected(self) -> AgentRecord:
        if self._closed:
            raise PeerUnavailableError("the manager that used the agent of this host is closed")
        if self._attachment is not None and self._attachment.lost is None and self._record is not None:
            return self._record
        try:
            return self._attach()
        except PeerUnavailableError:
            return self._attach()  # It may have been about to leave when it was found.

    def _attach(self) -> AgentRecord:
        if self._attachment is not None:
            self._attachment.close()
            self._attachment = None
        endpoint = ensure_agent(self._root, self._options)
        try:
            record = read_record(agent_directory(self._root))
        except CorruptDataError as error:
            raise AgentStartError(str(error)) from error
        if record is None or record.endpoint != endpoint:
            raise AgentStartError(f"the agent of {self._root} was replaced while it was looked for")
        if self._presence is None or not self._presence.is_current():
            if self._presence is not None:
                self._presence.close()
            self._presence = Presence(agent_directory(self._root), self._trainer)
        try:
            self._attachment = attach(
                endpoint, dial=record.dial, trainer=self._trainer, on_notice=self._on_notice
            )
        except PeerUnavailableError:
            # In another network namespace it is reached as from other hosts.
            record = dataclasses.replace(record, dial=endpoint.host)
            self._attachment = attach(
                endpoint, dial=record.dial, trainer=self._trainer, on_notice=self._on_notice
            )
        self._record = record
        if self._registration is not None:
            OrderClient.of_this_host(record).register(self._trainer, self._registration)
        return record


def _answered(ask: Callable[[], _T]) -> _T:
    """What an agent says, asked again where nothing tells whether it has heard."""
    for _ in range(_TRIES - 1):
        try:
            return ask()
        except PeerUnavailableError as error:
            if error.code not in _NO_ANSWER:
                raise
    return ask()
