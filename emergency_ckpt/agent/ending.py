"""For those who end with their agents: what agents have left to do, and how they are ended.

An agent is known by its record, and its process id counts only while the agent's lock is held.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.memory import MEMORY
from emergency_ckpt.agent.options import AgentOptions
from emergency_ckpt.agent.record import AgentRecord, agent_directory, agent_lives, living_record
from emergency_ckpt.agent.starting import IDLE_SECONDS, ensure_agent
from emergency_ckpt.errors import AgentStartError, CorruptDataError, LocalDirectoryError, PeerUnavailableError

_POLL_SECONDS = 0.1
_KILL_SECONDS = 10.0
_ASK = timedelta(seconds=5)


def work_left(root: Path) -> str:
    """What the agent of a ramdisk directory has left to do, in words; empty where there is nothing.

    An agent that does not answer has something left as long as it lives.
    """
    record = _living(root)
    if record is None:
        return ""
    last: PeerUnavailableError | None = None
    for dial in dict.fromkeys((record.dial, record.endpoint.host)):
        try:
            with PeerClient(record.endpoint, _ASK, dial) as client:
                said = client.status()
            counts = [
                f"{said.get(what, 0)} {what}" for what in ("trainers", "drains", "flushes") if said.get(what)
            ]
            return f"the agent of {root} has {', '.join(counts)}" if counts else ""
        except PeerUnavailableError as error:
            last = error
    return f"the agent of {root} does not answer ({last})" if _living(root) is not None else ""


def begin_again(root: Path) -> bool:
    """Starts an agent where one was killed that had work left; False where that is not so.

    Raises AgentStartError, LocalDirectoryError.
    """
    directory = agent_directory(root)
    if not (directory / MEMORY).exists() or agent_lives(directory):
        return False
    ensure_agent(root, AgentOptions(idle_seconds=IDLE_SECONDS))
    return True


def wait_until_idle(roots: Iterable[Path], seconds: float, hurry: Callable[[], bool] = lambda: False) -> str:
    """Waits until agents have nothing left to do; what is left when time is over, or `hurry` says so."""
    roots = tuple(roots)
    deadline = time.monotonic() + seconds
    while True:
        left = "; ".join(filter(None, map(work_left, roots)))
        if not left or hurry() or time.monotonic() >= deadline:
            return left
        time.sleep(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def end_agent(root: Path, grace_seconds: float) -> None:
    """Ends the agent of a directory, if one runs: SIGTERM, and SIGKILL when the grace is over (0: at once).

    Raises AgentStartError when it does not end.
    """
    record = _living(root)
    if record is None:
        return
    try:
        handle = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    try:
        if _living(root) != record:
            return  # It ended before the handle was taken.
        for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, _KILL_SECONDS)):
            if number == signal.SIGTERM and not grace_seconds:
                continue
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            if select.select([handle], [], [], seconds)[0]:
                return
        raise AgentStartError(f"the agent of {root} (pid {record.pid}) does not end, SIGKILL included")
    finally:
        os.close(handle)


def _living(root: Path) -> AgentRecord | None:
    try:
        return living_record(agent_directory(root))
    except (CorruptDataError, LocalDirectoryError):
        return None
