"""What fakes of metadata servers share: an HTTP server on loopback that can be made to misbehave on demand."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass
class Answer:
    """An answer; with `silent` none is given until the server ends."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    silent: bool = False


Misbehaviour = Callable[[str, str], Answer | None]


class Fake:
    """Answers by `answer`, unless `misbehave(method, path)` has another answer. `asked` has all requests."""

    def __init__(self) -> None:
        self.misbehave: Misbehaviour = lambda method, path: None
        self.asked: list[tuple[str, str]] = []
        self.changed = threading.Condition()
        self.ended = False
        self.url = ""

    def answer(self, method: str, path: str, headers: Any) -> Answer:
        raise NotImplementedError

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until what was asked meets a condition."""
        with self.changed:
            assert self.changed.wait_for(condition, 20), self.asked


@contextlib.contextmanager
def served(fake: Fake) -> Iterator[None]:
    """Serves a fake on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            with fake.changed:
                fake.asked.append((self.command, self.path))
                fake.changed.notify_all()
            answer = fake.misbehave(self.command, self.path)
            answer = answer or fake.answer(self.command, self.path, self.headers)
            if answer.silent:
                with fake.changed:
                    fake.changed.wait_for(lambda: fake.ended, 60)
                return
            with contextlib.suppress(ConnectionError):
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)

        do_GET = do_PUT = do

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield
    finally:
        with fake.changed:
            fake.ended = True
            fake.changed.notify_all()
        server.shutdown()
        thread.join()
        server.server_close()
