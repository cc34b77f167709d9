"""A fake of Google's metadata server, as its documentation describes it: values, ETags, waiting for changes."""

from __future__ import annotations

import contextlib
import urllib.parse
from collections.abc import Iterator
from typing import Any

from tests.servers.metadata import Answer, Fake, served

PREEMPTED = "/computeMetadata/v1/instance/preempted"
MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"
FLAVOR = {"Metadata-Flavor": "Google"}


class FakeMetadata(Fake):
    """`set` changes a value, which whoever waits hears of."""

    def __init__(self) -> None:
        super().__init__()
        self._values = {PREEMPTED: "FALSE", MAINTENANCE: "NONE"}
        self._versions = dict.fromkeys(self._values, 1)
        self.waiting = 0

    def set(self, page: str, value: str) -> None:
        with self.changed:
            self._values[page] = value
            self._versions[page] += 1
            self.changed.notify_all()

    def answer(self, method: str, path: str, headers: Any) -> Answer:
        parts = urllib.parse.urlsplit(path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        if headers.get("Metadata-Flavor") != "Google" or method != "GET":
            return Answer(403, b"Missing Metadata-Flavor:Google header.")
        if parts.path not in self._values:
            return Answer(404, headers=dict(FLAVOR))
        with self.changed:
            if query.get("wait_for_change") == "true":
                self.waiting += 1
                self.changed.notify_all()
                self.changed.wait_for(
                    lambda: self.ended or query.get("last_etag") != self._etag(parts.path),
                    float(query.get("timeout_sec", 30)),
                )
                self.waiting -= 1
            return Answer(200, self._values[parts.path].encode(), {**FLAVOR, "ETag": self._etag(parts.path)})

    def _etag(self, page: str) -> str:
        return f"{hash(page) & 0xFFFF:x}/{self._versions[page]}+&="


@contextlib.contextmanager
def fake_gce_metadata() -> Iterator[FakeMetadata]:
    fake = FakeMetadata()
    with served(fake):
        yield fake
