"""What is wrong with a persistent directory is told before a job relies on it, and by what to mend."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3.session
import pytest

from emergency_ckpt.errors import (
    PersistentStoreError,
    StoreBucketMissingError,
    StoreCredentialsError,
    StoreCredentialsExpiredError,
    StoreEncryptionError,
    StoreFullError,
    StorePermissionError,
    StoreRegionError,
    StoreUnreachableError,
)
from emergency_ckpt.persistent.conditions import RECORD
from emergency_ckpt.persistent.object_store.opening import open_files
from emergency_ckpt.runtime.trying import try_directory
from emergency_ckpt.telemetry.log import CheckpointLogger, LogContext
from emergency_ckpt.telemetry.metrics import Metrics
from tests.local.namespaces import mount_tmpfs, run_in_namespace
from tests.persistent.object_store.conftest import BUCKET
from tests.servers.environment import REGION, forget_aws, make_bucket, use_gcs, use_s3
from tests.servers.fake_gcs import FORBIDDEN_BUCKET, FakeGcs, running
from tests.servers.proxy import Fault, Kind, Proxy, s3_error
from tests.servers.shared_ceph import S3Server

pytestmark = pytest.mark.server

# For which a store that does not answer is waited for; only one that never does makes use of it.
PATIENCE = 60.0


def attempt(location: str, patience: float = PATIENCE) -> None:
    try_directory(location, patience, CheckpointLogger(LogContext(None, None, 0, 0), Metrics()))


def refused(
    location: str, expected: type[PersistentStoreError], *words: str, patience: float = PATIENCE
) -> None:
    with pytest.raises(PersistentStoreError) as told:
        attempt(location, patience)
    assert type(told.value) is expected, told.value
    for word in words:
        assert word in str(told.value)


class Policies:
    """A bucket of the owner, whose policy says what the stranger may do."""

    def __init__(self, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bucket = f"policies-{uuid.uuid4().hex}"
        keys = server.users["owner"]
        make_bucket(server.endpoint, keys, self.bucket)
        session = boto3.session.Session(keys["access_key"], keys["secret_key"], region_name=REGION)
        self.client = session.client("s3", endpoint_url=server.endpoint)
        self._server, self._monkeypatch = server, monkeypatch

    def act_as(self, user: str) -> None:
        use_s3(self._monkeypatch, self._server.endpoint, self._server.users[user])

    def allow(self, *actions: str, below: str = "", **condition: Any) -> dict[str, Any]:
        bucket = f"arn:aws:s3:::{self.bucket}"
        return {
            "Effect": "Allow",
            "Principal": {"AWS": ["arn:aws:iam:::user/stranger"]},
            "Action": list(actions),
            "Resource": [f"{bucket}/{below}*"] if below else [bucket, f"{bucket}/*"],
            **({"Condition": condition} if condition else {}),
        }

    def set(self, *statements: dict[str, Any]) -> None:
        policy = {"Version": "2012-10-17", "Statement": list(statements)}
        self.client.put_bucket_policy(Bucket=self.bucket, Policy=json.dumps(policy))

    def keys(self) -> list[str]:
        return [found["Key"] for found in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", ())]


@pytest.fixture
def policies(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Policies]:
    found = Policies(s3_server, monkeypatch)
    yield found
    found.client.close()


def test_s3_names_the_right_that_is_missing_and_says_when_none_is_there(policies: Policies) -> None:
    policies.act_as("stranger")
    url = f"s3://{policies.bucket}/runs/one"
    refused(url, StorePermissionError, "may neither list nor write", "the bucket is another account's")
    policies.set(policies.allow("s3:ListBucket", "s3:GetObject"))
    refused(url, StorePermissionError, "may list there, and may not write: give them s3:PutObject")
    policies.set(policies.allow("s3:PutObject", "s3:GetObject", "s3:DeleteObject"))
    refused(url, StorePermissionError, "may write there, and may not list: give them s3:ListBucket")
    assert policies.keys() == []
    policies.set(policies.allow("s3:ListBucket", "s3:GetObject", "s3:PutObject"))
    refused(url, StorePermissionError, "may not delete: give them s3:DeleteObject (on the objects below)")


def test_s3_rights_below_the_directory_are_enough_if_all_may_be_listed(policies: Policies) -> None:
    below = policies.allow("s3:GetObject", "s3:PutObject", "s3:DeleteObject", below="runs/")
    policies.act_as("stranger")
    url = f"s3://{policies.bucket}/runs/one"
    policies.set(below, policies.allow("s3:ListBucket", StringLike={"s3:prefix": ["runs/*"]}))
    refused(url, StorePermissionError, "s3:ListBucket on the bucket without a condition")
    policies.set(below, policies.allow("s3:ListBucket"))
    attempt(url)
    assert policies.keys() == [f"runs/one/{RECORD}"]


def test_s3_a_bucket_that_demands_encryption_by_a_header_is_told_from_one_without_rights(
    policies: Policies,
) -> None:
    bucket = f"arn:aws:s3:::{policies.bucket}"
    without = {"Null": {"s3:x-amz-server-side-encryption": "true"}}
    deny = {"Effect": "Deny", "Principal": "*", "Action": ["s3:PutObject"], "Resource": [bucket, f"{bucket}/*"]}
    policies.set({**deny, "Condition": without})
    policies.act_as("owner")
    url = f"s3://{policies.bucket}/runs"
    refused(url, StoreEncryptionError, "the header x-amz-server-side-encryption: AES256", "default encryption")
    policies.set(deny)
    refused(url, StorePermissionError, "s3:PutObject")


ANSWERS = [
    (s3_error("ExpiredToken", 400), StoreCredentialsExpiredError, "Renew the credentials"),
    (s3_error("RequestTimeTooSkewed", 403), StoreCredentialsError, "the clock of this host differs"),
    (s3_error("PermanentRedirect", 301, x_amz_bucket_region="eu-west-1"), StoreRegionError, "is in eu-west-1"),
    (s3_error("KMS.DisabledException", 400), StoreEncryptionError, "kms:GenerateDataKey"),
    (
        s3_error("AccessDenied", 403, "not authorized to perform: kms:GenerateDataKey on the key"),
        StoreEncryptionError,
        "let these credentials use the key",
    ),
    (s3_error("QuotaExceeded", 403), StoreFullError, "raise the quota"),
]


def test_s3_wrong_settings_and_what_only_aws_answers(
    s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = s3_with_bucket.users["owner"]
    proxy = Proxy(s3_with_bucket.endpoint)
    use_s3(monkeypatch, proxy.endpoint, keys)
    with running(proxy):
        refused("s3://never-made/runs", StoreBucketMissingError, "Make the bucket, or correct its name")
        for answer, expected, words in ANSWERS:
            answer.times = 100
            answer.method = "PUT" if expected in (StoreEncryptionError, StoreFullError) else ""
            proxy.fail(answer)
            refused(f"s3://{BUCKET}/answers", expected, words)
    use_s3(monkeypatch, s3_with_bucket.endpoint, {**keys, "secret_key": "WRONGSECRET"})
    refused(f"s3://{BUCKET}/answers", StoreCredentialsError, "aws sts get-caller-identity")
    forget_aws(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_with_bucket.endpoint)
    refused(f"s3://{BUCKET}/answers", StoreCredentialsError, "there are no credentials")


def test_gcs_names_the_right_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(fake := FakeGcs("bucket")), running(proxy := Proxy(fake.endpoint)):
        use_gcs(monkeypatch, proxy.endpoint)
        refused(f"gs://{FORBIDDEN_BUCKET}/runs", StorePermissionError, "may neither list nor write")
        refused("gs://never-made/runs", StoreBucketMissingError)
        for method, right in (("POST", "storage.objects.create"), ("DELETE", "storage.objects.delete")):
            proxy.fail(Fault(Kind.ANSWERED, 100, method, 403, {"Content-Type": "application/json"}, b"{}"))
            refused("gs://bucket/runs", StorePermissionError, f"give them {right} (on the objects below)")


def test_a_store_that_does_not_answer_is_waited_for_and_then_nothing_is_lost(
    s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="absl")
    proxy = Proxy(s3_with_bucket.endpoint)
    use_s3(monkeypatch, proxy.endpoint, s3_with_bucket.users["owner"])
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    with running(proxy):
        proxy.fail(Fault(Kind.RESET, 5))
        attempt(url, 20.0)
        assert "The start waits for it, for up to 20 s" in caplog.text
        assert "conditional puts at" in caplog.text
        proxy.fail(Fault(Kind.RESET, 10_000))
        refused(url, StoreUnreachableError, "Nothing is lost: what the ramdisks hold", patience=0.3)


def test_conditional_puts_are_tried_by_the_first_start_and_recorded_for_the_next(
    s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="absl")
    proxy = Proxy(s3_with_bucket.endpoint)
    use_s3(monkeypatch, proxy.endpoint, s3_with_bucket.users["owner"])
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    with running(proxy):
        attempt(url)
        first = len(proxy.requests)
        assert f"conditional puts at {url} are honoured: of all that" in caplog.text
        proxy.requests.clear()
        attempt(url)
        assert len(proxy.requests) < 20 < first
        assert "(as an earlier start found out)" in caplog.text
        files = open_files(url)
        old = "emergency_ckpt/probe-1000000-0123456789abcdef0123456789abcdef"
        files.write(f"{old}/by_us", b"")
        files.write(RECORD, b"damaged")
        attempt(url)
        assert [entry.name for entry in files.entries("emergency_ckpt")] == [RECORD.rpartition("/")[2]]
    # What another server honours is found out anew.
    use_s3(monkeypatch, s3_with_bucket.endpoint, s3_with_bucket.users["owner"])
    caplog.clear()
    attempt(url)
    assert "(as an earlier start found out)" not in caplog.text


def test_a_record_of_conditional_puts_does_not_outlive_what_it_says(
    policies: Policies, caplog: pytest.LogCaptureFixture
) -> None:
    """Ceph ignores conditions in buckets with versions, which may be switched on at any time."""
    caplog.set_level(logging.INFO, logger="absl")
    policies.act_as("owner")
    url = f"s3://{policies.bucket}/runs"
    attempt(url)
    assert f"conditional puts at {url} are honoured" in caplog.text
    versions = {"Status": "Enabled"}
    policies.client.put_bucket_versioning(Bucket=policies.bucket, VersioningConfiguration=versions)
    attempt(url)
    assert f"conditional puts at {url} are ignored" in caplog.text
    assert policies.keys() == [f"runs/{RECORD}"]


def full_and_read_only(root: Path) -> None:
    mount_tmpfs(root, "size=64k")
    (root / "another").write_bytes(bytes(60 * 1024))
    refused(str(root), StoreFullError, "Delete something there")
    read_only = root / "read_only"
    (root / "another").unlink()
    read_only.mkdir()
    mount_tmpfs(read_only, "size=64k,ro")
    refused(str(read_only / "runs"), StorePermissionError, "mount it for writing")


def test_directories_that_are_full_read_only_or_cannot_be_are_told(tmp_path: Path) -> None:
    attempt(str(tmp_path / "made"))
    assert [path.name for path in (tmp_path / "made").rglob("*")] == ["emergency_ckpt"]
    (tmp_path / "file").touch()
    refused(str(tmp_path / "file/runs"), PersistentStoreError, "Something in the path is a file")
    refused("/proc/runs", PersistentStoreError, "Check that the persistent directory is mounted")
    run_in_namespace(full_and_read_only, tmp_path)
