"""Requests to a metadata server: HTTP in the clear, one connection each, past all proxies.

The whole of a request has a time limit, however slowly its bytes come, and its answer a size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import http.client
import socket
import threading
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

from emergency_ckpt.preemption.source import NotHereError, SourceError

MAX_BODY_BYTES = 64 * 1024
_NOBODY = {errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN}


class NoAnswerError(SourceError):
    """Nothing came in time."""


class NobodyError(SourceError):
    """Nobody listens there."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """An answer; names of headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """Raises SourceError for what is no text in ASCII."""
        try:
            return self.body.decode("ascii").strip()
        except UnicodeDecodeError as error:
            raise SourceError("the answer is no text") from error


class MetadataServer:
    """One metadata server. Requests are of one thread, `close` of any.

    Raises NotHereError for a URL that names none.
    """

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        try:
            host, port = parts.hostname, parts.port or 80
        except ValueError:
            host, port = None, 0
        if parts.scheme != "http" or not host or parts.query or parts.fragment:
            raise NotHereError(f"{url!r:.200} is no address of a metadata server; expected http://HOST:PORT")
        self.url = url.rstrip("/")
        self._host, self._port, self._base = host, port, parts.path.rstrip("/")
        self._guard = threading.Lock()
        self._socket: socket.socket | None = None
        self._closed = False

    def request(self, method: str, page: str, headers: Mapping[str, str], seconds: float) -> Reply:
        """Raises NobodyError, NoAnswerError, or SourceError for what is no answer."""
        deadline = time.monotonic() + seconds
        try:
            connection = self._connect(deadline)
            try:
                connection.request(method, f"{self._base}{page}", headers={"Connection": "close", **headers})
                response = connection.getresponse()
                body = response.read(MAX_BODY_BYTES + 1)
            finally:
                self._socket = None
                connection.close()
        except TimeoutError as error:
            raise NoAnswerError(f"{self.url} did not answer {method} {page} within {seconds:g} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = f"{self.url} cannot be asked for {page}: {type(error).__name__}: {error}"
            if isinstance(error, socket.gaierror) or getattr(error, "errno", None) in _NOBODY:
                raise NobodyError(why) from error
            raise SourceError(why) from error
        if len(body) > MAX_BODY_BYTES:
            raise SourceError(f"{self.url} answers {page} with more than {MAX_BODY_BYTES} bytes")
        return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, body)

    def close(self) -> None:
        """Ends a request that is running; every later one fails."""
        with self._guard:
            self._closed = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # It is not connected, or not any more.
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _connect(self, deadline: float) -> http.client.HTTPConnection:
        plain = socket.create_connection((self._host, self._port), max(0.01, deadline - time.monotonic()))
        limited = _LimitedSocket(fileno=plain.detach())
        limited.deadline = deadline
        limited.limit()
        with self._guard:
            if self._closed:
                limited.close()
                raise ConnectionAbortedError("nobody wants the answer any more")
            self._socket = limited
        connection = http.client.HTTPConnection(self._host, self._port)
        connection.sock = limited
        return connection


class _LimitedSocket(socket.socket):
    """Reads and writes until a moment, and not beyond it."""

    deadline = 0.0

    def limit(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time is over")
        self.settimeout(left)

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.limit()
        return super().recv_into(*args, **kwargs)

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        self.limit()
        super().sendall(*args, **kwargs)
