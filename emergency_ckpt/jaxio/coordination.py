"""The only channel for control between processes: a small key-value interface over JAX's coordination service.

No barrier and no device collective: their ids leak, and they tie all processes together. Every wait has a time
limit whose error names who is missing, and whoever writes a key says who deletes it.
"""

from __future__ import annotations

import datetime
import itertools
import threading
import time
from typing import Any, Protocol

import jax

from emergency_ckpt.errors import CoordinationTimeoutError, PeerFailedError
from emergency_ckpt.jaxio.ending import LONGEST_CALL_SECONDS, EndingClient
from emergency_ckpt.jaxio.memory_store import InMemoryCluster, InMemoryCoordinator, SingleProcess

__all__ = [
    "Coordinator",
    "InMemoryCluster",
    "InMemoryCoordinator",
    "JaxCoordinator",
    "SingleProcess",
    "broadcast_from",
    "collect",
    "contribute",
    "gather",
    "namespaced",
    "open_coordinator",
]


class Coordinator(Protocol):
    """Keys and values that all processes of the job see.

    Keys are paths: components joined by '/'. Values are bytes, up to several MiB. All operations may be called
    from any thread, beside each other, Orbax's and the user's own. PeerFailedError means that the service,
    which lives in process 0, cannot be reached.
    """

    @property
    def process_index(self) -> int: ...

    @property
    def process_count(self) -> int: ...

    def put(self, key: str, value: bytes) -> None:
        """Writes `key`, whatever stood there."""
        ...

    def put_once(self, key: str, value: bytes) -> bytes:
        """Writes `key` unless it exists; returns the value that stands, whoever wrote it."""
        ...

    def get(self, key: str, timeout: datetime.timedelta) -> bytes:
        """The value of `key`, waiting until it exists; raises CoordinationTimeoutError after `timeout`.

        Wait once and long rather than often and briefly: in JAX's service a wait that timed out takes some
        35 KB until the key is written. The wait does not notice Ctrl-C.
        """
        ...

    def try_get(self, key: str) -> bytes | None:
        """The value of `key` if it exists now."""
        ...

    def entries(self, prefix: str) -> dict[str, bytes]:
        """All that lies beneath `prefix` now, by the rest of the key, in one round trip."""
        ...

    def increment(self, key: str) -> int:
        """Adds one to the counter `key` (absent means 0) and returns the new count; atomic."""
        ...

    def delete(self, prefix: str) -> None:
        """Deletes the key `prefix` and all keys beneath it; what does not exist is fine."""
        ...


def open_coordinator() -> Coordinator:
    """The coordinator of a new manager: JAX's service where the job has several processes.

    All processes must construct their managers in the same order: the n-th call gets the same namespace
    everywhere, and two managers of one job never see each other's keys.
    Raises PeerFailedError when there are several processes and `jax.distributed` is not initialised.
    """
    name = f"ckpt/{next(_ordinals)}"
    if jax.process_count() == 1:
        return namespaced(SingleProcess(), name)
    return namespaced(JaxCoordinator(_service_client(), jax.process_index(), jax.process_count()), name)


def namespaced(coordinator: Coordinator, prefix: str) -> Coordinator:
    """The same channel with `prefix` before every key."""
    return _Namespaced(coordinator, prefix)


def gather(coordinator: Coordinator, key: str, value: bytes, timeout: datetime.timedelta) -> list[bytes]:
    """Every process's value, in order of their indices. Collective: all processes call it with one `key`.

    Each process reads all values; where one reader is enough, use `contribute` and `collect`. The key must
    not have been used before; delete it when all have read it.
    Raises CoordinationTimeoutError naming the processes that did not come.
    """
    contribute(coordinator, key, value)
    return collect(coordinator, key, timeout)


def contribute(coordinator: Coordinator, key: str, value: bytes) -> None:
    """Gives this process's value to whoever collects `key`. Every process calls it once."""
    coordinator.put(f"{key}/value/{coordinator.process_index}", value)
    # The last one opens the gate, so that a reader waits for one key and not for thousands.
    if coordinator.increment(f"{key}/count") == coordinator.process_count:
        coordinator.put(f"{key}/all", b"")


def collect(coordinator: Coordinator, key: str, timeout: datetime.timedelta) -> list[bytes]:
    """What every process contributed to `key`, in order of their indices. Any process, any number of them.

    Raises CoordinationTimeoutError naming the processes that did not contribute.
    """
    try:
        coordinator.get(f"{key}/all", timeout)
    except CoordinationTimeoutError as error:
        came = coordinator.entries(f"{key}/value")
        missing = [p for p in range(coordinator.process_count) if str(p) not in came]
        raise CoordinationTimeoutError(
            f"process {coordinator.process_index} waited {timeout.total_seconds():g} s for {key!r} from "
            f"{coordinator.process_count} processes; missing: {missing}. Look at the logs of those processes; "
            "if they are only slow, raise the time limit"
        ) from error
    values = coordinator.entries(f"{key}/value")
    return [values[str(p)] for p in range(coordinator.process_count)]


def broadcast_from(
    coordinator: Coordinator, key: str, value: bytes | None, source: int, timeout: datetime.timedelta
) -> bytes:
    """The value that process `source` gave. Every process that wants it calls, `source` included.

    `value` counts on the source only. The key must not have been used before; delete it when all have read it.
    Raises CoordinationTimeoutError naming the source when it did not come.
    """
    if coordinator.process_index == source:
        if value is None:
            raise ValueError(f"process {source} is the source of {key!r} and gave no value")
        coordinator.put(key, value)
        return value
    try:
        return coordinator.get(key, timeout)
    except CoordinationTimeoutError as error:
        raise CoordinationTimeoutError(
            f"process {coordinator.process_index} waited {timeout.total_seconds():g} s for {key!r} from "
            f"process {source}, which did not send it. Look at the log of process {source}; if it is only "
            "slow, raise the time limit"
        ) from error


class JaxCoordinator:
    """A `Coordinator` over the service that `jax.distributed.initialize` started in process 0.

    While that process is silent without being gone, calls wait until JAX's heartbeat limit ends this process
    (100 s unless set at `jax.distributed.initialize`).
    """

    def __init__(self, client: Any, process_index: int, process_count: int) -> None:
        """`client` is JAX's client of the service; the indices are those of `jax.process_index()`."""
        if not hasattr(client, "key_value_increment"):
            raise PeerFailedError(
                f"jax {jax.__version__} has no counters in its coordination service; install jax 0.8 or newer"
            )
        self._client = EndingClient(client)
        self._process_index = process_index
        self._process_count = process_count

    @property
    def process_index(self) -> int:
        return self._process_index

    @property
    def process_count(self) -> int:
        return self._process_count

    def put(self, key: str, value: bytes) -> None:
        try:
            self._client.key_value_set_bytes(key, value, True)
        except RuntimeError as error:
            raise self._unreachable(key, error) from error

    def put_once(self, key: str, value: bytes) -> bytes:
        for _ in range(_PUT_ONCE_TRIES):
            try:
                self._client.key_value_set_bytes(key, value, False)
                return value
            except RuntimeError as error:
                if not _has_status(error, "ALREADY_EXISTS"):
                    raise self._unreachable(key, error) from error
            stands = self.try_get(key)
            if stands is not None:
                return stands
        raise RuntimeError(
            f"{key!r} was deleted {_PUT_ONCE_TRIES} times while process {self.process_index} wrote it"
        )

    def get(self, key: str, timeout: datetime.timedelta) -> bytes:
        seconds = timeout.total_seconds()
        deadline = time.monotonic() + seconds
        if threading.current_thread() is not threading.main_thread():
            seconds = min(seconds, LONGEST_CALL_SECONDS)
        try:
            return self._client.blocking_key_value_get_bytes(key, max(1, round(seconds * 1000)))
        except RuntimeError as error:
            if not _has_status(error, "DEADLINE_EXCEEDED"):
                raise self._unreachable(key, error) from error
        # The service reports the deadline even for a key that exists when the limit is short. What a thread
        # waits for longer it asks for: the service would keep something for each wait that was cut.
        pause, longest = _FIRST_PAUSE_SECONDS, max(_LONGEST_PAUSE_SECONDS, self.process_count / _PER_SECOND)
        while (value := self.try_get(key)) is None:
            if (left := deadline - time.monotonic()) <= 0:
                raise CoordinationTimeoutError(
                    f"process {self.process_index} waited {timeout.total_seconds():g} s for {key!r}, "
                    "which no process has written"
                )
            time.sleep(min(pause, left))
            pause = min(2 * pause, longest)
        return value

    def try_get(self, key: str) -> bytes | None:
        try:
            return self._client.key_value_try_get_bytes(key)
        except RuntimeError as error:
            if _has_status(error, "NOT_FOUND"):
                return None
            raise self._unreachable(key, error) from error

    def entries(self, prefix: str) -> dict[str, bytes]:
        try:
            found = self._client.key_value_dir_get_bytes(prefix)
        except RuntimeError as error:
            raise self._unreachable(prefix, error) from error
        beneath = "/".join(part for part in prefix.split("/") if part) + "/"
        return {key[len(beneath) :]: value for key, value in found if key.startswith(beneath)}

    def increment(self, key: str) -> int:
        try:
            return self._client.key_value_increment(key, 1)
        except RuntimeError as error:
            raise self._unreachable(key, error) from error

    def delete(self, prefix: str) -> None:
        try:
            self._client.key_value_delete(prefix)
        except RuntimeError as error:
            raise self._unreachable(prefix, error) from error

    def _unreachable(self, key: str, error: RuntimeError) -> PeerFailedError:
        return PeerFailedError(
            f"process {self.process_index} could not use {key!r} in the coordination service of process 0: "
            f"{str(error).splitlines()[0]}. Process 0 may be gone: look at its log; the job has to be restarted"
        )


class _Namespaced:
    """A `Coordinator` that puts a prefix before every key of another one."""

    def __init__(self, inner: Coordinator, prefix: str) -> None:
        self._inner = inner
        self._prefix = prefix

    @property
    def process_index(self) -> int:
        return self._inner.process_index

    @property
    def process_count(self) -> int:
        return self._inner.process_count

    def put(self, key: str, value: bytes) -> None:
        self._inner.put(f"{self._prefix}/{key}", value)

    def put_once(self, key: str, value: bytes) -> bytes:
        return self._inner.put_once(f"{self._prefix}/{key}", value)

    def get(self, key: str, timeout: datetime.timedelta) -> bytes:
        return self._inner.get(f"{self._prefix}/{key}", timeout)

    def try_get(self, key: str) -> bytes | None:
        return self._inner.try_get(f"{self._prefix}/{key}")

    def entries(self, prefix: str) -> dict[str, bytes]:
        return self._inner.entries(f"{self._prefix}/{prefix}")

    def increment(self, key: str) -> int:
        return self._inner.increment(f"{self._prefix}/{key}")

    def delete(self, prefix: str) -> None:
        self._inner.delete(f"{self._prefix}/{prefix}")


_PUT_ONCE_TRIES = 8
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 1.0
_PER_SECOND = 1000  # requests that process 0 gets of all that wait
_ordinals = itertools.count()


def _service_client() -> Any:
    """JAX's client of the coordination service: the one place that reaches into jax's private modules."""
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise PeerFailedError(
            f"this job has {jax.process_count()} processes but no coordination service between them; "
            "call jax.distributed.initialize() before the first use of jax"
        )
    return client


def service_address() -> str | None:
    """`host:port` of the coordination service of process 0; None where there is none."""
    from jax._src import distributed

    return distributed.global_state.coordinator_address


def _has_status(error: RuntimeError, status: str) -> bool:
    """JAX reports the service's status code as the first word of the message."""
    return str(error).startswith(status)
