"""One kept-alive connection to an agent: `http.client` with a deadline for each exchange.

Whatever goes wrong is a PeerUnavailableError that says who, what and what to do next; whatever the other side
says about sizes is checked before it is used.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.errors import PeerUnavailableError

_PIECE_BYTES = 1024 * 1024
_BUFFER_BYTES = 64 * 1024
_MAX_REFUSAL_BYTES = 64 * 1024
_MAX_JSON_BYTES = 16 * 1024 * 1024
_LEAST_BYTES_PER_SECOND = 1024 * 1024
_FIRST_PAUSE_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 1.0
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)
_NEXT = {
    "unauthorized": "the token is that of another agent: read the endpoint again",
    "slot_not_here": "the step was given up or its slot was taken: ask another process, or plan again",
    "layout_not_here": "ask another process for it",
    "busy": "ask again later, or ask another process",
    "not_verified": "its certificate must be for the host that it advertises, and be signed by one of those "
    "that are given here (checkpoint_agent_tls_ca, the same on all hosts)",
    "no_tls": "both sides speak TLS or neither does: give all hosts the same checkpoint_agent_tls flags",
    "malformed": "both sides must run the same version of this package",
}
_T = TypeVar("_T")

MOST_BUFFERS = 256
"""How many places one system call fills."""


def _ended_early(nbytes: int) -> ConnectionResetError:
    return ConnectionResetError(f"the answer ended {nbytes} bytes early")


def _after(targets: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of the targets once so many bytes are in their places."""
    for number, target in enumerate(targets):
        if count < target.nbytes:
            return [target[count:], *targets[number + 1 :]]
        count -= target.nbytes
    return []


class _PlainSocket(socket.socket):
    """Waits in the kernel, at most `stall_seconds` at a time, and not beyond `deadline` of the whole exchange.

    Python's own time limits cost two more system calls per read.
    """

    deadline = 0.0
    stall_seconds = 0.0

    def limit(self, stall_seconds: float) -> None:
        self.stall_seconds = stall_seconds
        self.settimeout(None)
        # Zero would be no limit at all.
        kernel_time = struct.pack("@ll", *divmod(max(1000, int(stall_seconds * 1e6)), 1_000_000))
        self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, kernel_time)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, kernel_time)

    def makefile(self, *args: Any, **kwargs: Any) -> Any:
        # Small shards go through the buffer, large ones past it.
        return super().makefile(*args, **{"buffering": _BUFFER_BYTES, **kwargs})

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        if time.monotonic() > self.deadline:
            raise TimeoutError("the time limit of the exchange is over")
        try:
            return super().recv_into(*args, **kwargs)
        except BlockingIOError as error:
            raise TimeoutError(f"nothing came for {self.stall_seconds:g} s") from error

    def fill(self, targets: Sequence[memoryview]) -> None:
        """Fills all targets, at most `MOST_BUFFERS`, in order: with one system call where it goes well."""
        left, nbytes = targets, sum([target.nbytes for target in targets])
        while nbytes:
            if time.monotonic() > self.deadline:
                raise TimeoutError("the time limit of the exchange is over")
            try:
                count, _, _, _ = self.recvmsg_into(left, 0, socket.MSG_WAITALL)
            except BlockingIOError as error:
                raise TimeoutError(f"nothing came for {self.stall_seconds:g} s") from error
            if not count:
                raise _ended_early(nbytes)
            nbytes -= count
            if nbytes:
                left = _after(left, count)

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().sendall(*args, **kwargs)
        except BlockingIOError as error:
            raise TimeoutError(f"nothing was taken for {self.stall_seconds:g} s") from error


class _EncryptedSocket(ssl.SSLSocket):
    """The same for TLS, which does not take time limits of the kernel."""

    deadline = 0.0
    stall_seconds = 0.0

    def limit(self, stall_seconds: float) -> None:
        self.stall_seconds = stall_seconds

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        left = min(self.deadline - time.monotonic(), self.stall_seconds)
        if left <= 0:
            raise TimeoutError("the time limit of the exchange is over")
        self.settimeout(left)
        return super().recv_into(*args, **kwargs)


class Answer:
    """An answer with status 2xx whose body is read from now on. Read it whole, or close the connection."""

    def __init__(self, response: http.client.HTTPResponse, connection: _PlainSocket | None) -> None:
        """`connection`: where the body may be read past the response; None where it may not."""
        self._response = response
        self._connection = connection
        self._is_past_buffer = False

    @property
    def length(self) -> int | None:
        """Bytes of the body that are left; None where the other side did not say."""
        return self._response.length

    def read_into(self, target: memoryview) -> None:
        """Fills `target`; raises OSError or HTTPException when the body ends before or time is over."""
        at = 0
        while at < target.nbytes:
            count = self._response.readinto(target[at : at + _PIECE_BYTES])
            if not count:
                raise _ended_early(target.nbytes - at)
            at += count

    def fill(self, targets: Sequence[memoryview]) -> None:
        """Fills several in order, as `read_into` does one; for many small ones much faster."""
        connection = self._connection
        if connection is None or self._response.length is None:
            for target in targets:
                self.read_into(target)
            return
        left = targets if self._is_past_buffer else self._take_buffered(targets)
        nbytes = sum([target.nbytes for target in left])
        if nbytes > self._response.length:
            raise _ended_early(nbytes - self._response.length)
        for at in range(0, len(left), MOST_BUFFERS):
            connection.fill(left[at : at + MOST_BUFFERS])
        self._response.length -= nbytes

    def _take_buffered(self, targets: Sequence[memoryview]) -> list[memoryview]:
        """Fills what came together with the headers; returns what is left."""
        left = list(targets)
        while left:
            buffered = len(self._response.fp.peek()) if self._response.length else 0
            if not buffered:
                return left
            part = left[0][:buffered]
            self.read_into(part)
            # More than this was never asked for: what follows is still in the connection.
            self._is_past_buffer = part.nbytes == buffered
            left = _after(left, part.nbytes)
            if self._is_past_buffer:
                return left
        return left

    def read_byte(self) -> bytes:
        """The next byte; empty at the end."""
        return self._response.read(1)


class PeerConnection:
    """Speaks with one agent, one exchange at a time. Not thread-safe.

    Args:
      endpoint: where the agent is, and its token.
      timeout: for connecting, for an answer to begin, and for any pause in it.
      dial: the address to connect to, where it is not the endpoint's (an agent on this very host).
    """

    def __init__(self, endpoint: Endpoint, timeout: timedelta, dial: str | None = None) -> None:
        self.endpoint = endpoint
        self._timeout = timeout.total_seconds()
        self._dial = dial or endpoint.host
        self._context = _tls_context(endpoint) if endpoint.tls else None
        self._socket: _PlainSocket | _EncryptedSocket | None = None
        self._http: http.client.HTTPConnection | None = None
        self._is_given_up = False

    def close(self) -> None:
        """Closes the connection; the next exchange opens another."""
        if self._http is not None:
            self._http.close()
        if self._socket is not None:
            self._socket.close()
        self._http = self._socket = None

    def abandon(self) -> None:
        """Closes this process's hold on the connection, and says nothing to the other side."""
        connection = self._socket
        if connection is not None and (descriptor := connection.detach()) >= 0:
            os.close(descriptor)

    def extend(self) -> None:
        """Begins the time limit of the exchange anew, for an answer that goes on and on."""
        if self._socket is not None:
            self._socket.deadline = time.monotonic() + self._timeout

    def shut_down(self) -> None:
        """Ends an exchange that another thread waits in."""
        connection = self._socket
        if connection is not None:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # It ended by itself.

    def give_up(self) -> None:
        """Ends an exchange that another thread waits in; every later one fails."""
        self._is_given_up = True
        self.shut_down()

    def exchange(
        self,
        method: str,
        address: str,
        read: Callable[[Answer], _T],
        *,
        body: bytes | None = None,
        answer_bytes: int = 0,
    ) -> _T:
        """One request; returns what `read` makes of the answer.

        `answer_bytes` is how large the answer will be, for the time limit. A connection that the agent closed
        while it was idle is opened anew. An agent that is busy is asked again for a while.

        Raises PeerUnavailableError; the connection is closed then.
        """
        give_up = time.monotonic() + self._timeout
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return self._exchange(method, address, read, body, answer_bytes)
            except PeerUnavailableError as error:
                self.close()
                if error.code != "busy" or self._is_given_up or time.monotonic() + pause > give_up:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            except BaseException:
                self.close()  # What is left of the answer must not be taken for the next one.
                raise

    def read_json(self, method: str, address: str, body: bytes | None = None) -> Any:
        """One request whose answer is JSON. Raises PeerUnavailableError."""
        data = self.read_bytes(method, address, _MAX_JSON_BYTES, body)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._error(f"answers {address} with something that is no JSON", "nonsense") from error

    def read_bytes(self, method: str, address: str, most_bytes: int, body: bytes | None = None) -> bytes:
        """One request whose answer has at most `most_bytes`. Raises PeerUnavailableError."""

        def read(answer: Answer) -> bytes:
            length = answer.length
            if length is None or not 0 <= length <= most_bytes:
                raise self._error(
                    f"announces {length} bytes for {address}, at most {most_bytes} make sense", "nonsense"
                )
            assert self._socket is not None
            self._socket.deadline += length / _LEAST_BYTES_PER_SECOND
            data = bytearray(length)
            answer.read_into(memoryview(data))
            return bytes(data)

        return self.exchange(method, address, read, body=body)

    def _exchange(
        self, method: str, address: str, read: Callable[[Answer], _T], body: bytes | None, answer_bytes: int
    ) -> _T:
        try:
            response = self._request(method, address, body, answer_bytes)
            if response.status // 100 != 2:
                raise self._refusal(response, address)
            plain = self._socket if isinstance(self._socket, _PlainSocket) else None
            result = read(Answer(response, plain))
            if response.length == 0:
                response.read()  # Only now the connection takes the next request.
            if not response.isclosed() or response.will_close:
                self.close()
            return result
        except TimeoutError as error:
            what = f"did not answer {method} {address} in time (stalls of {self._timeout:g} s end it)"
            raise self._error(what, "timeout") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, PeerUnavailableError):
                raise
            what = f"failed at {method} {address}: {type(error).__name__}: {error}"
            code = "unreachable"
            if isinstance(error, ssl.SSLError):
                code = "not_verified" if isinstance(error, ssl.SSLCertVerificationError) else "no_tls"
            raise self._error(what, code) from error

    def _request(
        self, method: str, address: str, body: bytes | None, answer_bytes: int
    ) -> http.client.HTTPResponse:
        headers = {"Authorization": f"Bearer {self.endpoint.token}"}
        reused = self._http is not None
        while True:
            connection = self._connect(answer_bytes)
            try:
                connection.request(method, address, body=body, headers=headers)
                return connection.getresponse()
            except _STALE:
                self.close()
                if not reused:
                    raise
                reused = False  # It was closed while nobody used it: every request may be repeated.

    def _connect(self, answer_bytes: int) -> http.client.HTTPConnection:
        if self._is_given_up:
            raise ConnectionAbortedError("nobody wants the answer any more")
        if self._http is None or self._socket is None:
            plain = socket.create_connection((self._dial, self.endpoint.port), self._timeout)
            self._socket = connection = _PlainSocket(fileno=plain.detach())
            connection.settimeout(self._timeout)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                wrapped = self._context.wrap_socket(connection, server_hostname=self.endpoint.host)
                assert isinstance(wrapped, _EncryptedSocket)
                self._socket = wrapped
            self._http = http.client.HTTPConnection(self.endpoint.host, self.endpoint.port)
            self._http.sock = self._socket
            self._socket.limit(self._timeout)
        self._socket.deadline = time.monotonic() + self._timeout + answer_bytes / _LEAST_BYTES_PER_SECOND
        return self._http

    def _refusal(self, response: http.client.HTTPResponse, address: str) -> PeerUnavailableError:
        data = response.read(_MAX_REFUSAL_BYTES)
        try:
            said = json.loads(data)
            code, message = str(said["error"])[:40], str(said["message"])[:400]
        except (ValueError, TypeError, KeyError, RecursionError):
            code, message = "nonsense", "no reason that can be read"
        return self._error(f"refuses {address} with status {response.status} ({code}): {message!r}", code)

    def _error(self, what: str, code: str) -> PeerUnavailableError:
        next_step = _NEXT.get(code, "look whether its host and the agent there live, or ask another process")
        return PeerUnavailableError(f"the agent at {self.endpoint} {what}. What to do: {next_step}.", code)


def _tls_context(endpoint: Endpoint) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=endpoint.ca_file)
    except OSError as error:
        raise PeerUnavailableError(
            f"the certificates {endpoint.ca_file} by which to verify {endpoint} cannot be read: {error}. "
            "They must lie at this path on every host.",
            "no_certificates",
        ) from error
    context.sslsocket_class = _EncryptedSocket
    return context
