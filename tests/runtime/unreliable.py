"""A coordination service of which single requests fail: before they are done, or with their answer."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from emergency_ckpt.errors import PeerFailedError
from emergency_ckpt.jaxio.coordination import Coordinator

_T = TypeVar("_T")


class Unreliable:
    """A `Coordinator` over another one; each of `faults` is that of one request, or what it raises."""

    def __init__(self, inner: Coordinator) -> None:
        self._inner = inner
        self.faults: list[Literal["refused", "unanswered"] | Exception] = []

    @property
    def process_index(self) -> int:
        return self._inner.process_index

    @property
    def process_count(self) -> int:
        return self._inner.process_count

    def _do(self, request: Callable[..., _T], *args: Any) -> _T:
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        if fault == "refused":
            raise PeerFailedError("the request did not get there")
        answer = request(*args)
        if fault == "unanswered":
            raise PeerFailedError("the answer is lost")
        return answer

    def put(self, key: str, value: bytes) -> None:
        self._do(self._inner.put, key, value)

    def put_once(self, key: str, value: bytes) -> bytes:
        return self._do(self._inner.put_once, key, value)

    def get(self, key: str, timeout: datetime.timedelta) -> bytes:
        return self._do(self._inner.get, key, timeout)

    def try_get(self, key: str) -> bytes | None:
        return self._do(self._inner.try_get, key)

    def entries(self, prefix: str) -> dict[str, bytes]:
        return self._do(self._inner.entries, prefix)

    def increment(self, key: str) -> int:
        return self._do(self._inner.increment, key)

    def delete(self, prefix: str) -> None:
        self._do(self._inner.delete, prefix)
