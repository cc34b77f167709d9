"""A proxy before an object store: it fails as it is told to, or weakens what the store promises."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import http.client
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import botocore.auth
import botocore.awsrequest
import botocore.credentials

_OF_A_CONNECTION = ("connection", "transfer-encoding", "expect", "keep-alive")
_CONDITIONS = ("if-none-match", "if-match")
_UPSTREAM_SECONDS = 60.0


class Kind(enum.Enum):
    """What becomes of a request."""

    ANSWERED = "the proxy answers, the server hears nothing"
    STALLED = "nobody answers, until the proxy ends"
    RESET = "the connection is reset, the server hears nothing"
    ANSWER_LOST = "the server does it, then the connection is reset"
    ANSWER_CUT = "the server does it, half of its answer arrives"


@dataclasses.dataclass
class Fault:
    """What happens to the next `times` requests with this method."""

    kind: Kind
    times: int = 1
    method: str = ""
    status: int = 503
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""


@dataclasses.dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def s3_error(code: str, status: int, message: str = "", **headers: str) -> Fault:
    """An answer as S3 gives it."""
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Fault(Kind.ANSWERED, 1, "", status, {"Content-Type": "application/xml", **named}, body)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _pass_on(self) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _OF_A_CONNECTION}
        request = Request(self.command, self.path, headers, self._body())
        self.server.requests.append(request)
        fault = self.server.next_fault(request)
        if fault is None:
            self._send(self.server.forward(request))
        elif fault.kind is Kind.ANSWERED:
            self._send(Answer(fault.status, fault.headers, fault.body))
        elif fault.kind is Kind.STALLED:
            self.server.ended.wait()
            self.close_connection = True
        elif fault.kind is Kind.RESET:
            self._reset()
        elif fault.kind is Kind.ANSWER_LOST:
            self.server.forward(request)
            self._reset()
        else:
            answer = self.server.forward(request)
            self._send(answer, answer.body[: len(answer.body) // 2])
            self._reset()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer, body: bytes | None = None) -> None:
        self.send_response(answer.status)
        given = {name.lower() for name in answer.headers}
        for name, value in answer.headers.items():
            if name.lower() not in _OF_A_CONNECTION:
                self.send_header(name, value)
        if "content-length" not in given and answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body if body is None else body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the server at `upstream`, except for those that `faults` says something of.

    Serve it with `running` of `fake_gcs`.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream.removeprefix("http://")
        self.requests: list[Request] = []
        self.ended = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, *faults: Fault) -> None:
        """From now on, these happen one after the other, and nothing else does."""
        with self._lock:
            self._faults = [dataclasses.replace(fault) for fault in faults]
            self.requests.clear()

    def next_fault(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method in ("", request.method):
                    fault.times -= 1
                    return fault
        return None

    def forward(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection(self.upstream, timeout=_UPSTREAM_SECONDS)
        with contextlib.closing(connection):
            connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                connection.putheader(name, value)
            connection.endheaders(request.body or None)
            found = connection.getresponse()
            return Answer(found.status, dict(found.getheaders()), found.read())

    def shutdown(self) -> None:
        self.ended.set()
        super().shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are none of its business."""


class WeakS3(Proxy):
    """An S3 server that has no conditional puts worth the name.

    `weakness` gets every put with a condition. Requests are signed anew, since signatures cover the conditions.
    """

    def __init__(self, upstream: str, keys: Mapping[str, str], weakness: Callable[[WeakS3, Request], Answer]):
        super().__init__(upstream)
        self._keys = botocore.credentials.Credentials(keys["access_key"], keys["secret_key"])
        self._weakness = weakness
        self._both_looked = threading.Barrier(2)

    def forward(self, request: Request) -> Answer:
        if request.method == "PUT" and any(name.lower() in _CONDITIONS for name in request.headers):
            return self._weakness(self, request)
        return super().forward(request)

    def unconditional(self, request: Request, method: str = "PUT") -> Answer:
        kept = {n: v for n, v in request.headers.items() if n.lower() in ("host", "content-length")}
        kept |= {n: v for n, v in request.headers.items() if n.lower().startswith("x-amz-meta-")}
        body = request.body if method == "PUT" else b""
        kept["Content-Length"] = str(len(body))
        host = next(value for name, value in kept.items() if name.lower() == "host")
        signed = botocore.awsrequest.AWSRequest(method, f"http://{host}{request.path}", kept, body)
        botocore.auth.S3SigV4Auth(self._keys, "s3", "us-east-1").add_auth(signed)
        return super().forward(Request(method, request.path, dict(signed.headers.items()), body))

    def ignores(self, request: Request) -> Answer:
        return self.unconditional(request)

    def refuses(self, _: Request) -> Answer:
        fault = s3_error("NotImplemented", 501, "A header you provided implies functionality that is not here.")
        return Answer(fault.status, fault.headers, fault.body)

    def looks_first(self, request: Request) -> Answer:
        """As a server without a lock: two that look at once both find nothing."""
        if self.unconditional(request, "HEAD").status == 200:
            return Answer(412, {}, s3_error("PreconditionFailed", 412).body)
        with contextlib.suppress(threading.BrokenBarrierError):
            self._both_looked.wait(0.2)
        self._both_looked.reset()
        return self.unconditional(request)

    def only_if_absent(self, request: Request) -> Answer:
        """As an older server of Ceph or MinIO: it knows one of the conditions."""
        if any(name.lower() == "if-match" for name in request.headers):
            return self.unconditional(request)
        return Proxy.forward(self, request)
