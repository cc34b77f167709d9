"""AWS's standard settings say which server and which credentials, for metadata and tensors alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tensorstore as ts

from emergency_ckpt.errors import StoreCredentialsError, StoreRegionError
from emergency_ckpt.persistent.arrays import new_context
from emergency_ckpt.persistent.object_store.s3 import S3Store
from tests.persistent.object_store.conftest import BUCKET, QUICK
from tests.servers.environment import REGION, forget_aws, use_s3
from tests.servers.fake_gcs import running
from tests.servers.proxy import Fault, Kind, Proxy
from tests.servers.shared_ceph import S3Server


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_aws(monkeypatch)


def write_settings(
    monkeypatch: pytest.MonkeyPatch, directory: Path, config: str, credentials: str = ""
) -> None:
    (directory / "config").write_text(config)
    (directory / "credentials").write_text(credentials)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(directory / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(directory / "credentials"))


def keys_of(server: S3Server) -> str:
    keys = server.users["owner"]
    return f"aws_access_key_id = {keys['access_key']}\naws_secret_access_key = {keys['secret_key']}\n"


def assert_both_reach(store: S3Store, server: S3Server) -> dict[str, Any]:
    """Tensors and metadata are on the server, with its owner's keys; returns TensorStore's specification."""
    spec = store.kvstore("settings/")
    assert spec["endpoint"] == server.endpoint
    kvstore = ts.KvStore.open(spec, context=new_context()).result(timeout=30)
    kvstore.write("tensor", b"bytes").result(timeout=30)
    assert store.read("settings/tensor") == b"bytes"
    return spec


@pytest.mark.server
def test_everything_in_a_profile(
    s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = f"[profile mine]\nregion = eu-central-1\nendpoint_url = {s3_with_bucket.endpoint}\n"
    write_settings(monkeypatch, tmp_path, config, f"[mine]\n{keys_of(s3_with_bucket)}")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    spec = assert_both_reach(S3Store(BUCKET), s3_with_bucket)
    assert spec["aws_region"] == "eu-central-1"
    assert spec["aws_credentials"]["profile"] == "mine"
    assert spec["use_conditional_write"] is False
    (tmp_path / "credentials").unlink()
    (tmp_path / "config").write_text(config + keys_of(s3_with_bucket))
    assert_both_reach(S3Store(BUCKET), s3_with_bucket)


@pytest.mark.server
def test_services_section_and_a_process_that_gives_credentials(
    s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = s3_with_bucket.users["owner"]
    script = tmp_path / "give.sh"
    said = f'{{"Version": 1, "AccessKeyId": "{keys["access_key"]}", "SecretAccessKey": "{keys["secret_key"]}"}}'
    script.write_text(f"#!/bin/sh\necho '{said}'\n")
    script.chmod(0o700)
    config = f"[default]\nservices = here\ncredential_process = {script}\n"
    config += f"[services here]\ns3 =\n  endpoint_url = {s3_with_bucket.endpoint}\n"
    write_settings(monkeypatch, tmp_path, config)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    spec = assert_both_reach(S3Store(BUCKET), s3_with_bucket)
    assert spec["aws_credentials"]["type"] == "profile"


@pytest.mark.server
def test_the_endpoint_of_s3_goes_before_that_of_all_services_and_the_environment_before_files(
    s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_settings(monkeypatch, tmp_path, "[default]\nendpoint_url = http://127.0.0.1:1\nregion = there\n")
    use_keys = s3_with_bucket.users["owner"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", use_keys["access_key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", use_keys["secret_key"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_with_bucket.endpoint + "/")
    assert assert_both_reach(S3Store(BUCKET), s3_with_bucket)["aws_region"] == "there"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_with_bucket.endpoint)
    monkeypatch.setenv("AWS_REGION", "here")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "here")
    spec = assert_both_reach(S3Store(BUCKET), s3_with_bucket)
    assert (spec["aws_region"], spec["aws_credentials"]) == ("here", {"type": "environment"})


@pytest.mark.server
def test_a_session_token_is_sent_by_both(s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy(s3_with_bucket.endpoint)
    use_s3(monkeypatch, proxy.endpoint, {"access_key": "TEMPORARY", "secret_key": "SECRET"})
    monkeypatch.setenv("AWS_SESSION_TOKEN", "TOKENOFTHESESSION")
    with running(proxy):
        proxy.fail(Fault(Kind.ANSWERED, 100, status=200, headers={"ETag": '"1"'}))
        store = S3Store(BUCKET, QUICK)
        store.put("ours", b"")
        kvstore = ts.KvStore.open(store.kvstore(), context=new_context()).result(timeout=30)
        kvstore.write("theirs", b"").result(timeout=30)
        sent = [{name.lower(): value for name, value in asked.headers.items()} for asked in proxy.requests]
    assert [asked["x-amz-security-token"] for asked in sent] == ["TOKENOFTHESESSION"] * 2
    assert all("Credential=TEMPORARY/" in asked["authorization"] for asked in sent)


@pytest.mark.server
def test_a_bucket_in_the_host_name_where_that_is_asked_for(
    s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_s3(monkeypatch, "http://store.example:8080", s3_with_bucket.users["owner"])
    assert S3Store(BUCKET).kvstore("a/")["bucket"] == BUCKET
    write_settings(monkeypatch, tmp_path, "[default]\ns3 =\n  addressing_style = virtual\n")
    spec = S3Store(BUCKET).kvstore("a/")
    assert (spec["bucket"], spec["endpoint"]) == ("", f"http://{BUCKET}.store.example:8080")
    proxy = Proxy(s3_with_bucket.endpoint)
    with running(proxy):
        # Whatever ends with .localhost is this machine to TensorStore's client.
        spec["endpoint"] = proxy.endpoint.replace("127.0.0.1", f"{BUCKET}.localhost")
        proxy.fail(Fault(Kind.ANSWERED, 100, status=200, headers={"ETag": '"1"'}))
        ts.KvStore.open(spec, context=new_context()).result(timeout=30).write("b c", b"").result(timeout=30)
        assert proxy.requests[0].path == "/a/b%20c"
        assert proxy.requests[0].headers["Host"].startswith(f"{BUCKET}.localhost")


def test_on_aws_itself_the_server_follows_from_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    for region in ("us-east-1", "eu-west-1"):
        monkeypatch.setenv("AWS_DEFAULT_REGION", region)
        spec = S3Store(BUCKET).kvstore("a/")
        assert "endpoint" not in spec
        assert (spec["bucket"], spec["aws_region"], spec["path"]) == (BUCKET, region, "a/")
    monkeypatch.setenv("AWS_USE_DUALSTACK_ENDPOINT", "true")
    assert S3Store(BUCKET).kvstore()["endpoint"] == "https://s3.dualstack.eu-west-1.amazonaws.com"


@pytest.mark.parametrize(
    ("method", "expected"),
    [("iam-role", "imds"), ("container-role", "ecs"), ("assume-role-with-web-identity", "default")],
)
def test_roles_are_roles_to_tensorstore_too(
    monkeypatch: pytest.MonkeyPatch, method: str, expected: str
) -> None:
    store = use_method(monkeypatch, method)
    assert store.kvstore()["aws_credentials"] == {"type": expected}


def test_credentials_that_tensorstore_cannot_have_are_refused_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(StoreCredentialsError, match=r"come from 'sso'.*credential_process"):
        use_method(monkeypatch, "sso").kvstore()


def use_method(monkeypatch: pytest.MonkeyPatch, method: str) -> S3Store:
    """A store whose credentials came from where none can be had in a test."""
    use_s3(monkeypatch, "http://127.0.0.1:1", {"access_key": "KEY", "secret_key": "SECRET"})
    store = S3Store(BUCKET)
    credentials: Any = store.settings.session.get_credentials()
    credentials.method = method
    return store


@pytest.mark.server
def test_a_bucket_in_another_region_of_aws_is_told_where_boto3_would_follow_it(
    s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(s3_with_bucket.endpoint)
    use_s3(monkeypatch, proxy.endpoint, s3_with_bucket.users["owner"])
    listing = b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>'
    headers = {"Content-Type": "application/xml", "x-amz-bucket-region": "eu-west-1"}
    with running(proxy):
        proxy.fail(Fault(Kind.ANSWERED, 100, status=200, headers=headers, body=listing))
        store = S3Store(BUCKET, QUICK)
        store.check()  # Servers that are not AWS's may say what they like.
        aws = dataclasses.replace(store.settings, endpoint="https://s3.amazonaws.com", region=REGION)
        vars(store)["settings"] = aws
        with pytest.raises(StoreRegionError, match="set to us-east-1, the bucket is in eu-west-1"):
            store.check()


@pytest.mark.server
def test_keys_that_are_renewed_in_a_profile_count_from_the_next_operation_on(
    s3_with_bucket: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = f"[default]\nregion = {REGION}\nendpoint_url = {s3_with_bucket.endpoint}\n"
    old = "aws_access_key_id = OLD\naws_secret_access_key = old\n"
    write_settings(monkeypatch, tmp_path, config, f"[default]\n{old}")
    store = S3Store(BUCKET, QUICK)
    for _ in range(2):
        with pytest.raises(StoreCredentialsError):
            store.head("settings/tensor")
    write_settings(monkeypatch, tmp_path, config, f"[default]\n{keys_of(s3_with_bucket)}")
    assert_both_reach(store, s3_with_bucket)
