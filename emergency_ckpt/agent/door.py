"""Who gets in: a bounded number of connections, and only requests that carry the token.

Whoever is refused gets an answer that a program can read; whoever connects and says nothing is cut.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
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
    """The listening socket of a server, at most `connections` at a time. Of one event loop."""

    def __init__(self, server: web.Server, connections: int, silence_seconds: float) -> None:
        self._server = server
        self._connections = connections
        self._silence_seconds = silence_seconds
        self._silent: set[web.RequestHandler] = set()
        self._refusals = 0
        self._listening: asyncio.Server | None = None
        self.refused: Callable[[], None] = lambda: None

    async def open(self, host: str, port: int, context: ssl.SSLContext | None) -> int:
        """Listens; returns the port (another one where 0 was asked for). Raises OSError."""
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(
            self._accept,
            host,
            port,
            ssl=context,
            ssl_handshake_timeout=None if context is None else self._silence_seconds,
            backlog=_BACKLOG,
            reuse_address=True,
        )
        return self._listening.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Accepts no more connections; those that are open stay."""
        if self._listening is not None:
            self._listening.close()

    @property
    def connections(self) -> int:
        """Those that are not set up yet (in their TLS handshake, say) are among them."""
        return len(self._server.connections) + sum(each.transport is None for each in self._silent)

    def hear(self, request: web.Request) -> None:
        """Notes that a connection has said something."""
        self._silent.discard(request.protocol)

    def _accept(self) -> asyncio.Protocol:
        if self.connections >= self._connections:
            self.refused()
            return _Refusal(self)
        connection = self._server()
        self._silent.add(connection)
        asyncio.get_running_loop().call_later(self._silence_seconds, self._cut_if_silent, connection)
        return connection

    def _cut_if_silent(self, connection: web.RequestHandler) -> None:
        if connection in self._silent:
            self._silent.discard(connection)
            if connection.transport is not None:
                connection.transport.abort()

    def begin_refusal(self) -> bool:
        """Whether there is room to refuse politely."""
        self._refusals += 1
        return self._refusals <= _MAX_REFUSALS

    def end_refusal(self) -> None:
        self._refusals -= 1


class _Refusal(asyncio.Protocol):
    """A connection too many: told to come back later, given a moment to read it, and closed."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if not self._door.begin_refusal():
            transport.abort()
            return
        body = json.dumps({"error": "busy", "message": "too many connections: try again"}).encode()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        transport.write(head.encode() + body)
        if transport.can_write_eof():
            transport.write_eof()
        # Closing at once would reset the connection while the request is still coming in, answer and all.
        asyncio.get_running_loop().call_later(_REFUSAL_SECONDS, transport.abort)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.end_refusal()
