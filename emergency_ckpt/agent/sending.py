"""Sends pieces of a slot file as the body of an answer, straight from the page cache.

Without TLS a thread of a bounded pool writes to the connection's socket with `sendfile`, which holds no GIL and
copies nothing into this process. A client that does not read is cut; a slot that is taken for another step
meanwhile ends the answer short, so that the client notices.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import io
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from aiohttp import web

_CHECK_EVERY_BYTES = 16 * 1024 * 1024
_CHUNK_BYTES = 256 * 1024
_LEAST_BYTES_PER_SECOND = 1024 * 1024

Ending = Literal["sent", "slot_gone", "client_gone", "client_slow"]


@dataclasses.dataclass(frozen=True, slots=True)
class Body:
    """What to send: `(offset, length)` pieces of a file while `is_current` holds. The sender closes it.

    `shards`: how many shards, or ranges of them, the pieces are.
    """

    file: io.FileIO
    pieces: Sequence[tuple[int, int]]
    is_current: Callable[[], bool]
    shards: int

    @property
    def nbytes(self) -> int:
        return sum(length for _, length in self.pieces)


class Sender:
    """Sends bodies, at most `threads` at a time: the caller sees to that.

    `stall_seconds` is how long a client may read nothing at all; over the whole answer it must read at least
    1 MiB per second beyond that.
    """

    def __init__(self, threads: int, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "emergency_ckpt send")
        self._guard = threading.Lock()
        self._open: set[socket.socket] = set()

    async def send(self, request: web.Request, response: web.StreamResponse, body: Body) -> Ending:
        """Sends headers and body; closes the connection where the answer ends short."""
        response.content_length = body.nbytes
        try:
            await response.prepare(request)
            transport = request.transport
            if transport is None or transport.is_closing():
                raise ConnectionResetError("the client closed the connection")
            encrypted = transport.get_extra_info("sslcontext") is not None
            in_chunks = encrypted or transport.get_write_buffer_size() > 0
            # The thread's own descriptor: whatever becomes of the connection, it is not reused under it.
            own = None if in_chunks else transport.get_extra_info("socket").dup()
        except BaseException as error:
            body.file.close()
            if isinstance(error, OSError):
                _abort(request)
                return "client_gone"
            raise
        if own is None:
            with body.file:
                ending = await self._send_chunks(response, body)
        else:
            loop = asyncio.get_running_loop()
            ending = await loop.run_in_executor(self._pool, self._send_file, own, body)
        if ending != "sent":
            _abort(request)
        return ending

    def cut_all(self) -> None:
        """Ends what is being sent."""
        with self._guard:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends what is being sent, and the threads."""
        self.cut_all()
        self._pool.shutdown(wait=True)

    def _send_file(self, connection: socket.socket, body: Body) -> Ending:
        """In a thread of the pool."""
        with connection, body.file:
            with self._guard:
                self._open.add(connection)
            try:
                # Small shards go out in full packets.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
                ending = self._send_pieces(connection.fileno(), body)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
                return ending
            except OSError:
                return "client_gone"
            finally:
                with self._guard:
                    self._open.discard(connection)

    def _send_pieces(self, connection: int, body: Body) -> Ending:
        writable = select.poll()
        writable.register(connection, select.POLLOUT)
        deadline = self._deadline(body)
        file = body.file.fileno()
        for offset, length, check in _checked_pieces(body.pieces):
            # Asked before the last piece, not after it: what is complete cannot be taken back.
            if check and not body.is_current():
                return "slot_gone"
            sent = 0
            while sent < length:
                try:
                    count = os.sendfile(connection, file, offset + sent, length - sent)
                except BlockingIOError:
                    left = min(self._stall_seconds, deadline - time.monotonic())
                    if left <= 0 or not writable.poll(left * 1000):
                        return "client_slow"
                    continue
                if count == 0:  # The file was cut.
                    return "slot_gone"
                sent += count
        return "sent"

    async def _send_chunks(self, response: web.StreamResponse, body: Body) -> Ending:
        loop = asyncio.get_running_loop()
        deadline = self._deadline(body)
        try:
            file = body.file.fileno()
            for offset, length, check in _checked_pieces(body.pieces):
                if check and not body.is_current():
                    return "slot_gone"
                for at in range(offset, offset + length, _CHUNK_BYTES):
                    count = min(_CHUNK_BYTES, offset + length - at)
                    chunk = await loop.run_in_executor(self._pool, os.pread, file, count, at)
                    if len(chunk) != count:
                        return "slot_gone"
                    async with asyncio.timeout(min(self._stall_seconds, deadline - time.monotonic())):
                        await response.write(chunk)
        except TimeoutError:
            return "client_slow"
        except OSError:
            return "client_gone"
        return "sent"

    def _deadline(self, body: Body) -> float:
        return time.monotonic() + self._stall_seconds + body.nbytes / _LEAST_BYTES_PER_SECOND


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _checked_pieces(pieces: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, bool]]:
    """`(offset, length, whether to look before it if the slot is current)`: at the end and every 16 MiB."""
    since_check = 0
    for number, (offset, length) in enumerate(pieces):
        for at in range(offset, offset + length, _CHECK_EVERY_BYTES):
            count = min(_CHECK_EVERY_BYTES, offset + length - at)
            is_last = number == len(pieces) - 1 and at + count == offset + length
            since_check += count
            check = is_last or since_check >= _CHECK_EVERY_BYTES
            if check:
                since_check = 0
            yield at, count, check
