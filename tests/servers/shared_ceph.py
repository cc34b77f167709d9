"""One Ceph for all pytest workers of a run: the first that needs it starts it, it ends with the run."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.servers import ceph

_START_SECONDS = 150.0


@dataclasses.dataclass(frozen=True)
class S3Server:
    """Where it is, and the keys of its users by name: {"access_key": …, "secret_key": …}."""

    endpoint: str
    users: Mapping[str, Mapping[str, str]]


def s3_server_of_run(basetemp: Path) -> S3Server:
    """The server of this run of pytest; skips the test where Ceph is not installed, but never in CI."""
    if missing := ceph.missing_programs():
        reason = f"{', '.join(missing)} not installed: `make services` installs Ceph's object store (Debian)"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; in CI nothing is skipped")
        pytest.skip(reason)
    # Workers of pytest-xdist have directories of their own in one that they share.
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    shared, owner = (basetemp.parent, os.getppid()) if is_worker else (basetemp, os.getpid())
    record = shared / "s3-server.json"
    with open(shared / "s3-server.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not record.exists():
            record.write_text(json.dumps(_started(shared, owner)))
    return S3Server(**json.loads(record.read_text()))


def _started(shared: Path, owner: int) -> dict[str, Any]:
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else shared
    directory = Path(tempfile.mkdtemp(prefix="emergency-ckpt-s3-", dir=parent))
    # It is no child of a worker: it serves the others when this one has ended.
    script = ["setsid", "--fork", sys.executable, "-m", "tests.servers.ceph", str(directory), str(owner)]
    root = Path(__file__).parents[2]
    with open(shared / "s3-server.out", "wb") as out:
        subprocess.run(
            script, cwd=root, stdout=out, stderr=out, stdin=subprocess.DEVNULL, timeout=30, check=True
        )
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if (ready := directory / ceph.READY_FILE).exists():
            return json.loads(ready.read_text())
        if not directory.exists() or (directory / ceph.FAILED_FILE).exists():
            break
        time.sleep(0.1)
    raise RuntimeError(f"Ceph did not start: {(shared / 's3-server.out').read_text()[-2000:]}")
