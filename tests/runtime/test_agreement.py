"""Whatever happens to one process, all of them get the same answer or an error that names it."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from emergency_ckpt.errors import CoordinationTimeoutError, LocalDirectoryError, PeerFailedError
from emergency_ckpt.jaxio.coordination import Coordinator, InMemoryCluster
from emergency_ckpt.runtime import agreement
from emergency_ckpt.runtime.agreement import agree, tell

LIMIT = timedelta(seconds=20)


def together(count: int, call: Callable[[Coordinator], Any], present: range | None = None) -> list[Any]:
    """What `call` gives, or raises, on every process of an in-memory cluster."""
    cluster = InMemoryCluster(count)
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(call, cluster.coordinator(p)) for p in present or range(count)]
        return [future.exception() or future.result() for future in futures]


def test_all_get_what_process_zero_decides() -> None:
    answers = together(3, lambda c: agree(c, "k", lambda: c.process_index * 10, sum, LIMIT))
    assert answers == [30, 30, 30]


def test_the_error_of_one_process_is_raised_there_and_named_elsewhere() -> None:
    def mine(coordinator: Coordinator) -> int:
        if coordinator.process_index == 2:
            raise LocalDirectoryError("no room in /local")
        return 1

    answers = together(4, lambda c: agree(c, "k", lambda: mine(c), sum, LIMIT))
    assert isinstance(answers[2], LocalDirectoryError)
    for process in (0, 1, 3):
        assert isinstance(answers[process], PeerFailedError)
        assert "process 2: no room in /local" in str(answers[process])


def test_an_error_while_deciding_reaches_all() -> None:
    def decide(values: list[int]) -> int:
        raise OSError("bucket gone")

    answers = together(3, lambda c: agree(c, "k", lambda: 1, decide, LIMIT))
    assert isinstance(answers[0], OSError)
    assert all("process 0: OSError: bucket gone" in str(answer) for answer in answers[1:])


def test_a_silent_process_is_named_to_all() -> None:
    limit = timedelta(seconds=0.2)
    answers = together(3, lambda c: agree(c, "k", lambda: 1, sum, limit), present=range(2))
    assert isinstance(answers[0], CoordinationTimeoutError)
    assert all("missing: [2]" in str(answer) for answer in answers)


@pytest.mark.parametrize("error", [None, LocalDirectoryError("read-only")])
def test_process_zero_tells_its_value_or_its_error(error: Exception | None) -> None:
    def make() -> str:
        if error:
            raise error
        return "run-1"

    answers = together(3, lambda c: tell(c, "k", make, LIMIT))
    if error is None:
        assert answers == ["run-1"] * 3
    else:
        assert answers[0] is error
        assert all(isinstance(answer, PeerFailedError) for answer in answers[1:])


@pytest.mark.parametrize(
    "call",
    [
        lambda coordinator, limit: agree(coordinator, "k", lambda: 1, sum, limit),
        lambda coordinator, limit: tell(coordinator, "k", lambda: 1, limit),
    ],
)
def test_a_silent_process_zero_is_named_by_all_others(
    call: Callable[[Coordinator, timedelta], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "_MARGIN", timedelta(0))
    answers = together(3, lambda c: call(c, timedelta(seconds=0.2)), present=range(1, 3))
    assert all(isinstance(answer, CoordinationTimeoutError) for answer in answers)
    assert all("from process 0, which did not send it" in str(answer) for answer in answers)
