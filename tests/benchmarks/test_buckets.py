"""The measurements of buckets run to their end, on a Ceph of their own. No figure is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.facts import REPOSITORY
from benchmarks.uploading import COMMITTED, WRITTEN
from tests.servers.shared_ceph import S3Server

pytestmark = [pytest.mark.long, pytest.mark.server, pytest.mark.timeout(300)]


def run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_uploads_and_the_slices_of_a_job_are_measured(s3_server: S3Server, tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    run("uploading", "--size-mib", "8", "--rounds", "1", "--slices-mib", "16", "--json", str(written))
    figures = json.loads(written.read_text())
    assert {"emergency_ckpt", "boto3"} <= figures["transfers"].keys()
    assert all(len(each["up"]) == len(each["down"]) == 1 for each in figures["transfers"].values())
    assert figures["slices"].keys() == {"1", "2", "4"}
    assert all(each.keys() == {WRITTEN, COMMITTED} for each in figures["slices"].values())


def test_requests_are_counted(s3_server: S3Server) -> None:
    told = run("requests")
    assert "4,096" in told
    assert "1 GET, 2 HEAD, 4 PUT" in told
