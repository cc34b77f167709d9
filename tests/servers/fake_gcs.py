"""A fake of Google Cloud Storage: its JSON API, as far as Google's client and TensorStore use it, in memory.

It is no emulator of Google's and proves nothing about Google's servers: it does what the documentation says of
generations, preconditions, ranges, listings and errors, so that our calls can be made over HTTP.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import dataclasses
import datetime
import email
import email.policy
import hashlib
import json
import re
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import google_crc32c

FORBIDDEN_BUCKET = "of-another-account"
_PAGE = 1000
_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
_BUCKET = re.compile(r"/storage/v1/b/([^/]+)")
_OBJECTS = re.compile(r"/storage/v1/b/([^/]+)/o")
_COPY = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)")
_UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


@dataclasses.dataclass(frozen=True)
class Object:
    data: bytes
    generation: int
    metadata: dict[str, str]
    content_type: str
    written: str

    @property
    def crc32c(self) -> str:
        return base64.b64encode(google_crc32c.Checksum(self.data).digest()).decode()

    @property
    def md5(self) -> str:
        return base64.b64encode(hashlib.md5(self.data).digest()).decode()


@dataclasses.dataclass
class Upload:
    """A resumable upload that is not done: its bytes so far, and what was asked for."""

    bucket: str
    name: str
    resource: dict[str, Any]
    conditions: dict[str, str]
    data: bytes = b""


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, reason: str, message: str):
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message


class Buckets:
    """What is stored. Thread-safe."""

    def __init__(self, *names: str):
        self._lock = threading.Lock()
        self._buckets: dict[str, dict[str, Object]] = {name: {} for name in names}
        self._newest = time.time_ns() // 1000
        self.settings: dict[str, Any] = {}

    def objects(self, bucket: str) -> dict[str, Object]:
        if bucket == FORBIDDEN_BUCKET:
            message = f"anonymous caller does not have storage.objects access to {bucket}."
            raise Refusal(403, "forbidden", message)
        if bucket not in self._buckets:
            raise Refusal(404, "notFound", "The specified bucket does not exist.")
        return self._buckets[bucket]

    def get(self, bucket: str, name: str, conditions: dict[str, str]) -> Object:
        with self._lock:
            found = self.objects(bucket).get(name)
            if found is None:
                raise Refusal(404, "notFound", f"No such object: {bucket}/{name}")
            _check(found, conditions)
            return found

    def put(
        self, bucket: str, name: str, data: bytes, resource: dict[str, Any], conditions: dict[str, str]
    ) -> Object:
        with self._lock:
            objects = self.objects(bucket)
            _check(objects.get(name), conditions)
            self._newest += 1
            content_type = resource.get("contentType", "application/octet-stream")
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            objects[name] = Object(data, self._newest, resource.get("metadata") or {}, content_type, now)
            return objects[name]

    def delete(self, bucket: str, name: str, conditions: dict[str, str]) -> None:
        self.get(bucket, name, conditions)
        with self._lock:
            self.objects(bucket).pop(name, None)

    def list(self, bucket: str, asked: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
        most = min(int(asked.get("maxResults", _PAGE)), _PAGE)
        with self._lock:
            objects = dict(self.objects(bucket))
        # In the order of the bytes, which is not that of Python's strings.
        names = sorted((name for name in objects if name.startswith(prefix)), key=str.encode)
        begin = asked.get("startOffset", "")
        names = names[bisect.bisect_left(names, begin.encode(), key=str.encode) :]
        if end := asked.get("endOffset", ""):
            names = names[: bisect.bisect_left(names, end.encode(), key=str.encode)]
        if token := asked.get("pageToken", ""):
            last = base64.urlsafe_b64decode(token)
            names = [name for name in names if name.encode() > last]
        items: list[dict[str, Any]] = []
        prefixes: dict[str, None] = {}
        previous = ""
        for name in names:
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            told = name[: cut + len(delimiter)] if cut >= 0 else None
            if told in prefixes:
                continue
            if len(items) + len(prefixes) == most:
                return {"items": items, "prefixes": list(prefixes), "nextPageToken": token_of(previous)}
            if told is None:
                items.append(described(bucket, name, objects[name]))
            else:
                prefixes[told] = None
            # Everything below a prefix that was told is passed over.
            previous = name if told is None else told + "\U0010ffff"
        return {"kind": "storage#objects", "items": items, "prefixes": list(prefixes)}


def token_of(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def described(bucket: str, name: str, found: Object) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{found.generation}",
        "name": name,
        "bucket": bucket,
        "generation": str(found.generation),
        "metageneration": "1",
        "size": str(len(found.data)),
        "contentType": found.content_type,
        "metadata": found.metadata,
        "crc32c": found.crc32c,
        "md5Hash": found.md5,
        "etag": base64.b64encode(str(found.generation).encode()).decode(),
        "timeCreated": found.written,
        "updated": found.written,
        "storageClass": "STANDARD",
    }


def _check(found: Object | None, conditions: dict[str, str]) -> None:
    """Raises what the conditions of a request make of it; generation 0 stands for an object that is absent."""
    generation = found.generation if found else 0
    metageneration = 1 if found else 0
    for name, current in (("Generation", generation), ("Metageneration", metageneration)):
        match, no_match = conditions.get(f"if{name}Match"), conditions.get(f"if{name}NotMatch")
        if match is not None and int(match) != current:
            raise Refusal(
                412, "conditionNotMet", "At least one of the pre-conditions you specified did not hold."
            )
        if no_match is not None and int(no_match) == current:
            raise Refusal(304, "notModified", "")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeGcs

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        self._answer(self._resume)

    def do_DELETE(self) -> None:
        self._answer(self._delete)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, act: Any) -> None:
        path, _, query = self.path.partition("?")
        self.asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        body = self._body()
        try:
            status, headers, data = act(path, body)
        except Refusal as refusal:
            error = {"message": refusal.message, "reason": refusal.reason, "domain": "global"}
            content = {"error": {"code": refusal.status, "message": refusal.message, "errors": [error]}}
            # As of the real server, an error of a download is plain text.
            plain = self.asked.get("alt") == "media"
            data = refusal.message.encode() if plain else json.dumps(content).encode()
            headers = {"Content-Type": "text/html" if plain else "application/json"}
            status = refusal.status
        self.send_response(status)
        if status != 304:
            headers["Content-Length"] = str(len(data))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if status != 304:
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _get(self, path: str, _: bytes) -> tuple[int, dict[str, str], bytes]:
        if match := _OBJECT.fullmatch(path):
            bucket, name = map(urllib.parse.unquote, match.groups())
            found = self.server.buckets.get(bucket, name, self.asked)
            if self.asked.get("alt") != "media":
                return _json(described(bucket, name, found))
            return self._media(found)
        if match := _BUCKET.fullmatch(path):
            name = urllib.parse.unquote(match[1])
            self.server.buckets.objects(name)
            return _json(
                {
                    "kind": "storage#bucket",
                    "id": name,
                    "name": name,
                    "location": "US",
                    **self.server.buckets.settings,
                }
            )
        if match := _OBJECTS.fullmatch(path):
            return _json(self.server.buckets.list(urllib.parse.unquote(match[1]), self.asked))
        raise Refusal(404, "notFound", f"the fake has no {path}")

    def _media(self, found: Object) -> tuple[int, dict[str, str], bytes]:
        headers = {
            "Content-Type": found.content_type,
            "X-Goog-Generation": str(found.generation),
            "X-Goog-Metageneration": "1",
            "X-Goog-Hash": f"crc32c={found.crc32c},md5={found.md5}",
            "X-Goog-Stored-Content-Length": str(len(found.data)),
            "X-Goog-Stored-Content-Encoding": "identity",
            "ETag": f'"{found.generation}"',
            "Accept-Ranges": "bytes",
        }
        size = len(found.data)
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if match is None or match.groups() == ("", ""):
            return 200, headers, found.data
        if match[1]:
            start, stop = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
        else:
            start, stop = max(size - int(match[2]), 0), size
        if start >= size:
            message = f"The requested range cannot be satisfied: {start} of {size}."
            raise Refusal(416, "requestedRangeNotSatisfiable", message)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return 206, headers, found.data[start:stop]

    def _post(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if match := _COPY.fullmatch(path):
            return self._copy(*map(urllib.parse.unquote, match.groups()))
        match = _UPLOAD.fullmatch(path)
        if match is None:
            raise Refusal(404, "notFound", f"the fake has no {path}")
        if "upload_id" in self.asked:
            return self._resume(path, body)
        bucket = urllib.parse.unquote(match[1])
        kind = self.asked.get("uploadType")
        if kind == "resumable":
            resource = json.loads(body or b"{}")
            name = self.asked.get("name") or resource["name"]
            self.server.buckets.objects(bucket)
            identity = uuid.uuid4().hex
            self.server.uploads[identity] = Upload(bucket, name, resource, dict(self.asked))
            host = self.headers.get("Host")
            location = (
                f"http://{host}/upload/storage/v1/b/{match[1]}/o?uploadType=resumable&upload_id={identity}"
            )
            return 200, {"Location": location}, b""
        if kind == "multipart":
            resource, data = self._parts(body)
        else:
            resource, data = {"contentType": self.headers.get("Content-Type", "")}, body
        name = self.asked.get("name") or resource["name"]
        stored = self.server.buckets.put(bucket, name, data, resource, self.asked)
        return _json(described(bucket, name, stored))

    def _copy(self, bucket: str, name: str, to: str, as_name: str) -> tuple[int, dict[str, str], bytes]:
        found = self.server.buckets.get(bucket, name, {})
        resource = {"contentType": found.content_type, "metadata": found.metadata}
        stored = self.server.buckets.put(to, as_name, found.data, resource, self.asked)
        size = str(len(found.data))
        told = {
            "kind": "storage#rewriteResponse",
            "done": True,
            "objectSize": size,
            "totalBytesRewritten": size,
        }
        return _json({**told, "resource": described(to, as_name, stored)})

    def _parts(self, body: bytes) -> tuple[dict[str, Any], bytes]:
        """The resource and the bytes of a multipart/related body."""
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        message = email.message_from_bytes(head, policy=email.policy.HTTP)
        boundary = b"--" + message.get_boundary("").encode()
        _, first, rest = body.split(boundary, 2)
        # Some clients end the lines of the heads with a line feed alone.
        end = b"\r\n" if first.startswith(b"\r\n") else b"\n"
        content = rest.partition(2 * end)[2]
        data = content[: content.rindex(end + boundary + b"--")]
        return json.loads(first.partition(2 * end)[2]), data

    def _resume(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        identity = self.asked.get("upload_id", "")
        upload = self.server.uploads.get(identity)
        match = _CONTENT_RANGE.fullmatch(self.headers.get("Content-Range", ""))
        if not _UPLOAD.fullmatch(path) or upload is None or match is None:
            raise Refusal(410, "gone", "no such upload")
        if match[1] is not None:
            if int(match[1]) != len(upload.data):
                raise Refusal(400, "invalid", "bytes out of order")
            upload.data += body
        if match[3] == "*" or len(upload.data) < int(match[3]):
            headers = {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {}
            return 308, headers, b""
        stored = self.server.buckets.put(
            upload.bucket, upload.name, upload.data, upload.resource, upload.conditions
        )
        del self.server.uploads[identity]
        return _json(described(upload.bucket, upload.name, stored))

    def _delete(self, path: str, _: bytes) -> tuple[int, dict[str, str], bytes]:
        match = _OBJECT.fullmatch(path)
        if match is None:
            raise Refusal(404, "notFound", f"the fake has no {path}")
        bucket, name = map(urllib.parse.unquote, match.groups())
        self.server.buckets.delete(bucket, name, self.asked)
        return 204, {}, b""


def _json(content: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(content).encode()


class FakeGcs(ThreadingHTTPServer):
    """The server, on a free port of this machine."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.buckets = Buckets(*buckets)
        self.uploads: dict[str, Upload] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are none of its business."""


@contextlib.contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    """Serves in a thread until the end of the block."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="server of a test")
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)
