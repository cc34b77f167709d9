"""URLs of persistent directories, and keys of objects: what is refused before anything is asked of a store.

A URL is taken apart here and nowhere else, and never goes through `pathlib`, which makes "s3:/" of "s3://".
"""

from __future__ import annotations

import dataclasses
import re

from emergency_ckpt.core.locations import absolute, is_url
from emergency_ckpt.errors import ConfigError, PersistentStoreError

SCHEMES = ("gs", "s3")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_BUCKETS = {
    # Both stores: letters, digits, '-', and labels between dots; GCS also '_', and up to 222 characters.
    "s3": re.compile(r"(?=.{3,63}\Z)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"),
    "gs": re.compile(r"(?=.{3,222}\Z)[a-z0-9]([a-z0-9_-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9_-]*[a-z0-9])?)*"),
}
_IPV4 = re.compile(r"\d+\.\d+\.\d+\.\d+")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]|[\ud800-\udfff]|[\ufffe\uffff]")
_MAX_KEY_BYTES = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class BucketUrl:
    """`scheme://bucket/prefix`; the prefix neither begins nor ends with '/'."""

    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + f"/{self.prefix}" * bool(self.prefix)


def check_location(location: str) -> str:
    """A location in its one form, a full path or a URL. Raises ConfigError for a URL that cannot be one."""
    return str(parse_url(location)) if is_url(location) else absolute(location)


def parse_url(location: str) -> BucketUrl:
    """The parts of a `gs://` or `s3://` URL, nothing in it decoded. Raises ConfigError for anything else."""
    match = _SCHEME.match(location)
    scheme = match[1] if match else ""
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{_shown(location)} is not the URL of an object store: expected gs://bucket/prefix or"
            " s3://bucket/prefix. For a file system give the path of a directory."
        )
    rest = location[len(scheme) + 1 :]
    if not rest.startswith("//"):
        raise ConfigError(
            f"{_shown(location)} has one '/' behind {scheme!r}: it went through a function for paths, as"
            f" pathlib's. Give {scheme}://bucket/prefix as a string."
        )
    bucket, _, prefix = rest[2:].partition("/")
    if not _BUCKETS[scheme].fullmatch(bucket) or _IPV4.fullmatch(bucket):
        raise ConfigError(
            f"{_shown(location)} has no valid bucket: expected small letters, digits, '-' and '.', 3 to 63 of"
            f" them, right behind {scheme}://, without user, password or port. Servers are named by"
            " AWS_ENDPOINT_URL_S3 (or the AWS profile), STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL."
        )
    for character in "?#":
        if character in prefix:
            raise ConfigError(
                f"{_shown(location)} has a {character!r}, which no prefix may have: URLs of buckets take no"
                " options. Choose another one."
            )
    prefix = prefix.rstrip("/")
    if reason := _fault(prefix) if prefix else None:
        raise ConfigError(f"{_shown(location)} has a prefix that {reason}. Choose another one.")
    return BucketUrl(scheme, bucket, prefix)


def check_key(key: str) -> str:
    """The key, if it is one that every store takes and that names nothing outside its directory."""
    if reason := _fault(key):
        raise PersistentStoreError(f"no object may be called {key!r:.200}: the name {reason}.")
    return key


def _fault(key: str) -> str | None:
    """Why this cannot be a key everywhere; None if it can."""
    if _UNPRINTABLE.search(key):
        return "has control characters, or is not Unicode"
    if len(key.encode()) > _MAX_KEY_BYTES:
        return f"is longer than {_MAX_KEY_BYTES} bytes"
    if any(part in ("", ".", "..") for part in key.split("/")):
        return "has an empty part, '.' or '..'"
    return None


def _shown(location: str) -> str:
    """The URL for a message, without what could be a password in it."""
    return repr(re.sub(r"//.*@", "//…@", location)[:200])
