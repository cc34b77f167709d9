"""Real jobs whose persistent directory is in a bucket: on a real S3 server, and on a fake of GCS."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import boto3.session
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.integration.bucket_job import save_lose_and_go_on
from tests.integration.processes import run_job
from tests.integration.training_job import check_state, make_state
from tests.servers.environment import REGION, make_bucket, use_gcs, use_s3
from tests.servers.fake_gcs import FakeGcs, running
from tests.servers.shared_ceph import S3Server

pytestmark = pytest.mark.server


def test_a_job_on_s3_comes_back_from_the_bucket_and_orbax_reads_what_it_wrote(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, ramdisk: Path, tmp_path: Path
) -> None:
    bucket, keys = f"job-{uuid.uuid4().hex}", s3_server.users["owner"]
    make_bucket(s3_server.endpoint, keys, bucket)
    use_s3(monkeypatch, s3_server.endpoint, keys)
    # Nothing has a period here: backups of local steps, and those that are asked for.
    backups = {"checkpoint_period": 0, "multi_tier_checkpointing_backup_interval_steps": 3}
    assert_lives(ramdisk, f"s3://{bucket}/runs", backups, [[4], [6, 8], [10, 12]], ["persistent"] * 2)
    session = boto3.session.Session(keys["access_key"], keys["secret_key"], region_name=REGION)
    client = session.client("s3", endpoint_url=s3_server.endpoint)
    download(client, bucket, "runs/job/checkpoints/12/", tmp_path)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("replica", "fsdp"))
    restored = ocp.StandardCheckpointer().restore(tmp_path / "12/default", make_state(mesh, 0))
    check_state(restored, mesh, 12)


def test_a_job_on_gcs_comes_back_from_the_bucket(monkeypatch: pytest.MonkeyPatch, ramdisk: Path) -> None:
    with running(server := FakeGcs("jobs")):
        use_gcs(monkeypatch, server.endpoint)
        single = {"enable_single_replica_ckpt_restoring": True}
        persistent = [[3, 4], [6, 8], [9, 12]]
        assert_lives(ramdisk, "gs://jobs/runs", single, persistent, ["persistent", "broadcast from slice 0"])


def assert_lives(
    root: Path, url: str, flags: dict[str, Any], persistent: list[list[int]], sources: list[str]
) -> None:
    no_bucket = f"{url.partition('://')[0]}://never-made/runs"
    lives = run_job(save_lose_and_go_on, 2, str(root), url, no_bucket, flags)
    ours, theirs = (first["refused"] for first, *_ in lives)
    assert ours.startswith("StoreBucketMissingError: ")
    assert theirs.startswith("PeerFailedError: process 0: ")
    assert ours.removeprefix("StoreBucketMissingError: ") in theirs
    for (first, second, third), source in zip(lives, sources, strict=True):
        assert first["directory"] == f"{url}/job/checkpoints"
        assert (first["start"], second["start"], third["start"]) == (0, 4, 8)
        assert (second["source"], third["source"]) == (source, "own slot")
        assert [life["persistent"] for life in (first, second, third)] == persistent


def download(client: Any, bucket: str, prefix: str, into: Path) -> None:
    """All objects below a prefix, as files."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for found in page["Contents"]:
            path = into / found["Key"].split("/checkpoints/")[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, found["Key"], str(path))
