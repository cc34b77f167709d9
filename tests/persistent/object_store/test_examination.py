"""The doctor finds what is wrong with a directory, leaves nothing behind and tells no secrets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emergency_ckpt.cli.main import main
from emergency_ckpt.persistent.object_store.examination import examine
from emergency_ckpt.persistent.object_store.report import Finding, Level, Report
from tests.persistent.object_store.conftest import QUICK
from tests.persistent.object_store.test_trial import Policies
from tests.servers.environment import use_gcs, use_s3
from tests.servers.fake_gcs import FakeGcs, running
from tests.servers.proxy import WeakS3
from tests.servers.shared_ceph import S3Server

pytestmark = pytest.mark.server


@pytest.fixture
def policies(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Policies]:
    found = Policies(s3_server, monkeypatch)
    yield found
    found.client.close()


def levels(report: Report, *checks: str) -> dict[str, Level]:
    return {f.check: f.level for f in report.findings if f.check in checks}


def said(report: Report, check: str) -> str:
    return next(f"{f.said} {f.fix}" for f in report.findings if f.check == check)


def test_the_command_prints_a_table_or_json_and_no_secrets(
    policies: Policies, s3_server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    policies.act_as("owner")
    assert main(["doctor", f"s3://{policies.bucket}/runs", "--megabytes", "4", "--streams", "2", "--json"]) == 0
    told = capsys.readouterr().out
    report: dict[str, Any] = json.loads(told)
    assert (report["ok"], report["credentials"]) == (True, "env")
    by_check = {finding["check"]: finding for finding in report["findings"]}
    fine = (
        "rights",
        "listing",
        "ranged read",
        "replacing",
        "conditional puts",
        "arrays",
        "deleting many",
        "clock",
    )
    assert {by_check[check]["level"] for check in fine} == {"ok"}
    assert by_check["throughput up"]["figures"]["bytes_per_second"] > 0
    assert by_check["throughput down"]["said"].endswith("with 2 streams (4 MiB)")
    assert policies.keys() == []
    assert main(["doctor", "s3://never-made/runs", "--megabytes", "0"]) == 1
    told += capsys.readouterr().out
    assert "FAIL  rights" in told
    assert "Make the bucket" in told
    assert not any(key in told for user in s3_server.users.values() for key in user.values())
    assert main(["doctor", "s3://never-made/runs", "--streams", "0"]) == 2


def test_settings_of_a_bucket_that_matter_are_pointed_out_as_far_as_it_may_look(policies: Policies) -> None:
    policies.set(policies.allow("s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"))
    policies.act_as("stranger")
    checks = ("versioning", "object lock", "lifecycle", "public access")
    report = examine(f"s3://{policies.bucket}/runs", 0)
    assert levels(report, *checks) == dict.fromkeys(checks, Level.UNKNOWN)
    assert "not allowed to look (s3:GetBucketVersioning)" in said(report, "versioning")
    policies.act_as("owner")
    report = examine(f"s3://{policies.bucket}/runs", 0)
    off, on = dict.fromkeys(checks[:2], Level.OK), dict.fromkeys(checks[2:], Level.WARN)
    assert levels(report, *checks) == off | on
    versions = {"Status": "Enabled"}
    policies.client.put_bucket_versioning(Bucket=policies.bucket, VersioningConfiguration=versions)
    report = examine(f"s3://{policies.bucket}/runs", 0)
    assert "steps that are deleted go on costing" in said(report, "versioning")
    # Ceph ignores conditions where there are versions.
    assert levels(report, "conditional puts") == {"conditional puts": Level.WARN}
    rule = {
        "ID": "tidy",
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 2},
        "NoncurrentVersionExpiration": {"NoncurrentDays": 1},
    }
    policies.client.put_bucket_lifecycle_configuration(
        Bucket=policies.bucket, LifecycleConfiguration={"Rules": [rule]}
    )
    report = examine(f"s3://{policies.bucket}/runs", 0)
    assert levels(report, "versioning", "lifecycle") == dict.fromkeys(("versioning", "lifecycle"), Level.OK)
    found = policies.client.list_object_versions(Bucket=policies.bucket)
    assert not found.get("Versions")
    assert not found.get("DeleteMarkers")


def test_a_weak_server_is_a_warning(
    policies: Policies, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = s3_server.users["owner"]
    with running(weak := WeakS3(s3_server.endpoint, keys, WeakS3.refuses)):
        use_s3(monkeypatch, weak.endpoint, keys)
        report = examine(f"s3://{policies.bucket}/runs", 0)
    assert levels(report, "conditional puts", "arrays") == {"conditional puts": Level.WARN, "arrays": Level.OK}
    assert not report.failed


def test_buckets_of_gcs(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(fake := FakeGcs("bucket")):
        use_gcs(monkeypatch, fake.endpoint)
        report = examine("gs://bucket/runs", 1, limits=QUICK)
        assert levels(report, "lifecycle", "public access", "versioning", "retention", "soft delete") == {
            "lifecycle": Level.WARN,
            "public access": Level.WARN,
            "versioning": Level.OK,
            "retention": Level.OK,
            "soft delete": Level.OK,
        }
        fake.buckets.settings = {
            "versioning": {"enabled": True},
            "softDeletePolicy": {"retentionDurationSeconds": "604800"},
            "retentionPolicy": {"retentionPeriod": "86400"},
            "iamConfiguration": {"publicAccessPrevention": "enforced"},
            "lifecycle": {
                "rule": [
                    {"action": {"type": "Delete"}, "condition": {"daysSinceNoncurrentTime": 1}},
                    {"action": {"type": "AbortIncompleteMultipartUpload"}, "condition": {"age": 1}},
                ]
            },
            "encryption": {"defaultKmsKeyName": "projects/p/keys/k"},
        }
        report = examine("gs://bucket/runs", 0, limits=QUICK)
        assert said(report, "encryption").startswith("by default with projects/p/keys/k")
        assert "for 7 days more" in said(report, "soft delete")
        assert "a retention policy of 1 days" in said(report, "retention")
        kinds = ("versioning", "lifecycle", "public access")
        assert levels(report, *kinds) == dict.fromkeys(kinds, Level.OK)
        assert not fake.buckets.objects("bucket")
        assert not report.failed


def test_directories(tmp_path: Path) -> None:
    report = examine(str(tmp_path / "not/there"), 1)
    assert not report.failed, report
    assert levels(report, "renaming", "arrays", "room").keys() == {"renaming", "arrays", "room"}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    report = examine(str(tmp_path / "file/there"), 1)
    assert [finding.level for finding in report.findings] == [Level.FAIL]


def test_a_report_is_a_table_with_what_to_mend_and_a_verdict() -> None:
    fine = Finding("rights", Level.OK, "may do all of it")
    wrong = Finding("clock", Level.FAIL, "far ahead", "Set it.", {"skew_seconds": 1000.0})
    report = Report("s3://bucket/runs", "https://server", "env", (fine, wrong))
    assert list(report.lines()) == [
        "s3://bucket/runs at https://server, credentials: env",
        "ok    rights  may do all of it",
        "FAIL  clock   far ahead",
        "              -> Set it.",
        "1 of 2 checks FAILED: a job cannot rely on it",
    ]
    assert report.failed
    assert report.to_json()["findings"][1]["figures"] == {"skew_seconds": 1000.0}
    assert Report("/x", "", "", (fine,)).verdict == "1 checks, none failed"
