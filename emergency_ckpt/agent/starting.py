"""For the manager: the agent of this host, started if none runs.

However many processes ask at once, one agent is there afterwards, and all get its endpoint.
"""

from __future__ import annotations

import dataclasses
import os
import select
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from emergency_ckpt.agent.client import PeerClient
from emergency_ckpt.agent.endpoint import FORMAT_VERSION, Endpoint
from emergency_ckpt.agent.options import AgentOptions
from emergency_ckpt.agent.record import LOG, AgentRecord, agent_directory, agent_lives, read_record
from emergency_ckpt.errors import AgentStartError, CorruptDataError, PeerUnavailableError
from emergency_ckpt.local.claim import check_root

START_LIMIT = timedelta(seconds=30)
IDLE_SECONDS = 900.0
LAUNCH_MARKS = "EMERGENCY_CKPT_LAUNCH_"
"""How the names of all variables begin that `emergency-ckpt launch` sets."""
_ASK_LIMIT = timedelta(seconds=3)
_POLL_SECONDS = 0.05
_MAX_LINE_BYTES = 4096
_LOG_TAIL_BYTES = 2000


def ensure_agent(root: Path, options: AgentOptions, limit: timedelta = START_LIMIT) -> Endpoint:
    """The endpoint of the agent that serves `root`: of the one that runs, or of one that is started.

    `options` count only for one that is started. An agent that speaks another format is asked to leave and
    replaced.

    Raises AgentStartError when there is none within `limit`, LocalDirectoryError for a directory that cannot be
    used.
    """
    check_root(root)
    directory = agent_directory(root)
    deadline = time.monotonic() + limit.total_seconds()
    why = "nothing was tried"
    while time.monotonic() < deadline:
        if not agent_lives(directory):
            if (why := _start(root, directory, options, deadline)) == "ready":
                continue
        else:
            endpoint, why = _running(directory)
            if endpoint is not None:
                return endpoint
        time.sleep(_POLL_SECONDS)
    raise AgentStartError(
        f"there is no agent for {root} after {limit.total_seconds():.0f} s: {why}. Look into "
        f"{directory / LOG}; "
        "an agent that hangs may be killed, its successor takes over."
    )


def _running(directory: Path) -> tuple[Endpoint | None, str]:
    """The endpoint of the agent that holds the lock, if it can be used; otherwise why not (yet)."""
    try:
        record = read_record(directory)
    except CorruptDataError as error:
        return None, str(error)
    if record is None:
        return None, "an agent holds the lock, but has not written where it listens"
    last: PeerUnavailableError | None = None
    # In another network namespace it is reached as from other hosts.
    of_host = dataclasses.replace(record.endpoint, token=record.owner or record.endpoint.token)
    for dial in dict.fromkeys((record.dial, record.endpoint.host)):
        try:
            with PeerClient(of_host, _ASK_LIMIT, dial) as client:
                return _asked(client, record)
        except PeerUnavailableError as error:
            last = error
    return None, f"process {record.pid} holds the lock, but {last}"


def _asked(client: PeerClient, record: AgentRecord) -> tuple[Endpoint | None, str]:
    found = record.format
    if found == FORMAT_VERSION:
        status = client.status()
        if status.get("leaving"):
            return None, f"the agent before (pid {record.pid}) was asked to leave, and has not left yet"
        found = status["format"]
    if found == FORMAT_VERSION:
        return record.endpoint, "it runs"
    client.leave()
    return None, (
        f"the agent of another version ({record.package}, format {found}, pid {record.pid}; this is format "
        f"{FORMAT_VERSION}) was asked to leave, and has not left yet: end it"
    )


def _start(root: Path, directory: Path, options: AgentOptions, deadline: float) -> str:
    """Starts an agent and waits until it serves: 'ready', or why it does not.

    Raises AgentStartError where trying again is of no use.
    """
    if not sys.executable:
        raise AgentStartError(
            "this Python does not know its own executable, so that it cannot start an agent: start it yourself "
            f"with `emergency-ckpt agent --local-directory {root}`"
        )
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = directory / LOG
    ours = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    reading, writing = os.pipe()
    try:
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab") as output:
            words = ["--local-directory", str(root.absolute()), *options.words(), "--ready-fd", str(writing)]
            # It begins a process of its own and ends at once. Nothing in its directory is imported.
            subprocess.run(
                [sys.executable, "-P", "-m", "emergency_ckpt.agent", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(writing,),
                start_new_session=True,
                cwd="/",
                env=_environment() | {"PYTHONPATH": f"{ours}{os.pathsep}{path}" if path else ours},
                timeout=max(1.0, deadline - time.monotonic()),
                check=True,
            )
        os.close(writing)
        writing = -1
        said = _read_line(reading, deadline)
    except (OSError, subprocess.SubprocessError) as error:
        raise AgentStartError(
            f"the agent for {root} cannot be started: {error}. The end of {log}: {_tail(log)}"
        ) from error
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    if said is None:
        return "the agent that was started does not serve yet"
    if said == "another":
        return "another agent was being started at the same time, and does not answer yet"
    if said != "ready":
        reason = said.removeprefix("failed: ") or f"it ended. The end of {log}: {_tail(log)}"
        raise AgentStartError(f"the agent for {root} did not start: {reason}")
    return said


def _environment() -> dict[str, str]:
    """Without the marks by which `emergency-ckpt launch` ends what its processes started: agents stay."""
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCH_MARKS)}


def _read_line(reading: int, deadline: float) -> str | None:
    """The line that an agent says about its start; empty when it ended without one, None at the deadline."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _MAX_LINE_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            return None
        more = os.read(reading, _MAX_LINE_BYTES)
        if not more:
            break
        line += more
    return line.decode(errors="replace").strip()


def _tail(log: Path) -> str:
    try:
        return log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip() or "it is empty"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
