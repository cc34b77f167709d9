"""The life of an agent: one per ramdisk directory, from the lock to the last answer.

It writes its record once it serves, removes it before it stops, and leaves by itself when nobody needs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import logging
import os
import re
import resource
import secrets
import signal
import socket
import ssl
import stat
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from emergency_ckpt.agent.addresses import choose_addresses
from emergency_ckpt.agent.endpoint import FORMAT_VERSION, Endpoint
from emergency_ckpt.agent.flushes import Flushes
from emergency_ckpt.agent.memory import Memory, Remembered
from emergency_ckpt.agent.options import TOKEN_VARIABLE, AgentOptions
from emergency_ckpt.agent.presence import condition_of, sweep, trainer_lives
from emergency_ckpt.agent.record import AgentLock, AgentRecord, agent_directory, read_record
from emergency_ckpt.agent.server import ServerLimits, ShardServer
from emergency_ckpt.agent.stalls import Stalls
from emergency_ckpt.agent.trainers import Registered
from emergency_ckpt.errors import AgentStartError, ConfigError, EmergencyCheckpointError
from emergency_ckpt.local.claim import check_root
from emergency_ckpt.preemption.choosing import choose_sources
from emergency_ckpt.preemption.notice import Notice, new_id
from emergency_ckpt.preemption.watch import Watch

_TOKEN = re.compile(r"[0-9A-Za-z._~+/=-]{16,512}")
_MAX_TOKEN_FILE = 4096
_WATCH_SECONDS = 1.0
_REQUEST_SECONDS = 10.0
# A manager that is closed may be followed by another one.
_LINGER_SECONDS = 5.0
_FINISH_POLL_SECONDS = 0.1
_SPARE_DESCRIPTORS = 256
AGENT = "agent"
"""The source of the notice that an agent is itself told to leave."""
_log = logging.getLogger("emergency_ckpt.agent")


def run_agent(
    root: Path,
    options: AgentOptions,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves `root` until it is asked to leave (SIGTERM, SIGINT, SIGHUP, `POST /v1/leave`) or nobody needs it.

    After a signal it serves on for a while, as long as there are drains, or trainers that save now; a second
    one, and being asked, ends it at once. SIGTERM and SIGHUP are told to the trainers as the end of the host.

    Args:
      ready: called once it serves and its record is in place.

    Raises AnotherAgentError, LocalDirectoryError, ConfigError, AgentStartError.
    """
    check_root(root)
    os.umask(0o077)
    token = _token(options)
    context = _tls_context(options)
    directory = agent_directory(root)
    lock = AgentLock(directory)
    try:
        asyncio.run(_Life(root, directory, options, lock).live(token, context, ready))
    finally:
        lock.release()


class _Life:
    """One agent, from its first answer to its last."""

    def __init__(self, root: Path, directory: Path, options: AgentOptions, lock: AgentLock) -> None:
        self._root = root
        self._directory = directory
        self._options = options
        self._lock = lock
        self._signalled: str | None = None
        self._hurry = asyncio.Event()

    async def live(self, given: str | None, context: ssl.SSLContext | None, ready: Callable[[], None]) -> None:
        options = self._options
        addresses = choose_addresses(options.bind, options.advertise, options.reach)
        limits = ServerLimits(
            connections=_connections(options.connections),
            request_seconds=min(_REQUEST_SECONDS, options.stall_seconds),
            stall_seconds=options.stall_seconds,
        )
        owner = secrets.token_urlsafe(32)
        memory = Memory(self._directory)
        before = memory.recall()
        token = given or (before.token if before else secrets.token_urlsafe(32))
        flushes = Flushes()
        condition = functools.partial(condition_of, self._directory)
        server = ShardServer(self._root, token, owner, limits, flushes.trainer_died, condition)
        server.flushes = lambda: flushes.pending
        server.is_current = self._lock.is_current
        self._catch_signals(server)
        port = await self._listen(server, addresses.bind, before.port if before else 0, context)
        ca_file = str(options.tls_ca.absolute()) if options.tls_ca else None
        endpoint = Endpoint(addresses.advertise, port, token, context is not None, ca_file)
        package = metadata.version("emergency_ckpt")
        record = AgentRecord(endpoint, addresses.dial, os.getpid(), package, owner)
        watch: Watch | None = None

        def remember() -> None:
            if not self._lock.is_current():
                return  # What lies there now is another agent's.
            memory.keep(port, token, server.trainers.registered(), server.drains.orders)
            sweep(self._directory)

        server.remember = remember
        flushes.begin(server.trainers, endpoint, addresses.dial, server.counters, remember)
        server.last_calls.begin(endpoint, addresses.dial)
        stalls = Stalls(server.trainers, server.board, server.last_calls, server.counters)
        server.stalled = stalls.told
        try:
            record.write(self._directory)
            if before is not None:
                self._recall(server, before, endpoint)
            server.trainers.look()
            remember()
            _log.info(
                "agent %s (format %d, pid %d) serves %s on %s port %d and advertises %s: %s",
                record.package,
                FORMAT_VERSION,
                record.pid,
                self._root,
                addresses.bind,
                port,
                endpoint,
                addresses.why,
            )
            ready()
            watch = Watch(choose_sources(options.sources), server.notices.tell_from_thread)
            stalls.begin(endpoint, addresses.dial)
            why = await self._watch(server, record, flushes)
            _log.info("the agent leaves: %s", why)
            if self._signalled:
                await self._finish(server)
        finally:
            record.remove(self._directory)
            for each in (stalls, server.last_calls, flushes):
                each.stop()
            server.drains.close("the agent leaves")
            await server.stop()
            if watch is not None:
                await asyncio.to_thread(watch.close)
            for each in (stalls, server.last_calls, flushes):
                each.join()

    async def _listen(
        self, server: ShardServer, bind: str, earlier: int, context: ssl.SSLContext | None
    ) -> int:
        """Listens where it was told to, else where others knew the agent before, else on a free port."""
        given = self._options.port
        try:
            port = await server.start(bind, [given] if given else [earlier, 0] if earlier else [0], context)
        except OSError as error:
            await server.stop()
            raise AgentStartError(
                f"the agent of {self._root} cannot listen on {bind} port {given}: {error.strerror or error}. "
                + _what_to_do(error, given)
            ) from error
        if earlier and port != earlier:
            _log.warning(
                "the agent before was reached on port %d, this one is on port %d: agents of other hosts do not "
                "find it until their trainers start anew",
                earlier,
                port,
            )
        return port

    def _recall(self, server: ShardServer, before: Remembered, endpoint: Endpoint) -> None:
        """Takes over what the agent before this one was told, as far as its run is still here."""
        runs = server.slot_runs()
        known: dict[str, Registered] = {}
        for trainer, each in before.trainers.items():
            registration = each.registration
            if registration.life.run not in runs and not trainer_lives(self._directory, trainer):
                _log.info("%s is forgotten: the slots here hold nothing of it", registration.life)
                continue
            agents = list(registration.agents)
            agents[registration.process] = endpoint
            known[trainer] = Registered(dataclasses.replace(registration, agents=tuple(agents)), each.state)
        server.trainers.recall(known)
        orders = [order for order in before.orders if order.destination.life.run in runs]
        server.drains.recall(orders)
        if known or orders:
            told = ", ".join(sorted({str(each.registration.life) for each in known.values()}))
            _log.info(
                "the agent before left %d trainers (%s) and %d drains", len(known), told or "none", len(orders)
            )

    async def _finish(self, server: ShardServer) -> None:
        """Serves on for a while, or until the second signal: drains that run may end, and others may come.

        Trainers that hear of notices save now, and ask for the drain of that.
        """
        seconds = self._options.finish_seconds
        deadline = time.monotonic() + seconds
        said = ""
        while time.monotonic() < deadline and not self._hurry.is_set():
            await server.look_around()
            left = [
                what
                for what, there in (
                    (f"{server.drains.running} drains are running", server.drains.running > 0),
                    ("the newest step is being seen to", server.last_calls.pending > 0),
                    ("trainers listen that save now", server.notices.listeners > 0),
                )
                if there
            ]
            if not left:
                return
            if not said:
                said = ", ".join(left)
                _log.info("%s: %g s for them", said, seconds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FINISH_POLL_SECONDS):
                    await self._hurry.wait()

    async def _watch(self, server: ShardServer, record: AgentRecord, flushes: Flushes) -> str:
        """Waits until there is a reason to leave, and returns it."""
        idle = self._options.idle_seconds
        period = _WATCH_SECONDS if idle is None else max(0.05, min(_WATCH_SECONDS, idle / 4))
        while True:
            await server.look_around()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(period):
                    await server.left.wait()
            if self._signalled:
                return f"{self._signalled} came"
            if server.left.is_set():
                return "it was asked to"
            if not self._lock.is_current():
                return f"{self._directory} was emptied or replaced, and what is there now is not this agent's"
            self._keep_record(record)
            busy = server.drains.running > 0 or flushes.pending > 0 or server.last_calls.pending > 0
            busy = busy or server.trainers.apart > 0
            quiet = server.trainers.idle_seconds()
            if idle is not None and not busy and server.trainers.over and quiet >= min(idle, _LINGER_SECONDS):
                return "its trainer said goodbye, and there are no other hosts"
            if idle is not None and quiet >= idle and not busy:
                return f"no trainer was attached for {idle:g} s, nobody was served and nothing is left to do"

    def _keep_record(self, record: AgentRecord) -> None:
        try:
            if read_record(self._directory) == record:
                return
            _log.warning("the record of this agent was removed or changed, and is written again")
        except EmergencyCheckpointError as error:
            _log.warning("the record of this agent cannot be read and is written again: %s", error)
        try:
            record.write(self._directory)
        except EmergencyCheckpointError as error:
            _log.error("%s", error)

    def _catch_signals(self, server: ShardServer) -> None:
        def leave(name: str) -> None:
            if self._signalled:
                self._hurry.set()
            elif name != signal.SIGINT.name:  # That is somebody at a terminal, who wants to see it end.
                self._tell_of_signal(server, name)
            self._signalled = name
            server.left.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, leave, number.name)

    def _tell_of_signal(self, server: ShardServer, name: str) -> None:
        """Whoever ends the agent of a host ends the host, as a container of its pod does."""
        now, seconds = time.time(), self._options.finish_seconds
        detail = f"its agent got {name}, and stays at most {seconds:g} s"
        server.notices.tell(Notice(AGENT, "terminate", now, now + seconds, detail, new_id()))


def _what_to_do(error: OSError, port: int) -> str:
    if isinstance(error, socket.gaierror):
        return "Give --bind an address of this host, or a name that resolves to one here."
    match error.errno:
        case errno.EADDRINUSE:
            return (
                "Another program listens there, the agent of another directory perhaps: choose another port "
                f"(--port 0 takes a free one), or end it (`ss -ltnp 'sport = :{port}'` tells which it is)."
            )
        case errno.EADDRNOTAVAIL:
            return "Give --bind an address of this host (`ip address` lists them), or 0.0.0.0 for all."
        case errno.EACCES:
            return "Ports below 1024 are for privileged users: choose a higher one, or 0 for a free one."
        case _:
            return "Choose another port (0 takes a free one) or an address of this host."


def _token(options: AgentOptions) -> str | None:
    """The token that was given; None where none was."""
    path = options.token_file
    if path is not None:
        try:
            with open(path, encoding="ascii") as file:
                token, origin = file.read(_MAX_TOKEN_FILE).strip(), f"the file {path}"
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        except (OSError, UnicodeDecodeError) as error:
            said = error.strerror if isinstance(error, OSError) else "it is no text in ASCII"
            raise ConfigError(
                f"the token file {path} cannot be read: {said}. It is to have one line, the same on all hosts "
                "of the job, and be readable by the user of the agent (--token-file, or "
                "checkpoint_agent_token_file)"
            ) from error
        if mode & 0o077:
            _log.warning("the token file %s can be read by others than its owner (mode %o)", path, mode)
    elif (given := os.environ.get(TOKEN_VARIABLE)) is not None:
        token, origin = given.strip(), f"the variable {TOKEN_VARIABLE}"
    else:
        return None
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{origin} has no usable token: 16 to 512 letters, digits or any of ._~+/=- are expected, found "
            f"{len(token)} characters. `openssl rand -hex 32` makes one"
        )
    return token


def _tls_context(options: AgentOptions) -> ssl.SSLContext | None:
    if options.tls_certificate is None or options.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(options.tls_certificate, options.tls_key, password=_no_password)
    except OSError as error:
        raise ConfigError(
            f"the certificate {options.tls_certificate} and the key {options.tls_key} cannot be used: {error}. "
            "Both are files in PEM, the key is that of the first certificate and has no password"
        ) from error
    try:
        ssl.create_default_context(cafile=options.tls_ca)
    except OSError as error:
        raise ConfigError(
            f"the certificates {options.tls_ca}, by which others are to verify this agent, cannot be used: "
            f"{error}. They are in PEM, at this path on every host"
        ) from error
    return context


def _no_password() -> str:
    """OpenSSL would ask the terminal."""
    raise OSError("the key has a password; give one without")


def _connections(wanted: int) -> int:
    """As many as this process may have descriptors for; raises the limit as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    possible = wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _SPARE_DESCRIPTORS))
    if possible < wanted:
        _log.warning("%d connections at a time instead of %d: `ulimit -n` is %d", possible, wanted, soft)
    return possible


def log_to(handler: logging.Handler) -> None:
    """Sends what this process logs to one handler, with time and level."""
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def log_to_terminal() -> None:
    """For an agent that a person or a supervisor started."""
    log_to(logging.StreamHandler(sys.stderr))
