"""The in-memory forms of the channel between processes: for one process, and for many that are threads.

They behave as JAX's service does (one conformance suite drives all forms), and need no jax.
"""

from __future__ import annotations

import datetime
import threading

from emergency_ckpt.errors import CoordinationTimeoutError


class InMemoryCluster:
    """The store that `process_count` simulated processes share; each takes its own `coordinator(i)`."""

    def __init__(self, process_count: int) -> None:
        self._process_count = process_count
        self._changed = threading.Condition()
        self._values: dict[str, bytes] = {}

    def coordinator(self, process_index: int) -> InMemoryCoordinator:
        if not 0 <= process_index < self._process_count:
            raise ValueError(f"process {process_index} of a cluster of {self._process_count}")
        return InMemoryCoordinator(self, process_index, self._process_count)

    def key_count(self) -> int:
        """How many keys exist."""
        with self._changed:
            return len(self._values)

    def put(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[_normal(key)] = bytes(value)
            self._changed.notify_all()

    def put_once(self, key: str, value: bytes) -> bytes:
        with self._changed:
            stands = self._values.setdefault(_normal(key), bytes(value))
            self._changed.notify_all()
            return stands

    def get(self, key: str, timeout: datetime.timedelta) -> bytes | None:
        """The value of `key`, or None when it did not appear in time."""
        key = _normal(key)
        with self._changed:
            self._changed.wait_for(lambda: key in self._values, timeout.total_seconds())
            return self._values.get(key)

    def entries(self, prefix: str) -> dict[str, bytes]:
        beneath = _normal(prefix) + "/"
        with self._changed:
            return {k[len(beneath) :]: v for k, v in self._values.items() if k.startswith(beneath)}

    def increment(self, key: str) -> int:
        key = _normal(key)
        with self._changed:
            count = int(self._values.get(key, b"0")) + 1
            self._values[key] = str(count).encode()
            self._changed.notify_all()
            return count

    def delete(self, prefix: str) -> None:
        key = _normal(prefix)
        with self._changed:
            for found in [k for k in self._values if k == key or k.startswith(key + "/")]:
                del self._values[found]


class InMemoryCoordinator:
    """A `Coordinator` over a store in this process's memory."""

    def __init__(self, cluster: InMemoryCluster, process_index: int, process_count: int) -> None:
        self._cluster = cluster
        self._process_index = process_index
        self._process_count = process_count

    @property
    def process_index(self) -> int:
        return self._process_index

    @property
    def process_count(self) -> int:
        return self._process_count

    def put(self, key: str, value: bytes) -> None:
        self._cluster.put(key, value)

    def put_once(self, key: str, value: bytes) -> bytes:
        return self._cluster.put_once(key, value)

    def get(self, key: str, timeout: datetime.timedelta) -> bytes:
        value = self._cluster.get(key, timeout)
        if value is None:
            raise CoordinationTimeoutError(
                f"process {self.process_index} waited {timeout.total_seconds():g} s for {key!r}, "
                "which no process has written"
            )
        return value

    def try_get(self, key: str) -> bytes | None:
        return self._cluster.get(key, datetime.timedelta(0))

    def entries(self, prefix: str) -> dict[str, bytes]:
        return self._cluster.entries(prefix)

    def increment(self, key: str) -> int:
        return self._cluster.increment(key)

    def delete(self, prefix: str) -> None:
        self._cluster.delete(prefix)


class SingleProcess(InMemoryCoordinator):
    """The `Coordinator` of a job of one process: nobody to talk to, and the same code above it."""

    def __init__(self) -> None:
        super().__init__(InMemoryCluster(1), 0, 1)


def _normal(key: str) -> str:
    """Keys are paths as in JAX's service, which ignores empty components."""
    return "/".join(part for part in key.split("/") if part)
