"""S3 buckets, by boto3: AWS, and the servers that speak its protocol.

A conditional put carries a token of its own, by which it is recognised when it is repeated after a lost answer.
"""

from __future__ import annotations

import functools
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from emergency_ckpt.errors import (
    StoreCredentialsError,
    StoreCredentialsExpiredError,
    StoreRegionError,
    StoreUnsupportedError,
)
from emergency_ckpt.persistent.object_store.failures import (
    broken_connection,
    explained,
    refusal,
    unreachable,
    without_secrets,
)
from emergency_ckpt.persistent.object_store.operations import Limits, ObjectInfo, Page
from emergency_ckpt.persistent.object_store.repeating import Failure, repeated
from emergency_ckpt.persistent.object_store.s3_settings import S3Settings, resolve
from emergency_ckpt.persistent.object_store.urls import check_key
from emergency_ckpt.persistent.side_by_side import side_by_side

_T = TypeVar("_T")
_TOKEN = "emergency-ckpt-put"
_DELETED_AT_ONCE = 1000
_ENCRYPTIONS = ("AES256", "aws:kms")
_BATCHES_AT_A_TIME = 4
_READ_BYTES = 1024**2


class S3Store:
    """One bucket, on the server and with the credentials that AWS's standard settings say (see `s3_settings`).

    Nothing is asked of the server, and boto3 is not imported, before the first operation.
    """

    def __init__(self, bucket: str, limits: Limits | None = None):
        self.bucket = bucket
        self._limits = limits or Limits()

    def locate(self, key: str = "") -> str:
        return f"s3://{self.bucket}/{key}".rstrip("/")

    @property
    def server(self) -> str:
        return without_secrets(self.settings.endpoint)

    def check(self, prefix: str = "") -> None:
        # boto3 follows a bucket into its region by itself; TensorStore does not.
        answer = self._ask(
            "looking at",
            prefix,
            lambda _: self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=1),
        )
        found = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
        if found and self.settings.is_default_endpoint and found != self.settings.region:
            text = f"the region is set to {self.settings.region}, the bucket is in {found}"
            raise explained(StoreRegionError, f"looking at {self.locate()}", text)

    def list_pages(self, prefix: str = "", delimiter: str = "") -> Iterator[Page]:
        given: dict[str, Any] = {"Prefix": prefix}
        if delimiter:
            given["Delimiter"] = delimiter
        while True:
            page = self._ask(
                "listing", prefix, lambda _: self._client.list_objects_v2(Bucket=self.bucket, **given)
            )
            objects = (ObjectInfo(o["Key"], o["Size"], _version(o)) for o in page.get("Contents", ()))
            yield Page(tuple(objects), tuple(p["Prefix"] for p in page.get("CommonPrefixes", ())))
            if not page.get("IsTruncated"):
                return
            given["ContinuationToken"] = page["NextContinuationToken"]

    def head(self, key: str) -> ObjectInfo | None:
        found = self._head(key)
        return None if found is None else ObjectInfo(key, found["ContentLength"], _version(found))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        check_key(key)
        if stop is not None and stop <= start:
            if self.head(key) is None:
                raise FileNotFoundError(self.locate(key))
            return b""
        given = {}
        if start or stop is not None:
            given["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"

        def content(_: int) -> bytes:
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=key, **given)
            except self._client.exceptions.ClientError as error:
                status, code = _status_and_code(error)
                if code == "NoSuchKey":
                    raise FileNotFoundError(self.locate(key)) from error
                if status == 416:
                    return b""
                raise
            with answer["Body"] as body:
                return b"".join(iter(functools.partial(body.read, _READ_BYTES), b""))

        # How much it is, is not known: the time limit of the socket notices where nothing comes.
        return self._ask_within(None, "reading", key, content)

    def put(self, key: str, data: bytes) -> str:
        check_key(key)
        return self._sending("writing", key, data, lambda _: self._put(key, data))

    def put_if_absent(self, key: str, data: bytes) -> str | None:
        return self._conditional_put("creating", key, data, IfNoneMatch="*")

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> str | None:
        # Without quotes: RGW takes no others, AWS takes both.
        return self._conditional_put("replacing", key, data, IfMatch=version)

    def delete(self, key: str) -> None:
        check_key(key)
        self._ask("deleting", key, lambda _: self._client.delete_object(Bucket=self.bucket, Key=key))

    def delete_many(self, keys: Iterable[str]) -> None:
        # Repeated keys would be told as errors by some servers.
        batches = _batches(dict.fromkeys(keys), _DELETED_AT_ONCE)
        side_by_side(self._delete_batch, batches, _BATCHES_AT_A_TIME, "deleting")

    def kvstore(self, prefix: str = "") -> dict[str, Any]:
        return self.settings.kvstore(self.bucket, prefix)

    def demanded_encryption(self, key: str) -> str | None:
        """Which encryption a put has to name so that the bucket does not refuse it for that, if it is so.

        For a put that was refused without; what is put meanwhile has this key.
        """

        def status(**given: Any) -> int:
            def put(_: int) -> int:
                try:
                    self._put(key, b"", **given)
                except self._client.exceptions.ClientError as error:
                    return _status_and_code(error)[0]
                return 200

            return self._ask("writing", key, put)

        plain = status()
        for kind in _ENCRYPTIONS:
            if status(ServerSideEncryption=kind) not in (plain, 401, 403):
                return kind
        return None

    def setting(self, operation: str) -> dict[str, Any] | None:
        """What boto3's `get_bucket_…` operation of this name says; None where nothing is set."""

        def ask(_: int) -> dict[str, Any] | None:
            try:
                return getattr(self._client, operation)(Bucket=self.bucket)
            except self._client.exceptions.ClientError as error:
                code = _status_and_code(error)[1]
                if code.endswith("NotFoundError") or (code.startswith("NoSuch") and code != "NoSuchBucket"):
                    return None
                raise

        return self._ask(f"asking with {operation} for the settings of", "", ask)

    def answer_to_head(self, key: str) -> dict[str, Any]:
        """All that the server says of an object that is there, its own clock and the encryption included."""
        return self._head(key) or {}

    def delete_versions(self, prefix: str) -> None:
        """Deletes what is left of objects that were deleted in a bucket with versions."""

        def delete(_: int) -> None:
            found = self._client.list_object_versions(Bucket=self.bucket, Prefix=prefix)
            for each in [*found.get("Versions", ()), *found.get("DeleteMarkers", ())]:
                self._client.delete_object(Bucket=self.bucket, Key=each["Key"], VersionId=each["VersionId"])

        self._ask("deleting the versions of", prefix, delete)

    @functools.cached_property
    def settings(self) -> S3Settings:
        """Server, region and credentials."""
        return resolve(self._limits)

    @property
    def _client(self) -> Any:
        return self.settings.client

    def _head(self, key: str) -> dict[str, Any] | None:
        check_key(key)

        def look(_: int) -> dict[str, Any] | None:
            try:
                return self._client.head_object(Bucket=self.bucket, Key=key)
            except self._client.exceptions.ClientError as error:
                # Such answers have no body to say what it is: that of a listing has. A put or a deletion that
                # comes between the two, or was cut short, may be in the listing alone.
                listed = self._client.list_objects_v2(Bucket=self.bucket, Prefix=key, MaxKeys=1)
                is_listed = any(o["Key"] == key for o in listed.get("Contents", ()))
                if is_listed and _status_and_code(error)[0] != 404:
                    raise
                return None

        return self._ask("looking at", key, look)

    def _put(self, key: str, data: bytes, **given: Any) -> str:
        answer = self._client.put_object(Bucket=self.bucket, Key=key, Body=data, **given)
        return _version(answer)

    def _conditional_put(self, doing: str, key: str, data: bytes, **condition: str) -> str | None:
        check_key(key)
        token = uuid.uuid4().hex

        def put(tries: int) -> str | None:
            try:
                return self._put(key, data, Metadata={_TOKEN: token}, **condition)
            except self._client.exceptions.ClientError as error:
                status, code = _status_and_code(error)
                if status != 412 and not (code == "NoSuchKey" and "IfMatch" in condition):
                    raise
            if tries:
                found = self._head(key)
                if found is not None and found["Metadata"].get(_TOKEN) == token:
                    return _version(found)
            return None

        return self._sending(doing, key, data, put)

    def _delete_batch(self, keys: list[str]) -> None:
        left = {check_key(key): None for key in keys}

        def delete(_: int) -> None:
            try:
                answer = self._client.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": [{"Key": key} for key in left], "Quiet": True}
                )
            except self._client.exceptions.ClientError as error:
                status, code = _status_and_code(error)
                if status not in (405, 501) and code != "AccessDenied":
                    raise
                # Some servers have no such request, or ask for rights in the whole bucket.
                raise _NoBatches from error
            refused = {failed["Key"]: failed for failed in answer.get("Errors", ())}
            for key in [key for key in left if key not in refused]:
                del left[key]
            for key, failed in refused.items():
                raise _Refused(key, failed.get("Code", ""), failed.get("Message") or "")

        if not left:
            return
        try:
            self._ask("deleting", f"{keys[0]} and {len(keys) - 1} others", delete)
        except _NoBatches:
            side_by_side(self.delete, left, self._limits.concurrency, "deleting")

    def _sending(self, doing: str, key: str, data: bytes, request: Callable[[int], _T]) -> _T:
        return self._ask_within(self._limits.attempt_seconds, doing, key, request, len(data))

    def _ask(self, doing: str, key: str, request: Callable[[int], _T]) -> _T:
        return self._ask_within(self._limits.attempt_seconds, doing, key, request)

    def _ask_within(
        self, seconds: float | None, doing: str, key: str, request: Callable[[int], _T], nbytes: int = 0
    ) -> _T:
        """The answer to `request`, sent until there is one; limits as in `repeated`."""
        where = f"{doing} {self.locate(key)} at {self.server}"
        try:
            return repeated(where, request, self._limits, self._explain, seconds, nbytes)
        except StoreCredentialsError:
            # boto3 reads keys once. Who renews them puts them where they were: the next operation looks there.
            self.__dict__.pop("settings", None)
            raise

    def _explain(self, error: Exception, what: str) -> Failure | None:
        import botocore.exceptions as theirs

        if isinstance(error, _Refused):
            return refusal(f"{what} ({error.key})", 200, error.code, error.said)
        if isinstance(error, theirs.ClientError):
            status, code = _status_and_code(error)
            answer: Any = error.response
            said = str(answer.get("Error", {}).get("Message") or "")
            headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            region = headers.get("x-amz-bucket-region") or answer.get("Error", {}).get("Region") or ""
            return refusal(f"{what} (region {self.settings.region})", status, code, said, region)
        if isinstance(error, theirs.NoCredentialsError | theirs.PartialCredentialsError):
            text = "there are no credentials in the environment, in the profile or by a role of this host"
            return Failure(explained(StoreCredentialsError, what, text))
        if isinstance(error, theirs.UnauthorizedSSOTokenError | theirs.TokenRetrievalError):
            return Failure(explained(StoreCredentialsExpiredError, what, "the login has expired"))
        if isinstance(error, theirs.CredentialRetrievalError | theirs.SSOError):
            text = f"the credentials cannot be had ({type(error).__name__})"
            return Failure(explained(StoreCredentialsError, what, text))
        if isinstance(error, theirs.SSLError):
            return unreachable(what, f"no secure connection: {error}", passing=False)
        if isinstance(error, theirs.HTTPClientError | theirs.ConnectionError | theirs.IncompleteReadError):
            return unreachable(what, f"no answer ({type(error).__name__})")
        if isinstance(error, theirs.BotoCoreError):
            return Failure(explained(StoreUnsupportedError, what, f"boto3 cannot do it ({error})"))
        return broken_connection(error, what)


class _Refused(Exception):
    """One of many deletions was refused."""

    def __init__(self, key: str, code: str, said: str):
        super().__init__(key, code)
        self.key, self.code, self.said = key, code, said


class _NoBatches(Exception):
    """The server does not delete many objects by one request, or not for these credentials."""


def _status_and_code(error: Any) -> tuple[int, str]:
    answer = error.response
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), answer.get("Error", {}).get("Code", "")


def _version(answer: dict[str, Any]) -> str:
    return answer["ETag"].strip('"')


def _batches(keys: Iterable[str], size: int) -> Iterator[list[str]]:
    left = iter(keys)
    while batch := list(itertools.islice(left, size)):
        yield batch
