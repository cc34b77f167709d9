"""Decisions of process 0: the same on all processes, made once, and no key stays behind."""

from __future__ import annotations

import concurrent.futures
from datetime import timedelta

import pytest

from emergency_ckpt.core.schedule import Due
from emergency_ckpt.errors import CoordinationTimeoutError, PeerFailedError
from emergency_ckpt.jaxio.coordination import InMemoryCluster
from emergency_ckpt.runtime.decisions import CHUNK_STEPS, ToldDecisions

LIMIT = timedelta(seconds=20)


def decisions_of(cluster: InMemoryCluster, process: int, limit: timedelta = LIMIT) -> ToldDecisions:
    return ToldDecisions(cluster.coordinator(process), 3, limit)


def refuse() -> Due:
    raise AssertionError("only process 0 decides, and only once")


def test_all_processes_do_what_process_zero_decided_and_ask_once_per_step() -> None:
    cluster = InMemoryCluster(3)
    wanted = [Due(step % 2 == 0, step % 3 == 0, "policy") for step in range(12)]

    def run(process: int) -> list[Due]:
        told = decisions_of(cluster, process)
        found = []
        for step in range(12):
            made = (lambda s=step: wanted[s]) if process == 0 else refuse
            found.append(told.of(step, made))
            assert told.of(step, refuse) == found[-1], "save() after should_save() hears the same"
        return found

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == [wanted] * 3


def test_keys_do_not_pile_up_however_far_process_zero_runs_ahead() -> None:
    cluster = InMemoryCluster(2)
    steps = range(0, 10 * CHUNK_STEPS, 5)
    leader, follower = (decisions_of(cluster, process) for process in range(2))
    for step in steps:
        leader.of(step, lambda: Due(True, False, "policy"))
    # The other one has not read a single decision, so none was deleted.
    assert cluster.key_count() >= len(steps)
    assert all(follower.of(step, refuse).local for step in steps)
    assert cluster.key_count() <= 2 * CHUNK_STEPS / 5
    leader.forget_generation()
    assert cluster.key_count() == 0


def test_a_policy_that_raises_is_an_error_everywhere_and_stays_one() -> None:
    cluster = InMemoryCluster(2)
    leader, follower = (decisions_of(cluster, process) for process in range(2))

    def fail() -> Due:
        raise ZeroDivisionError("by the policy")

    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="by the policy"):
            leader.of(7, fail)
        with pytest.raises(PeerFailedError, match="process 0: ZeroDivisionError: by the policy"):
            follower.of(7, refuse)
    assert leader.of(8, lambda: Due(reason="policy")) == follower.of(8, refuse)


def test_a_silent_process_zero_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emergency_ckpt.runtime.agreement._MARGIN", timedelta(0))
    cluster = InMemoryCluster(2)
    follower = decisions_of(cluster, 1, timedelta(milliseconds=20))
    with pytest.raises(CoordinationTimeoutError, match="from process 0, which did not send it"):
        follower.of(1, refuse)
    decisions_of(cluster, 0).of(1, lambda: Due(True, False, "policy"))
    assert follower.of(1, refuse).local, "an answer that comes late still counts"
