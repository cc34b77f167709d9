"""A relay that lets bytes through at a given rate: the network card of a host that this machine does not have.

`python -m benchmarks.relay HOST:PORT BYTES_PER_SECOND` prints its port and serves until standard input ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time

_PIECE_BYTES = 256 * 1024


class Rate:
    """Bytes per second, for all connections together."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def wait(self, nbytes: int) -> None:
        """Returns once these bytes have gone through."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + nbytes / self._rate
            pause = self._free_at - now
        time.sleep(pause)


def serve(upstream: tuple[str, int], bytes_per_second: float) -> None:
    """What clients send is let through at the rate; answers are not held up."""
    rate = Rate(bytes_per_second)
    listening = socket.create_server(("127.0.0.1", 0))

    def pass_on(source: socket.socket, target: socket.socket, limited: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE_BYTES):
                if limited:
                    rate.wait(len(piece))
                target.sendall(piece)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            client, _ = listening.accept()
            server = socket.create_connection(upstream)
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, target, limited in ((client, server, True), (server, client, False)):
                threading.Thread(target=pass_on, args=(source, target, limited), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(listening.getsockname()[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    name, _, port = sys.argv[1].rpartition(":")
    serve((name, int(port)), float(sys.argv[2]))
