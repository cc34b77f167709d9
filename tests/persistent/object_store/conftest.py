"""The three kinds of store that the tests of this room run on: Ceph (S3), a fake GCS, a file system."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from emergency_ckpt.persistent.object_store.file_system import FileSystemStore
from emergency_ckpt.persistent.object_store.opening import open_bucket
from emergency_ckpt.persistent.object_store.operations import Limits, ObjectStore
from emergency_ckpt.persistent.object_store.urls import parse_url
from tests.servers.environment import make_bucket, use_gcs, use_s3
from tests.servers.fake_gcs import FakeGcs, running
from tests.servers.proxy import Proxy
from tests.servers.shared_ceph import S3Server

BUCKET = "conformance"
# A test that has one of these waits for nothing but what it is about.
QUICK = Limits(attempt_seconds=1.0, total_seconds=30.0, attempts=4, pause_seconds=(0.01, 0.05))


@dataclasses.dataclass(frozen=True)
class Place:
    """A store and a prefix in it that no other test uses."""

    store: ObjectStore
    url: str
    prefix: str


@dataclasses.dataclass(frozen=True)
class Failing:
    """A bucket behind a proxy."""

    store: ObjectStore
    proxy: Proxy
    kind: str


@pytest.fixture(scope="session")
def fake_gcs() -> Iterator[FakeGcs]:
    server = FakeGcs(BUCKET)
    with running(server):
        yield server


@pytest.fixture(scope="session")
def s3_with_bucket(s3_server: S3Server) -> S3Server:
    make_bucket(s3_server.endpoint, s3_server.users["owner"], BUCKET)
    return s3_server


@pytest.fixture(params=["file system", "s3", "gcs"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    prefix = f"{uuid.uuid4().hex}/"
    if request.param == "file system":
        return Place(FileSystemStore(tmp_path), str(tmp_path), prefix)
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_with_bucket")
        use_s3(monkeypatch, server.endpoint, server.users["owner"])
    else:
        use_gcs(monkeypatch, request.getfixturevalue("fake_gcs").endpoint)
    url = f"{'s3' if request.param == 's3' else 'gs'}://{BUCKET}"
    return Place(open_bucket(parse_url(url)), url, prefix)


@pytest.fixture(params=["s3", "gcs"])
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_with_bucket")
        proxy = Proxy(server.endpoint)
        use_s3(monkeypatch, proxy.endpoint, server.users["owner"])
    else:
        proxy = Proxy(request.getfixturevalue("fake_gcs").endpoint)
        use_gcs(monkeypatch, proxy.endpoint)
    url = parse_url(f"{'s3' if request.param == 's3' else 'gs'}://{BUCKET}")
    with running(proxy):
        yield Failing(open_bucket(url, QUICK), proxy, request.param)
