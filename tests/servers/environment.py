"""The environment that sends this process, and those it starts, to a server of the tests and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping

import boto3.session
import pytest

REGION = "us-east-1"


def forget_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of AWS of this machine is in force, and no role is asked for."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent/config")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/credentials")


def use_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str, keys: Mapping[str, str]) -> None:
    """S3 is the server at `endpoint`, with these keys."""
    forget_aws(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_REGION", REGION)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys["access_key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys["secret_key"])


def make_bucket(endpoint: str, keys: Mapping[str, str], name: str) -> None:
    """Makes the bucket, unless these keys have it already."""
    session = boto3.session.Session(keys["access_key"], keys["secret_key"], region_name=REGION)
    client = session.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=name)
    client.close()


def use_gcs(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """GCS is the server at `endpoint`, for Google's client and for TensorStore."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", endpoint)
