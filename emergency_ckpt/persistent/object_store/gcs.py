"""GCS buckets, by Google's client. Versions are generations, which every put makes anew.

A conditional put carries a token of its own, by which it is recognised when it is repeated after a lost answer.
"""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from emergency_ckpt.errors import ConfigError, StoreCredentialsError, StoreCredentialsExpiredError
from emergency_ckpt.persistent.object_store.failures import (
    broken_connection,
    explained,
    refusal,
    unreachable,
    without_secrets,
)
from emergency_ckpt.persistent.object_store.operations import Limits, ObjectInfo, Page
from emergency_ckpt.persistent.object_store.repeating import Failure, repeated
from emergency_ckpt.persistent.object_store.tensorstore_limits import request_retries
from emergency_ckpt.persistent.object_store.urls import check_key
from emergency_ckpt.persistent.side_by_side import side_by_side

_T = TypeVar("_T")
_TOKEN = "emergency-ckpt-put"
_EMULATOR = "STORAGE_EMULATOR_HOST"
_TENSORSTORE_SERVER = "TENSORSTORE_GCS_HTTP_URL"
GOOGLES_SERVER = "https://storage.googleapis.com"


class GcsStore:
    """One bucket, with Google's application default credentials, or at the server of the emulator variables.

    Nothing is asked of the server, and Google's client is not imported, before the first operation.
    """

    def __init__(self, bucket: str, limits: Limits | None = None):
        self.bucket = bucket
        self._limits = limits or Limits()

    def locate(self, key: str = "") -> str:
        return f"gs://{self.bucket}/{key}".rstrip("/")

    @property
    def server(self) -> str:
        return without_secrets(check_servers())

    def check(self, prefix: str = "") -> None:
        self._ask("looking at", prefix, lambda _: self._page(prefix, "", None, 1))

    def list_pages(self, prefix: str = "", delimiter: str = "") -> Iterator[Page]:
        token: str | None = None
        while True:
            page, token = self._ask(
                "listing", prefix, lambda _, at=token: self._page(prefix, delimiter, at, None)
            )
            yield page
            if not token:
                return

    def head(self, key: str) -> ObjectInfo | None:
        blob = self._head(key)
        return None if blob is None else ObjectInfo(key, blob.size, str(blob.generation))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        check_key(key)
        if stop is not None and stop <= start:
            if self.head(key) is None:
                raise FileNotFoundError(self.locate(key))
            return b""

        def content(_: int) -> bytes:
            import google.api_core.exceptions as theirs

            try:
                return self._bucket.blob(key).download_as_bytes(
                    start=start or None,
                    end=None if stop is None else stop - 1,
                    timeout=self._timeout,
                    retry=None,
                    raw_download=True,
                )
            except theirs.GoogleAPICallError as error:
                if error.response is not None:
                    error.response.close()  # Of a download that was refused the client keeps the connection.
                if isinstance(error, theirs.RequestRangeNotSatisfiable):
                    return b""
                if not isinstance(error, theirs.NotFound):
                    raise
                self._check_bucket()
                raise FileNotFoundError(self.locate(key)) from error

        # How much it is, is not known: the time limit of the socket notices where nothing comes.
        return self._ask_within(None, "reading", key, content)

    def put(self, key: str, data: bytes) -> str:
        check_key(key)
        return self._sending("writing", key, data, lambda _: self._put(key, data, {}))

    def put_if_absent(self, key: str, data: bytes) -> str | None:
        return self._conditional_put("creating", key, data, 0)

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> str | None:
        return self._conditional_put("replacing", key, data, int(version))

    def delete(self, key: str) -> None:
        check_key(key)

        def delete(_: int) -> None:
            import google.api_core.exceptions as theirs

            try:
                self._bucket.blob(key).delete(timeout=self._timeout, retry=None)
            except theirs.NotFound:
                self._check_bucket()

        self._ask("deleting", key, delete)

    def delete_many(self, keys: Iterable[str]) -> None:
        side_by_side(self.delete, dict.fromkeys(keys), self._limits.concurrency, "deleting")

    def kvstore(self, prefix: str = "") -> dict[str, Any]:
        check_servers()
        return {
            "driver": "gcs",
            "bucket": self.bucket,
            "path": prefix,
            "gcs_request_retries": request_retries(self._limits),
        }

    def properties(self) -> dict[str, Any]:
        """The bucket's own resource, as the JSON API gives it."""

        def ask(_: int) -> dict[str, Any]:
            self._bucket.reload(timeout=self._timeout, retry=None)
            return dict(self._bucket._properties)

        return self._ask("asking for the settings of", "", ask)

    def written_at(self, key: str) -> float:
        """When an object that is there was written, by the server's clock: Unix time."""
        return self._head(key).updated.timestamp()

    def delete_versions(self, prefix: str) -> None:
        """Deletes what is left of objects that were deleted in a bucket with versions."""

        def delete(_: int) -> None:
            found = self._bucket.client.list_blobs(
                self._bucket, prefix=prefix, versions=True, timeout=self._timeout, retry=None
            )
            for blob in found:
                blob.delete(timeout=self._timeout, retry=None)

        self._ask("deleting the versions of", prefix, delete)

    @functools.cached_property
    def _bucket(self) -> Any:
        return _client(self._limits.concurrency).bucket(self.bucket)

    @property
    def _timeout(self) -> tuple[float, float]:
        return min(self._limits.attempt_seconds, 10.0), self._limits.attempt_seconds

    def _page(
        self, prefix: str, delimiter: str, token: str | None, most: int | None
    ) -> tuple[Page, str | None]:
        listed = self._bucket.client.list_blobs(
            self._bucket,
            prefix=prefix or None,
            delimiter=delimiter or None,
            page_token=token,
            max_results=most,
            timeout=self._timeout,
            retry=None,
        )
        objects: list[ObjectInfo] = []
        for page in listed.pages:
            objects += (ObjectInfo(blob.name, blob.size, str(blob.generation)) for blob in page)
            break
        return Page(tuple(objects), tuple(sorted(listed.prefixes))), listed.next_page_token

    def _head(self, key: str) -> Any:
        check_key(key)

        def look(_: int) -> Any:
            import google.api_core.exceptions as theirs

            blob = self._bucket.blob(key)
            try:
                blob.reload(timeout=self._timeout, retry=None)
            except theirs.NotFound:
                self._check_bucket()
                return None
            return blob

        return self._ask("looking at", key, look)

    def _put(self, key: str, data: bytes, metadata: dict[str, str], generation: int | None = None) -> str:
        blob = self._bucket.blob(key)
        if metadata:
            blob.metadata = metadata
        blob.upload_from_string(
            data,
            content_type="application/octet-stream",
            if_generation_match=generation,
            timeout=self._timeout,
            retry=None,
        )
        return str(blob.generation)

    def _conditional_put(self, doing: str, key: str, data: bytes, generation: int) -> str | None:
        check_key(key)
        token = uuid.uuid4().hex

        def put(tries: int) -> str | None:
            import google.api_core.exceptions as theirs

            try:
                return self._put(key, data, {_TOKEN: token}, generation)
            except theirs.PreconditionFailed:
                pass
            if tries:
                found = self._head(key)
                if found is not None and (found.metadata or {}).get(_TOKEN) == token:
                    return str(found.generation)
            return None

        return self._sending(doing, key, data, put)

    def _check_bucket(self) -> None:
        """Raises NotFound where it is the bucket that is not there: of objects, the answer is the same."""
        self._page("", "", None, 1)

    def _sending(self, doing: str, key: str, data: bytes, request: Callable[[int], _T]) -> _T:
        return self._ask_within(self._limits.attempt_seconds, doing, key, request, len(data))

    def _ask(self, doing: str, key: str, request: Callable[[int], _T]) -> _T:
        return self._ask_within(self._limits.attempt_seconds, doing, key, request)

    def _ask_within(
        self, seconds: float | None, doing: str, key: str, request: Callable[[int], _T], nbytes: int = 0
    ) -> _T:
        """The answer to `request`, sent until there is one; limits as in `repeated`."""
        where = f"{doing} {self.locate(key)} at {self.server}"
        return repeated(where, request, self._limits, _explain, seconds, nbytes)


def check_servers() -> str:
    """The server that metadata and tensors go to. Raises ConfigError where they would go to different ones."""
    metadata, tensors = (os.environ.get(name, "").rstrip("/") for name in (_EMULATOR, _TENSORSTORE_SERVER))
    if metadata != tensors:
        raise ConfigError(
            f"{_EMULATOR} is {without_secrets(metadata)!r} and {_TENSORSTORE_SERVER} is"
            f" {without_secrets(tensors)!r}: small files and tensors would go to different servers. Set both to"
            " the same URL, or none."
        )
    if metadata and "://" not in metadata:
        raise ConfigError(f"{_EMULATOR} is {metadata!r}: expected a URL, as http://{metadata}.")
    return metadata or GOOGLES_SERVER


def _client(concurrency: int) -> Any:
    """Google's client, which asks for credentials here and nothing else."""
    import google.auth.credentials
    import requests.adapters
    from google.cloud import storage

    emulator = os.environ.get(_EMULATOR)
    if emulator:
        anonymous = google.auth.credentials.AnonymousCredentials()
        client = storage.Client(
            project="emulator", credentials=anonymous, client_options={"api_endpoint": emulator.rstrip("/")}
        )
    else:
        client = storage.Client()
    adapter = requests.adapters.HTTPAdapter(pool_connections=4, pool_maxsize=concurrency + 2)
    for scheme in "https://", "http://":
        client._http.mount(scheme, adapter)
    return client


def _explain(error: Exception, what: str) -> Failure | None:
    import google.api_core.exceptions as api
    import google.auth.exceptions as auth
    import requests.exceptions as http
    from google.cloud.storage import exceptions as storage

    if isinstance(error, api.NotFound):
        return refusal(what, 404, "NoSuchBucket")
    if isinstance(error, api.GoogleAPICallError):
        said = next((found for found in error.errors or () if isinstance(found, dict)), {})
        return refusal(what, int(error.code or 0), str(said.get("reason", "")), str(said.get("message", "")))
    if isinstance(error, storage.DataCorruption):
        return Failure(
            refusal(what, 0, "", "the bytes that came do not match their checksum").error, passing=True
        )
    if isinstance(error, storage.InvalidResponse):
        return refusal(what, int(error.response.status_code), "")
    if isinstance(error, auth.DefaultCredentialsError):
        text = "there are no application default credentials"
        return Failure(explained(StoreCredentialsError, what, text))
    if isinstance(error, auth.TransportError):
        return unreachable(what, "no answer of the server that gives credentials")
    if isinstance(error, auth.GoogleAuthError):
        return Failure(explained(StoreCredentialsExpiredError, what, "the credentials cannot be renewed"))
    if isinstance(error, http.SSLError):
        return unreachable(what, f"no secure connection: {error}", passing=False)
    if isinstance(error, http.RequestException):
        return unreachable(what, f"no answer ({type(error).__name__})")
    return broken_connection(error, what)
