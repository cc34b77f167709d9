"""The operations of an object store, whichever it is: what the persistent tier may rely on, and nothing else.

Each operation ends within its limits, with a result or with a PersistentStoreError of `errors.py` that says
which situation it is. One that failed may have taken effect all the same, as requests do whose answer got lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How long an operation may take, and how often a request is repeated.

    Attributes:
      attempt_seconds: a request without an answer, or without progress, for this long is cut and repeated.
      total_seconds: an operation ends with an error after this time, its repetitions and pauses included.
      bytes_per_second: a put of many bytes gets that much more time, as if this were its speed.
      attempts: a request is sent at most this often.
      pause_seconds: shortest and longest mean pause before a repetition; each is drawn at random.
      concurrency: requests at a time of an operation that needs many.
    """

    attempt_seconds: float = 60.0
    total_seconds: float = 600.0
    bytes_per_second: float = 1024.0**2
    attempts: int = 10
    pause_seconds: tuple[float, float] = (0.1, 10.0)
    concurrency: int = 16

    @classmethod
    def of_stall(cls, seconds: float) -> Limits:
        """Limits of which all follow from one: how long nothing may move."""
        usual = cls()
        return cls(
            attempt_seconds=min(seconds, usual.attempt_seconds),
            total_seconds=min(10 * seconds, usual.total_seconds),
            pause_seconds=(usual.pause_seconds[0], min(max(seconds / 6, 0.1), usual.pause_seconds[1])),
        )

    def __post_init__(self) -> None:
        positive = (self.attempt_seconds, self.total_seconds, self.bytes_per_second, *self.pause_seconds)
        if min(*positive, self.attempts, self.concurrency) <= 0:
            raise ValueError(f"limits must be positive: {self}")


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class ObjectInfo:
    """What a store says of an object.

    Attributes:
      key: its whole key.
      size: in bytes.
      version: changes when the object is replaced by other bytes: the ETag on S3, the generation on GCS. On S3
        equal bytes have equal versions.
    """

    key: str
    size: int
    version: str


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing. `prefixes` end with the delimiter, and stand for all keys that begin with them."""

    objects: tuple[ObjectInfo, ...]
    prefixes: tuple[str, ...] = ()


class ObjectStore(Protocol):
    """One bucket, or one directory in that form. Thread-safe.

    Raises PersistentStoreError for keys that `urls.check_key` refuses, and for what the store refuses.
    """

    def locate(self, key: str = "") -> str:
        """The object's URL or path, for messages."""
        ...

    @property
    def server(self) -> str:
        """Where requests go, without secrets; empty for a file system."""
        ...

    def check(self, prefix: str = "") -> None:
        """Asks for one of the objects below `prefix`: raises the error that says why it cannot, if so.

        `prefix` as in `list_pages`: rights may be given below some prefixes only.
        """
        ...

    def list_pages(self, prefix: str = "", delimiter: str = "") -> Iterator[Page]:
        """All objects whose keys begin with `prefix`, page by page.

        With the delimiter "/", keys that have one behind the prefix are told as prefixes. A file system tells
        empty directories, too, and lists whole directories only: there `prefix` is empty or ends with "/".
        """
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """What the store says of an object, None if it is not there."""
        ...

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of an object from `start` to before `stop`, or to its end: fewer where it is shorter.

        Raises FileNotFoundError; CorruptDataError for what is no object but has such a name.
        """
        ...

    def put(self, key: str, data: bytes) -> str:
        """Makes or replaces an object; returns its version. Readers see the old object or the new one."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> str | None:
        """Makes an object unless one is there: of several callers exactly one gets a version, the others None.

        Whether a store holds to that tells `probe.probe_conditional_puts`.
        """
        ...

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> str | None:
        """Replaces an object if it has this version still; returns its new one.

        None: it has another version, or is gone. On a file system this holds among callers of this function,
        not against a plain `put`.
        """
        ...

    def delete(self, key: str) -> None:
        """Deletes an object; nothing happens if there is none."""
        ...

    def delete_many(self, keys: Iterable[str]) -> None:
        """Deletes objects, many at a time; nothing happens for those that are not there."""
        ...

    def kvstore(self, prefix: str = "") -> dict[str, Any]:
        """TensorStore's specification of all keys that begin with `prefix`, on the same server."""
        ...
