"""What is read from a bucket at a time stays within the limit, counted by a proxy that holds answers back."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from emergency_ckpt.core.shards import Box
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.reader import BoxRequest
from emergency_ckpt.persistent.store import PersistentStore
from tests.persistent.object_store.conftest import BUCKET
from tests.persistent.saving import save
from tests.servers.environment import use_gcs, use_s3
from tests.servers.fake_gcs import running
from tests.servers.proxy import Answer, Proxy, Request

pytestmark = pytest.mark.server

CHUNK, CHUNKS = 16 * 1024, 16
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Turnstile(Proxy):
    """Answers reads of chunks, joined or not, when so many wait at once as is said, or the last ones do."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self._changed = threading.Condition()
        self.expect(1)

    def expect(self, together: int) -> None:
        """Begins to count anew."""
        with self._changed:
            self._together, self._left = together, CHUNKS
            self._waiting: dict[object, int] = {}
            self.bytes_in_flight = self.most_in_flight = 0

    def forward(self, request: Request) -> Answer:
        named = {name.lower(): value for name, value in request.headers.items()}
        found = _RANGE.fullmatch(named.get("range", ""))
        size = int(found[2]) - int(found[1]) + 1 if found else 0
        if request.method != "GET" or size < CHUNK:
            return super().forward(request)
        me = object()
        with self._changed:
            self.bytes_in_flight += size
            self.most_in_flight = max(self.most_in_flight, self.bytes_in_flight)
            self._waiting[me] = size // CHUNK
            self._left -= size // CHUNK
            if sum(self._waiting.values()) >= self._together or self._left == 0:
                self._waiting.clear()
                self._changed.notify_all()
            let_through = self._changed.wait_for(lambda: me not in self._waiting, 60)
        try:
            assert let_through, "fewer reads are made at once than may be"
            return super().forward(request)
        finally:
            with self._changed:
                self.bytes_in_flight -= size


@pytest.fixture(params=["s3", "gcs"])
def turnstile(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Turnstile, str]]:
    if request.param == "s3":
        server: Any = request.getfixturevalue("s3_with_bucket")
        proxy = Turnstile(server.endpoint)
        use_s3(monkeypatch, proxy.endpoint, server.users["owner"])
    else:
        proxy = Turnstile(request.getfixturevalue("fake_gcs").endpoint)
        use_gcs(monkeypatch, proxy.endpoint)
    with running(proxy):
        yield proxy, f"{'s3' if request.param == 's3' else 'gs'}://{BUCKET}/in-flight-{request.param}"


def test_small_boxes_and_pieces_of_a_large_one_stay_within_the_limit(turnstile: tuple[Turnstile, str]) -> None:
    proxy, url = turnstile
    store = PersistentStore(url)
    weights = np.random.default_rng(1).standard_normal((CHUNKS * 8, CHUNK // 32)).astype(np.float32)
    step = save(
        store,
        Attempt(store.mint_generation(0, None), 1, "default"),
        {"params.w": weights},
        options=WriteOptions(max_chunk_bytes=CHUNK),
    )
    for together, boxes in ((4, 16), (4, 1), (CHUNKS, 16)):
        proxy.expect(together)
        reader, out = store.open_step(step), np.empty_like(weights)
        rows = len(weights) // boxes
        reader.read_boxes(
            [
                BoxRequest("params.w", Box((at, 0), (at + rows, out.shape[1])), out[at : at + rows])
                for at in range(0, len(out), rows)
            ],
            together * CHUNK,
        )
        assert out.tobytes() == weights.tobytes()
        # Each chunk has a checksum of four bytes.
        assert proxy.most_in_flight == together * (CHUNK + 4)
