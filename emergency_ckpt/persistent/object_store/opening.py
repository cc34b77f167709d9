"""The store of a persistent directory, by its URL or path: the one place that knows which kinds there are."""

from __future__ import annotations

import os

from emergency_ckpt.core.locations import is_url
from emergency_ckpt.persistent.files import LocalFiles, ObjectFiles
from emergency_ckpt.persistent.object_store.gcs import GcsStore
from emergency_ckpt.persistent.object_store.operations import Limits, ObjectStore
from emergency_ckpt.persistent.object_store.s3 import S3Store
from emergency_ckpt.persistent.object_store.urls import BucketUrl, parse_url


def open_files(location: str | os.PathLike[str], limits: Limits | None = None) -> ObjectFiles:
    """The files below a `gs://` or `s3://` URL, or below a directory. Nothing is asked of a server.

    Raises ConfigError for a URL that cannot be one.
    """
    location = os.fspath(location)
    if not is_url(location):
        return LocalFiles(location)
    url = parse_url(location)
    return ObjectFiles(open_bucket(url, limits), url.prefix)


def open_bucket(url: BucketUrl, limits: Limits | None = None) -> ObjectStore:
    """The bucket of a URL."""
    return S3Store(url.bucket, limits) if url.scheme == "s3" else GcsStore(url.bucket, limits)
