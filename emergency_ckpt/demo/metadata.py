"""A stand-in for Amazon's metadata service on this machine, which says when the demo wants that it ends.

It speaks version 2 of the protocol, as far as spot interruptions go: a token first, then
`instance-life-cycle` and `spot/instance-action`, which is missing until the notice.
"""

from __future__ import annotations

import datetime
import http.server
import json
import secrets
import threading
from types import TracebackType

_TOKEN_SECONDS = "x-aws-ec2-metadata-token-ttl-seconds"
_ACTION = "/latest/meta-data/spot/instance-action"


class SpotMetadata:
    """Serves on loopback between `__enter__` and `__exit__`."""

    def __init__(self) -> None:
        self._token = secrets.token_urlsafe(32)
        self._action: bytes | None = None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                wanted = self.headers.get(_TOKEN_SECONDS)
                if self.path == "/latest/api/token" and wanted is not None:
                    self._say(200, outer._token.encode(), {_TOKEN_SECONDS: wanted})
                else:
                    self._say(400, b"")

            def do_GET(self) -> None:
                found = outer._page(self.path)
                if self.headers.get("x-aws-ec2-metadata-token") != outer._token:
                    self._say(401, b"")
                else:
                    self._say(404 if found is None else 200, found or b"")

            def log_message(self, format: str, *args: object) -> None:
                pass  # The demo shows what matters.

            def _say(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="spot metadata", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def announce(self, seconds: float) -> None:
        """From now on it says that the machine is terminated in so many seconds."""
        when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
        said = {"action": "terminate", "time": when.strftime("%Y-%m-%dT%H:%M:%SZ")}
        self._action = json.dumps(said).encode()

    def _page(self, path: str) -> bytes | None:
        if path == "/latest/meta-data/instance-life-cycle":
            return b"spot"
        return self._action if path == _ACTION else None

    def __enter__(self) -> SpotMetadata:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
