"""What processes learn of each other's notices, and of the key that JAX writes for a signal."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from emergency_ckpt.jaxio.preemption import PreemptionQuery, Told
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.runtime.job_notices import JobNotice, JobNotices

GRACE_SECONDS = 30.0


class Board:
    """A channel between simulated processes, with a key of JAX that tests write."""

    service_runs = True
    process_count = 3

    def __init__(self, process_index: int, told: list[tuple[int, bytes]]) -> None:
        self.process_index = process_index
        self.signalled: str | None = None
        self._told = told

    def announce(self, notice: bytes) -> str:
        self._told.append((self.process_index, notice))
        return "told"

    def told(self) -> Told:
        return Told(self.signalled, tuple(self._told))


def of_jax(moment: float) -> str:
    # With nanoseconds and a zone, as XLA writes it.
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+", "123+")


def test_every_process_knows_each_notice_once_with_the_process_that_heard_it() -> None:
    told: list[tuple[int, bytes]] = []
    first, second = (JobNotices(Board(index, told), GRACE_SECONDS) for index in (0, 1))
    spot = Notice("aws-spot", "terminate", 100.0, 220.0, "stop")
    first.announce(spot)
    assert second.look() == [JobNotice(0, spot)]
    second.announce(Notice("aws-spot", "terminate", 101.0, 220.0, "stop"))
    told.append((2, b"of a later version"))
    assert [notice.process for notice in first.look()] == [1], "the same words of another host"
    assert first.look() == second.look() == []
    assert [notice.process for notice in first.known] == [0, 1]
    assert first.known == second.known


def test_a_signal_that_jax_heard_is_a_notice_of_some_process() -> None:
    board = Board(0, [])
    notices, now = JobNotices(board, GRACE_SECONDS), time.time()
    assert notices.look() == []
    board.signalled = of_jax(now)
    (found,) = notices.look()
    assert (found.process, found.notice.source, found.notice.kind) == (None, "signal", "terminate")
    assert found.notice.received == pytest.approx(now, abs=1e-5)
    # JAX looks at the signal once a second.
    assert found.notice.deadline == pytest.approx(now + GRACE_SECONDS - 1, abs=1e-5)
    assert notices.look() == []

    # A later manager of this process hears it as long as it stands.
    later = Board(0, [])
    later.signalled = board.signalled
    assert len(JobNotices(later, GRACE_SECONDS).look()) == 1
    assert JobNotices(later, 0.0).look() == []

    odd = Board(0, [])
    odd.signalled = "noon"
    (found,) = JobNotices(odd, GRACE_SECONDS).look()
    assert found.notice.received >= now
    assert found.notice.detail.endswith("at noon")


def test_a_process_that_is_alone_keeps_few_notices() -> None:
    query = PreemptionQuery()
    notices = JobNotices(query, GRACE_SECONDS)
    for number in range(40):
        what = notices.announce(Notice("file", "terminate", float(number), None, str(number)))
        assert what == "this process reacts at its next step"
    assert query.reached(1)
    assert not query.reached(2)
    assert len(query.told().notices) == 16
    assert query.told().signalled is None
    assert len(notices.known) == 40
    assert notices.look() == []
