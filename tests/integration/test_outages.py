"""A job whose store fails trains on, says so, and catches up when the store is back: on a real S3 server."""

from __future__ import annotations

import signal
import uuid
from datetime import timedelta
from pathlib import Path

import pytest

from tests.integration.outage_job import go_on_through
from tests.integration.processes import Job
from tests.servers.environment import make_bucket, use_s3
from tests.servers.fake_gcs import running
from tests.servers.proxy import Fault, Kind, Proxy, s3_error
from tests.servers.shared_ceph import S3Server

pytestmark = pytest.mark.server

LIMIT = timedelta(seconds=120)
FAULTS = {
    "reset": (Fault(Kind.RESET), "StoreUnreachableError"),
    "stalled": (Fault(Kind.STALLED), "StoreUnreachableError"),
    "stalled uploads": (Fault(Kind.STALLED, 1, "PUT"), "StoreUnreachableError"),
    "throttled": (s3_error("SlowDown", 503, "Reduce your request rate."), "StoreThrottledError"),
    "denied": (s3_error("AccessDenied", 403), "StorePermissionError"),
    "expired": (s3_error("ExpiredToken", 400), "StoreCredentialsError"),
    "full": (s3_error("QuotaExceeded", 507), "StoreFullError"),
}


def run(stories: list[str], server: S3Server, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    bucket, keys = f"outage-{uuid.uuid4().hex}", server.users["owner"]
    make_bucket(server.endpoint, keys, bucket)
    with running(proxy := Proxy(server.endpoint)):
        use_s3(monkeypatch, proxy.endpoint, keys)
        with Job(go_on_through, 2, str(root), f"s3://{bucket}/runs", stories) as job:
            for story in stories:
                job.wait_for_line(0, f"ready for {story}", LIMIT)
                fault, _ = FAULTS[story]
                proxy.fail(Fault(fault.kind, 10**9, fault.method, fault.status, fault.headers, fault.body))
                (root / f"{story}.begins").touch()
                job.wait_for_line(0, f"{story} was told", LIMIT)
                proxy.fail()
                (root / f"{story}.ends").touch()
            # Nothing is answered any more, and the job is told to end.
            job.wait_for_line(0, "ready for the end", LIMIT)
            proxy.fail(Fault(Kind.STALLED, 10**9))
            (root / "end.begins").touch()
            job.wait_for_line(0, "the end was told", LIMIT)
            job.signal(1, signal.SIGTERM)
            for process in range(2):
                job.wait_for_line(process, "closed in the outage", LIMIT)
            proxy.fail()
            (root / "end.ends").touch()
            job.wait_until(lambda: job.all_ended or job.failed, LIMIT)
            assert not job.failed, job.describe()
            results = [job.result(process) for process in range(2)]
    for result in results:
        assert result["skipped"] == 0  # A local save always found a slot.
        assert result["newest"] == max(result["steps"])
        assert result["left"]["complete"], "the step of the signal is on the ramdisks"
        assert result["left"]["closed"] in ("StoreUnreachableError", "PersistentStoreError"), result["left"]
        for story in stories:
            told = result["stories"][story]
            assert told["complete"]
            assert FAULTS[story][1] in told["told"][0]
            assert "It is tried again" in told["told"][0]


def test_training_goes_on_while_the_store_fails_and_the_newest_step_is_persistent_when_it_is_back(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, ramdisk: Path
) -> None:
    run(["reset", "stalled uploads", "denied", "full"], s3_server, monkeypatch, ramdisk)


@pytest.mark.long
def test_training_goes_on_while_nothing_is_answered_at_all_or_something_that_passes(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, ramdisk: Path
) -> None:
    run(["stalled", "throttled", "expired"], s3_server, monkeypatch, ramdisk)
