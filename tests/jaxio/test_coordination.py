"""One suite for all forms of the coordinator: the real service, memory shared by many, one process alone."""

from __future__ import annotations

import concurrent.futures
import itertools
import random
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import jax
import pytest
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

from emergency_ckpt.errors import CoordinationTimeoutError, PeerFailedError
from emergency_ckpt.jaxio.coordination import (
    Coordinator,
    InMemoryCluster,
    JaxCoordinator,
    SingleProcess,
    broadcast_from,
    collect,
    contribute,
    gather,
    namespaced,
    open_coordinator,
)

PROCESSES = 3
LONG = timedelta(seconds=60)  # for waits that must succeed
SHORT = timedelta(milliseconds=50)  # for waits that must fail

Job = list[Coordinator]
T = TypeVar("T")


@pytest.fixture(scope="module")
def service_clients() -> Iterator[list[Any]]:
    """JAX's real service and one real client per simulated process, all in this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    service = _jax.get_distributed_runtime_service(address, PROCESSES)
    clients = [_jax.get_distributed_runtime_client(address, i, init_timeout=60) for i in range(PROCESSES)]
    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(lambda client: client.connect(), clients))
        yield clients
        list(pool.map(lambda client: client.shutdown(), clients))
    service.shutdown()


_namespaces = itertools.count()


@pytest.fixture(params=["service", "memory", "single", "namespaced"])
def job(request: pytest.FixtureRequest) -> Job:
    """The coordinators of all processes of a job, with a key space of its own."""
    if request.param == "single":
        return [SingleProcess()]
    cluster = InMemoryCluster(PROCESSES)
    if request.param == "memory":
        return [cluster.coordinator(i) for i in range(PROCESSES)]
    if request.param == "namespaced":
        return [namespaced(cluster.coordinator(i), "a/b") for i in range(PROCESSES)]
    name = f"test/{next(_namespaces)}"
    clients = request.getfixturevalue("service_clients")
    return [namespaced(JaxCoordinator(c, i, PROCESSES), name) for i, c in enumerate(clients)]


def on_all(job: Job, work: Callable[[Coordinator], T]) -> list[T]:
    """Runs `work` for every process at once; the results in order of the processes."""
    with concurrent.futures.ThreadPoolExecutor(len(job)) as pool:
        return list(pool.map(work, job))


def test_processes_know_their_place(job: Job) -> None:
    assert [c.process_index for c in job] == list(range(len(job)))
    assert {c.process_count for c in job} == {len(job)}


@pytest.mark.parametrize(
    "value", [b"", b"\0\xff\n", bytes(range(256)) * 4096, random.Random(0).randbytes(5_000_001)], ids=len
)
def test_any_bytes_arrive_unchanged(job: Job, value: bytes) -> None:
    job[0].put("k", value)
    assert job[-1].get("k", LONG) == value
    assert job[-1].try_get("k") == value
    assert job[-1].put_once("k", b"other") == value


def test_put_replaces_what_stood(job: Job) -> None:
    job[0].put("k", b"old")
    job[-1].put("k", b"new")
    assert job[0].get("k", LONG) == b"new"


def test_put_once_has_one_winner_whom_all_see(job: Job) -> None:
    for round_ in range(20):
        stands = on_all(job, lambda c, r=round_: c.put_once(f"k/{r}", str(c.process_index).encode()))
        assert len(set(stands)) == 1
        assert job[0].get(f"k/{round_}", LONG) == stands[0]


def test_a_key_that_nobody_wrote_is_a_timeout_or_none(job: Job) -> None:
    assert job[-1].try_get("k") is None
    with pytest.raises(CoordinationTimeoutError, match=r"waited 0\.05 s for .*k"):
        job[-1].get("k", SHORT)


def test_a_key_that_exists_is_read_without_waiting_at_all(job: Job) -> None:
    job[0].put("k", b"v")
    assert job[-1].get("k", timedelta(0)) == b"v"


def test_a_waiting_process_wakes_when_the_key_is_written(job: Job) -> None:
    started = threading.Event()

    def wait() -> bytes:
        started.set()
        return job[-1].get("k", LONG)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        assert started.wait(60)
        job[0].put("k", b"v")
        assert waiting.result(60) == b"v"


def test_increments_from_all_processes_and_threads_are_each_counted_once(job: Job) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(lambda i: job[i % len(job)].increment("n"), range(200)))
    assert sorted(counts) == list(range(1, 201))
    assert job[0].get("n", LONG) == b"200"


def test_a_deleted_counter_begins_anew(job: Job) -> None:
    job[0].increment("n")
    job[0].delete("n")
    assert job[0].increment("n") == 1


def test_delete_takes_a_key_and_what_lies_beneath_but_no_neighbour(job: Job) -> None:
    for key in ("p/1", "p/1/x", "p/1/x/y", "p/10", "q"):
        job[0].put(key, b"v")
    job[-1].delete("p/1")
    assert {k for k in ("p/1", "p/1/x", "p/1/x/y", "p/10", "q") if job[0].try_get(k) is not None} == {
        "p/10",
        "q",
    }
    job[-1].delete("never written")


def test_entries_lists_what_lies_beneath_a_prefix(job: Job) -> None:
    for key in ("p/1", "p/2/x", "p", "pp/1"):
        job[0].put(key, key.encode())
    assert job[-1].entries("p") == {"1": b"p/1", "2/x": b"p/2/x"}
    assert job[-1].entries("p/") == job[-1].entries("p")
    assert job[-1].entries("nothing") == {}


def test_empty_components_of_a_key_do_not_count(job: Job) -> None:
    job[0].put("a//b/", b"v")
    assert job[0].get("a/b", LONG) == b"v"


def test_gather_collects_every_process_in_order(job: Job) -> None:
    gathered = on_all(job, lambda c: gather(c, "g", f"from {c.process_index}".encode(), LONG))
    assert gathered == [[f"from {i}".encode() for i in range(len(job))]] * len(job)


def test_one_process_collects_and_the_others_do_not_wait(job: Job) -> None:
    for coordinator in job:
        contribute(coordinator, "g", b"" if coordinator.process_index else b"zero")
    assert collect(job[0], "g", LONG) == [b"zero"] + [b""] * (len(job) - 1)


def test_a_broadcast_gives_all_the_value_of_the_source(job: Job) -> None:
    source = len(job) - 1
    got = on_all(
        job, lambda c: broadcast_from(c, "b", b"plan" if c.process_index == source else None, source, LONG)
    )
    assert got == [b"plan"] * len(job)


def test_the_source_of_a_broadcast_must_give_a_value(job: Job) -> None:
    with pytest.raises(ValueError, match="process 0 is the source of 'b' and gave no value"):
        broadcast_from(job[0], "b", None, 0, LONG)


@pytest.mark.parametrize("job", ["service", "memory", "namespaced"], indirect=True)
def test_errors_name_exactly_the_processes_that_are_missing(job: Job) -> None:
    contribute(job[1], "g", b"here")
    with pytest.raises(CoordinationTimeoutError, match=r"missing: \[0, 2\]"):
        collect(job[0], "g", SHORT)
    with pytest.raises(CoordinationTimeoutError, match="from process 2, which did not send it"):
        broadcast_from(job[0], "b", None, 2, SHORT)


def test_one_delete_removes_a_gather(job: Job) -> None:
    on_all(job, lambda c: gather(c, "g", b"v", LONG))
    job[0].delete("g")
    assert job[0].entries("g") == {}


def test_namespaces_do_not_see_each_other(job: Job) -> None:
    one, two = namespaced(job[0], "ckpt/1"), namespaced(job[0], "ckpt/10")
    one.put("k", b"one")
    two.put("k", b"two")
    assert one.increment("n") == two.increment("n") == 1
    assert (one.get("k", LONG), two.get("k", LONG)) == (b"one", b"two")
    one.delete("k")
    assert one.try_get("k") is None
    assert two.entries("") == {"k": b"two", "n": b"1"}


def test_a_job_of_one_process_needs_no_service() -> None:
    coordinator = open_coordinator()
    assert (coordinator.process_index, coordinator.process_count) == (0, 1)
    assert gather(coordinator, "g", b"v", LONG) == [b"v"]


def test_managers_of_one_process_have_separate_keys() -> None:
    first, second = open_coordinator(), open_coordinator()
    first.put("k", b"v")
    assert second.try_get("k") is None


class _GoneService:
    """What JAX's client does when the service does not answer: every call raises this error."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*_: object) -> None:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses\nmore")

        return call


@pytest.mark.parametrize(
    "operation",
    [
        lambda c: c.put("k", b""),
        lambda c: c.put_once("k", b""),
        lambda c: c.get("k", LONG),
        lambda c: c.try_get("k"),
        lambda c: c.entries("k"),
        lambda c: c.increment("k"),
        lambda c: c.delete("k"),
    ],
)
def test_a_service_that_is_gone_is_an_error_that_says_so(operation: Callable[[Coordinator], object]) -> None:
    with pytest.raises(PeerFailedError, match=r"process 1 could not use 'k' .* process 0: UNAVAILABLE: .*log"):
        operation(JaxCoordinator(_GoneService(), 1, 2))


def test_a_jax_without_counters_is_refused_at_once() -> None:
    with pytest.raises(PeerFailedError, match=r"install jax 0\.8 or newer"):
        JaxCoordinator(object(), 0, 2)
