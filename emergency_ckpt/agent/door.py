"""Who gets in: a bounded number of connections, and only requests that carry the token.

Whoever is refused gets an answer that a program can read; whoever connects and says nothing is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import socket
import ssl
from collections.abc import Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

BY_OWNER = "emergency_ckpt by owner"
"""Set in a request that carries the key of this host instead of the token."""
REFUSAL = "emergency_ckpt refusal"
"""Set in an answer that refuses something: the code that says why."""
_OPEN_TO_ALL = "/healthz"
_REFUSAL_SECONDS = 1.0
_MAX_REFUSALS = 256
_BACKLOG = 1024
_ACCEPT_PAUSE_SECONDS = 0.5
_log = logging.getLogger("emergency_ckpt.agent")


class MalformedRequests(logging.Filter):
    """Keeps what is no HTTP, and comes from whoever reaches the port, out of the log; it is counted instead."""

    def __init__(self, count: Callable[[], None]) -> None:
        super().__init__()
        self._count = count

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if not isinstance(error, HttpProcessingError):
            return True
        self._count()
        return False


def refuse(status: int, code: str, message: str) -> web.Response:
    """An answer that says in JSON why there is no other."""
    response = web.json_response({"error": code, "message": message}, status=status)
    response[REFUSAL] = code
    return response


def guard(token: str, owner: str) -> Middleware:
    """The middleware that lets in who has the token, or the key of this host, and tells all others why not."""
    expected, by_owner = f"Bearer {token}".encode(), f"Bearer {owner}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path != _OPEN_TO_ALL:
            said = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            request[BY_OWNER] = hmac.compare_digest(said, by_owner)
            if not request[BY_OWNER] and not hmac.compare_digest(said, expected):
                refusal = refuse(401, "unauthorized", "this agent lets in only who has its token")
                refusal.force_close()  # Whoever has none keeps no connection from those who have one.
                return refusal
        try:
            return await handler(request)
        except web.HTTPException as error:
            codes = {404: "no_such_page", 405: "no_such_method", 413: "too_large"}
            return refuse(error.status, codes.get(error.status, "malformed"), error.reason)

    return check


class Door:
    """The listening sockets of a server, at most `connections` at a time. Of one event loop.

    What is beyond that is told so or cut before anything is spent on it, a TLS handshake included.
    """

    def __init__(self, server: web.Server, connections: int, silence_seconds: float) -> None:
        self._server = server
        self._connections = connections
        self._silence_seconds = silence_seconds
        self._silent: set[web.RequestHandler] = set()
        self._listening: list[asyncio.Task[None]] = []
        self._beginning: set[asyncio.Task[None]] = set()
        self._refusing: set[asyncio.Task[None]] = set()
        self.refused: Callable[[], None] = lambda: None

    async def open(self, host: str, port: int, context: ssl.SSLContext | None) -> int:
        """Listens; returns the port (another one where 0 was asked for). Raises OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        with contextlib.ExitStack() as stack:
            listening: list[socket.socket] = []
            for family, address in dict.fromkeys((each[0], each[4]) for each in found):
                made = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                made.bind((address[0], port, *address[2:]))
                made.listen(_BACKLOG)
                made.setblocking(False)
                port = made.getsockname()[1]
                listening.append(made)
            stack.pop_all()
        self._listening = [asyncio.create_task(self._accept(each, context)) for each in listening]
        return port

    async def close(self) -> None:
        """Accepts no more connections; those that are open stay."""
        tasks = [*self._listening, *self._beginning, *self._refusing]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def connections(self) -> int:
        """Those that are not set up yet (in their TLS handshake, say) are among them."""
        return len(self._server.connections) + len(self._beginning)

    def hear(self, request: web.Request) -> None:
        """Notes that a connection has said something."""
        self._silent.discard(request.protocol)

    async def _accept(self, listening: socket.socket, context: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        troubled = False
        with listening:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listening)
                    troubled = False
                except OSError as error:  # No descriptor is left, or the client was faster.
                    if not troubled:
                        _log.error("connections cannot be accepted for now: %s", error)
                    troubled = True
                    await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                    continue
                full = self.connections >= self._connections
                if full:
                    self.refused()
                    if context is not None or len(self._refusing) >= _MAX_REFUSALS:
                        connection.close()
                        continue
                tasks = self._refusing if full else self._beginning
                task = asyncio.create_task(
                    self._refuse(connection) if full else self._begin(connection, context)
                )
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                await asyncio.sleep(0)  # Whoever is served already comes first.

    async def _begin(self, connection: socket.socket, context: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        handler = self._server()
        self._silent.add(handler)
        loop.call_later(self._silence_seconds, self._cut_if_silent, handler)
        limit = None if context is None else self._silence_seconds
        try:
            await loop.connect_accepted_socket(
                lambda: handler, connection, ssl=context, ssl_handshake_timeout=limit
            )
        except OSError:  # The client went away, or speaks no TLS.
            self._silent.discard(handler)
            connection.close()
        except BaseException:
            connection.close()
            raise

    def _cut_if_silent(self, connection: web.RequestHandler) -> None:
        if connection in self._silent:
            self._silent.discard(connection)
            if connection.transport is not None:
                connection.transport.abort()

    async def _refuse(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(_Refusal, connection)
            await asyncio.sleep(_REFUSAL_SECONDS)
        except OSError:
            connection.close()


class _Refusal(asyncio.Protocol):
    """A connection too many: told to come back later, given a moment to read it, and closed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        body = json.dumps({"error": "busy", "message": "too many connections: try again"}).encode()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        transport.write(head.encode() + body)
        transport.write_eof()
        # Closing at once would reset the connection while the request is still coming in, answer and all.
        asyncio.get_running_loop().call_later(_REFUSAL_SECONDS, transport.abort)

    def eof_received(self) -> bool:
        return False
