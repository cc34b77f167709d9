"""What a store refuses is an error of its own kind, which says where and what to do, and tells no secret."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tensorstore as ts

from emergency_ckpt.errors import (
    ConfigError,
    PersistentStoreError,
    StoreBucketMissingError,
    StoreCredentialsError,
    StoreCredentialsExpiredError,
    StoreFullError,
    StorePermissionError,
    StoreRegionError,
    StoreThrottledError,
    StoreUnreachableError,
    StoreUnsupportedError,
)
from emergency_ckpt.persistent.arrays import new_context, settle
from emergency_ckpt.persistent.object_store.gcs import GcsStore
from emergency_ckpt.persistent.object_store.operations import ObjectStore
from emergency_ckpt.persistent.object_store.s3 import S3Store
from tests.persistent.object_store.conftest import BUCKET, QUICK
from tests.servers.ceph import free_ports
from tests.servers.environment import forget_aws, use_gcs, use_s3
from tests.servers.fake_gcs import FORBIDDEN_BUCKET, FakeGcs, running
from tests.servers.proxy import Fault, Kind, Proxy, s3_error
from tests.servers.shared_ceph import S3Server

pytestmark = pytest.mark.server

Call = Callable[[ObjectStore], Any]
CALLS: dict[str, Call] = {
    "put": lambda store: store.put("a/key", b"data"),
    "create": lambda store: store.put_if_absent("a/key", b"data"),
    "read": lambda store: store.read("a/key"),
    "head": lambda store: store.head("a/key"),
    "list": lambda store: list(store.list_pages("a/")),
    "delete": lambda store: store.delete("a/key"),
    "delete many": lambda store: store.delete_many(["a/key", "a/other"]),
    "check": lambda store: store.check(),
}


def refused(store: ObjectStore, call: Call, expected: type[PersistentStoreError], *secrets: str) -> str:
    """The message, which must name the place and tell no secret."""
    with pytest.raises(PersistentStoreError) as told:
        call(store)
    assert type(told.value) is expected, told.value
    message = str(told.value)
    assert store.locate() in message
    for secret in secrets:
        assert secret not in message
    return message


def tensorstore_refuses(store: ObjectStore, expected: type[PersistentStoreError], *secrets: str) -> None:
    kvstore = ts.KvStore.open(store.kvstore("a/"), context=new_context()).result(timeout=30)
    calls: list[Callable[[], Any]] = [lambda: kvstore.write("key", b"data")]
    if expected is not StoreBucketMissingError:  # Where there is no bucket, it takes an object for absent.
        calls.append(lambda: kvstore.read("key"))
    for futures in ([call()] for call in calls):
        with pytest.raises(PersistentStoreError) as told:
            settle(futures, "asking", 60)
        assert type(told.value) is expected, told.value
        for secret in secrets:
            assert secret not in str(told.value)


def test_s3_wrong_credentials(s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = s3_with_bucket.users["owner"]
    for wrong in ({**keys, "secret_key": "WRONGSECRET"}, {**keys, "access_key": "WRONGKEY"}):
        use_s3(monkeypatch, s3_with_bucket.endpoint, wrong)
        store = S3Store(BUCKET, QUICK)
        for call in CALLS.values():
            message = refused(store, call, StoreCredentialsError, *wrong.values())
            assert s3_with_bucket.endpoint in message
            assert "aws sts get-caller-identity" in message


def test_s3_a_bucket_that_is_not_there_or_is_anothers(
    s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_s3(monkeypatch, s3_with_bucket.endpoint, s3_with_bucket.users["owner"])
    store = S3Store("never-made", QUICK)
    for call in CALLS.values():
        refused(store, call, StoreBucketMissingError)
    use_s3(monkeypatch, s3_with_bucket.endpoint, s3_with_bucket.users["stranger"])
    store = S3Store(BUCKET, QUICK)
    for call in CALLS.values():
        assert "Check that the bucket is yours" in refused(store, call, StorePermissionError)


def test_s3_tensorstore_is_refused_with_the_same_errors(
    s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = s3_with_bucket.users["owner"]
    use_s3(monkeypatch, s3_with_bucket.endpoint, keys)
    tensorstore_refuses(S3Store("never-made"), StoreBucketMissingError)
    use_s3(monkeypatch, s3_with_bucket.endpoint, s3_with_bucket.users["stranger"])
    tensorstore_refuses(S3Store(BUCKET), StorePermissionError)
    use_s3(monkeypatch, s3_with_bucket.endpoint, {**keys, "secret_key": "WRONGSECRET"})
    tensorstore_refuses(S3Store(BUCKET), StoreCredentialsError, "WRONGSECRET", keys["access_key"])


def test_s3_no_credentials_at_all(s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_aws(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_with_bucket.endpoint)
    store = S3Store(BUCKET, QUICK)
    for call in CALLS.values():
        refused(store, call, StoreCredentialsError)
    with pytest.raises(StoreCredentialsError, match="no credentials for"):
        store.kvstore()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreCredentialsError, match="nobody"):
        S3Store(BUCKET, QUICK).check()


ANSWERS = [
    (s3_error("ExpiredToken", 400, "The provided token has expired."), StoreCredentialsExpiredError),
    (s3_error("RequestTimeTooSkewed", 403), StoreCredentialsError),
    (s3_error("QuotaExceeded", 403), StoreFullError),
    (s3_error("InsufficientStorage", 507), StoreFullError),
    (s3_error("PermanentRedirect", 301, x_amz_bucket_region="eu-west-1"), StoreRegionError),
    (s3_error("AuthorizationHeaderMalformed", 400, x_amz_bucket_region="eu-west-1"), StoreRegionError),
    (s3_error("NotImplemented", 501), StoreUnsupportedError),
    (s3_error("Whatever", 418, "I am a teapot."), PersistentStoreError),
]


@pytest.fixture
def before_s3(s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(s3_with_bucket.endpoint)
    use_s3(monkeypatch, proxy.endpoint, s3_with_bucket.users["owner"])
    with running(proxy):
        yield proxy


def test_s3_answers_that_cannot_be_had_from_a_server_at_will(before_s3: Proxy) -> None:
    store = S3Store(BUCKET, QUICK)
    for answer, expected in ANSWERS:
        answer.times = 1000
        before_s3.fail(answer)
        for call in (CALLS["put"], CALLS["read"], CALLS["head"], CALLS["list"]):
            message = refused(store, call, expected)
            assert expected is not StoreRegionError or "the bucket is in eu-west-1" in message
        if b"Skewed" not in answer.body:  # That one TensorStore repeats for a minute.
            tensorstore_refuses(store, expected)


def test_s3_answers_do_not_bring_secrets_into_messages(before_s3: Proxy) -> None:
    secret = "AWS4-HMAC-SHA256/20260101/us-east-1/s3/aws4_request+SIGNATUREPROVIDED0123456789"
    before_s3.fail(s3_error("SignatureDoesNotMatch", 403, f"The request signature {secret} does not match."))
    refused(S3Store(BUCKET, QUICK), CALLS["list"], StoreCredentialsError, secret)
    answer = s3_error("SignatureDoesNotMatch", 403, f"</Message><StringToSign>{secret}</StringToSign><Message>")
    answer.times = 10
    before_s3.fail(answer)
    tensorstore_refuses(S3Store(BUCKET), StoreCredentialsError, secret)


def test_s3_objects_that_cannot_be_deleted_are_an_error_that_names_one(before_s3: Proxy) -> None:
    body = (
        b'<?xml version="1.0"?><DeleteResult><Error><Key>a/other</Key><Code>AccessDenied</Code>'
        b"<Message>no</Message></Error></DeleteResult>"
    )
    before_s3.fail(Fault(Kind.ANSWERED, 1, "POST", 200, {"Content-Type": "application/xml"}, body))
    assert "a/other" in refused(S3Store(BUCKET, QUICK), CALLS["delete many"], StorePermissionError)
    store = S3Store(BUCKET, QUICK)
    store.put("a/one", b"")
    before_s3.fail(Fault(Kind.ANSWERED, 1, "POST", 501))
    store.delete_many(["a/one", "a/two"])
    assert store.head("a/one") is None


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_an_endpoint_where_nobody_listens(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    use_s3(monkeypatch, endpoint, {"access_key": "KEY", "secret_key": "SECRET"})
    use_gcs(monkeypatch, endpoint)
    store = S3Store(BUCKET, QUICK) if kind == "s3" else GcsStore(BUCKET, QUICK)
    for call in CALLS.values():
        assert endpoint in refused(store, call, StoreUnreachableError, "SECRET")


def test_gcs_refusals(fake_gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy(fake_gcs.endpoint)
    use_gcs(monkeypatch, proxy.endpoint)
    absent, foreign, store = (GcsStore(name, QUICK) for name in ("never-made", FORBIDDEN_BUCKET, BUCKET))
    with running(proxy):
        for call in CALLS.values():
            refused(absent, call, StoreBucketMissingError)
            refused(foreign, call, StorePermissionError)
        for status, expected in (
            (401, StoreCredentialsError),
            (429, StoreThrottledError),
            (507, StoreFullError),
            (418, PersistentStoreError),
        ):
            proxy.fail(Fault(Kind.ANSWERED, 1000, "", status, {"Content-Type": "application/json"}, b"{}"))
            for name, call in CALLS.items():
                # There google.auth gives up before the answer was read, and leaves its connection open.
                if (name, status) != ("read", 401):
                    refused(store, call, expected)


def test_gcs_tensorstore_is_refused_with_the_same_errors(
    fake_gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gcs(monkeypatch, fake_gcs.endpoint)
    tensorstore_refuses(GcsStore(FORBIDDEN_BUCKET), StorePermissionError)
    tensorstore_refuses(GcsStore("never-made"), StoreBucketMissingError)


def test_gcs_servers_that_differ_for_small_files_and_tensors_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_gcs(monkeypatch, "http://127.0.0.1:1")
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:2")
    for call in (*CALLS.values(), lambda store: store.kvstore()):
        with pytest.raises(ConfigError, match="small files and tensors would go to different servers"):
            call(GcsStore(BUCKET))
    monkeypatch.delenv("TENSORSTORE_GCS_HTTP_URL")
    with pytest.raises(ConfigError, match="different servers"):
        GcsStore(BUCKET).check()
    use_gcs(monkeypatch, "localhost:1")
    with pytest.raises(ConfigError, match="expected a URL"):
        GcsStore(BUCKET).check()
