"""A Ceph of a benchmark's own: an S3 server on loopback, its data in memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import boto3

from benchmarks.bucket_contenders import Bucket

_READY_SECONDS = 150.0


@contextlib.contextmanager
def own_server() -> Iterator[Bucket]:
    """A Ceph of our own, its data in memory, as long as this is open; AWS's settings lead to it."""
    from tests.servers import ceph

    if missing := ceph.missing_programs():
        raise SystemExit(f"{', '.join(missing)} not installed: `make services`, or give --url s3://…")
    directory = Path(tempfile.mkdtemp(prefix="emergency-ckpt-bench-s3-", dir="/dev/shm"))
    keeper = subprocess.Popen(
        [sys.executable, "-m", "tests.servers.ceph", str(directory), str(os.getpid())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        ready = directory / ceph.READY_FILE
        deadline = time.monotonic() + _READY_SECONDS
        while not ready.exists():
            if keeper.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("Ceph did not start")
            time.sleep(0.1)
        found = json.loads(ready.read_text())
        keys = found["users"]["owner"]
        os.environ.update(
            AWS_ENDPOINT_URL_S3=found["endpoint"],
            AWS_REGION="us-east-1",
            AWS_ACCESS_KEY_ID=keys["access_key"],
            AWS_SECRET_ACCESS_KEY=keys["secret_key"],
            AWS_EC2_METADATA_DISABLED="true",
        )
        boto3.client("s3").create_bucket(Bucket="bench")
        yield Bucket("bench", "run")
    finally:
        keeper.terminate()
        keeper.wait(60)
