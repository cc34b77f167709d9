"""What one process makes of the notices that it hears of, however often, and whatever fails meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Literal, cast

import pytest

from emergency_ckpt.agent.host_agent import HostAgent
from emergency_ckpt.jaxio.coordination import InMemoryCluster, SingleProcess
from emergency_ckpt.preemption.notice import Notice, new_id
from emergency_ckpt.runtime.agreed_steps import AgreedSteps
from emergency_ckpt.runtime.jax_signal import JaxSignal
from emergency_ckpt.runtime.notices import Notices
from emergency_ckpt.telemetry.log import CheckpointLogger, LogContext
from emergency_ckpt.telemetry.metrics import Metrics
from tests.runtime.unreliable import Unreliable

GRACE = timedelta(seconds=30)
NOW = 1.0e9


class Process:
    """A job of one process, whose coordination service may fail."""

    def __init__(self, jax: Callable[[], str | None] = lambda: None) -> None:
        self.service = Unreliable(SingleProcess())
        self.steps = AgreedSteps(self.service, timedelta(seconds=20))
        self.log = CheckpointLogger(LogContext(None, 1, 0, 0), Metrics())
        self.notices = Notices(None, GRACE)
        self.notices._jax = JaxSignal(GRACE.total_seconds(), jax)
        self.asked = 0

    def begin(self) -> None:
        self.notices.begin(self.steps, 0, None, None, self.log)

    def reacts(self) -> bool:
        self.asked += 1
        return self.steps.reached(self.asked)

    def wait_for_reaction(self) -> None:
        deadline = time.monotonic() + 20
        while not self.reacts():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_of_notices_with_the_same_words_each_is_met_once() -> None:
    process = Process()
    process.begin()
    wishes = [Notice("request", "save", NOW, id=new_id()) for _ in range(3)]
    for wish in wishes:
        process.notices.hear(wish)
        assert process.reacts()
        process.notices.hear(wish)  # From the next agent, say.
        assert not process.reacts()
    assert process.notices.heard == tuple(wishes)
    process.notices.close()


@pytest.mark.parametrize("fault", ["refused", "unanswered"])
@pytest.mark.parametrize("heard_by", ["jax", "agent"])
def test_a_notice_that_cannot_be_told_at_once_is_told_later(
    fault: Literal["refused", "unanswered"], heard_by: str
) -> None:
    said = datetime.now(UTC).isoformat()
    process = Process((lambda: said) if heard_by == "jax" else lambda: None)
    process.service.faults.append(fault)
    if heard_by == "agent":
        process.notices.hear(Notice("agent", "terminate", NOW, NOW + 60, id=new_id()))
    process.begin()
    process.wait_for_reaction()
    assert not process.reacts(), "once"
    assert [found.notice.source for found in process.steps.notices] == [
        "signal" if heard_by == "jax" else "agent"
    ]
    process.notices.close()


def test_whatever_fails_in_it_the_looking_thread_goes_on_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    process = Process()
    with caplog.at_level("INFO", logger="absl"):
        process.service.faults += [KeyError("1"), KeyError("1")]
        process.begin()
        deadline = time.monotonic() + 20
        while process.service.faults:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.notices.hear(Notice("request", "save", NOW, id=new_id()))
        process.wait_for_reaction()
        process.notices.close()
    assert caplog.text.count("is not known for now: KeyError: '1'") == 1


def test_a_request_that_hangs_does_not_keep_a_job_that_has_no_time() -> None:
    process = Process()
    released, over = threading.Event(), threading.Event()

    def hang(prefix: str) -> dict[str, bytes]:
        released.wait(30)
        over.set()
        return {}

    process.service.entries = hang
    process.begin()
    process.notices.close(timedelta(seconds=0.1))
    assert not over.is_set()
    released.set()


class HangingAgent:
    """Takes no notice before `goes_on`."""

    def __init__(self) -> None:
        self.asked, self.goes_on = threading.Event(), threading.Event()

    def hold_on(self, *, starts: bool) -> None: ...

    def pass_on(self, notice: Notice, process: int | None) -> None:
        self.asked.set()
        assert self.goes_on.wait(60)


def test_an_agent_that_hangs_does_not_hold_up_the_step_that_all_agree_on() -> None:
    cluster, agent = InMemoryCluster(2), HangingAgent()
    leader, other = (AgreedSteps(cluster.coordinator(process), timedelta(seconds=60)) for process in (0, 1))
    notices = Notices(None, GRACE)
    notices.begin(
        leader, 0, cast(HostAgent, agent), None, CheckpointLogger(LogContext(None, 1, 0, 0), Metrics())
    )
    try:
        other.post(Notice("file", "terminate", NOW, NOW + 60), 1)
        assert agent.asked.wait(20)
        deadline = time.monotonic() + 10
        while other.look() or other.holds:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert leader.reached(1)
        assert other.reached(1)
    finally:
        agent.goes_on.set()
        notices.close()


class Asking(logging.Handler):
    """Of the user: with each line it asks what was heard."""

    def __init__(self, notices: Notices) -> None:
        super().__init__()
        self._notices = notices

    def emit(self, record: logging.LogRecord) -> None:
        assert self._notices.heard == ()


def test_who_gets_lines_of_the_log_may_ask_what_was_heard() -> None:
    process = Process()
    process.begin()
    handler = Asking(process.notices)
    logging.getLogger("absl").addHandler(handler)
    try:
        saying = threading.Thread(target=process.notices._say, args=("a handler was replaced",), daemon=True)
        saying.start()
        saying.join(10)
        assert not saying.is_alive()
    finally:
        logging.getLogger("absl").removeHandler(handler)
    process.notices.close()
