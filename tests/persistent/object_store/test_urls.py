"""URLs of buckets are taken apart as they are written, and what could be meant otherwise is refused."""

from __future__ import annotations

import pathlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.locations import is_url
from emergency_ckpt.errors import ConfigError
from emergency_ckpt.persistent.files import LocalFiles, ObjectFiles
from emergency_ckpt.persistent.object_store.gcs import GcsStore
from emergency_ckpt.persistent.object_store.opening import open_files
from emergency_ckpt.persistent.object_store.s3 import S3Store
from emergency_ckpt.persistent.object_store.urls import BucketUrl, check_key, parse_url


@pytest.mark.parametrize(
    ("location", "bucket", "prefix"),
    [
        ("s3://my-bucket", "my-bucket", ""),
        ("s3://my-bucket/", "my-bucket", ""),
        ("gs://my_bucket.example.com/a/b/", "my_bucket.example.com", "a/b"),
        ("s3://b0.c/with space/per%41cent/plus+/ü", "b0.c", "with space/per%41cent/plus+/ü"),
        ("gs://bucket/run:1@x", "bucket", "run:1@x"),
    ],
)
def test_a_url_is_taken_apart_as_it_is_written(location: str, bucket: str, prefix: str) -> None:
    url = parse_url(location)
    assert (url.bucket, url.prefix) == (bucket, prefix)
    assert str(url) == location.rstrip("/")


@pytest.mark.parametrize(
    ("location", "words"),
    [
        (str(pathlib.PurePosixPath("s3://bucket/run")), "has one '/' behind 's3'"),
        ("s3:/bucket", "has one '/'"),
        ("http://bucket/run", "is not the URL of an object store"),
        ("file:///bucket/run", "For a file system give the path"),
        ("S3://bucket", "is not the URL of an object store"),
        ("s3://", "no valid bucket"),
        ("s3:///prefix", "no valid bucket"),
        ("s3://ab", "no valid bucket"),
        ("s3://Bucket/run", "no valid bucket"),
        ("s3://my_bucket/run", "no valid bucket"),
        ("s3://127.0.0.1/run", "no valid bucket"),
        ("s3://bucket:8080/run", "without user, password or port"),
        ("s3://..", "no valid bucket"),
        ("s3://a..b", "no valid bucket"),
        ("gs://bucket/../other", "has an empty part, '.' or '..'"),
        ("gs://bucket/a//b", "has an empty part"),
        ("gs://bucket/a?x=1", r"has a '\?'"),
        ("gs://bucket/a#1", "has a '#'"),
        ("gs://bucket/a\nb", "has control characters"),
        ("gs://bucket/" + "x" * 1025, "is longer than 1024 bytes"),
    ],
)
def test_what_is_no_url_of_a_bucket_is_refused(location: str, words: str) -> None:
    assert is_url(location)
    with pytest.raises(ConfigError, match=words):
        open_files(location)


def test_a_password_in_a_url_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as told:
        parse_url("s3://AKIAKEY:wJalr/XUtn@bucket/run")
    assert "AKIAKEY" not in str(told.value)
    assert "wJalr" not in str(told.value)


@given(st.text())
def test_any_text_is_a_url_of_a_bucket_or_refused(text: str) -> None:
    for location in (text, f"s3://{text}", f"gs://bucket/{text}"):
        try:
            url = parse_url(location)
        except ConfigError:
            continue
        assert isinstance(url, BucketUrl)
        assert parse_url(str(url)) == url
        if url.prefix:
            assert check_key(url.prefix) == url.prefix


def test_the_store_of_a_location_is_chosen_by_its_form(tmp_path: Path) -> None:
    assert isinstance(open_files(tmp_path), LocalFiles)
    assert isinstance(open_files("relative/a:b"), LocalFiles)
    for location, kind in (("s3://bucket/a/b", S3Store), ("gs://bucket/a/b", GcsStore)):
        files = open_files(location)
        assert isinstance(files, ObjectFiles)
        assert isinstance(files.store, kind)
        assert files.below("c").locate("d/e") == f"{location}/c/d/e"
        assert files.locate() == location
