"""All processes react to a notice at one and the same step, whatever the order of what they do."""

from __future__ import annotations

import contextlib
import threading
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_ckpt.errors import CoordinationTimeoutError, PeerFailedError
from emergency_ckpt.jaxio.coordination import InMemoryCluster, SingleProcess
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.runtime.agreed_steps import AgreedSteps
from tests.runtime.unreliable import Unreliable

LIMIT = timedelta(seconds=20)
SAVE = Notice("request", "save", 1.0)
LEAVE = Notice("file", "terminate", 1.0, 60.0)


class Jobs:
    """Processes whose train loops ask about the same steps, each at its own pace; it waits where it is held."""

    def __init__(self, count: int, stride: int) -> None:
        self.cluster = InMemoryCluster(count)
        self.services = [Unreliable(self.cluster.coordinator(p)) for p in range(count)]
        self.parts = [AgreedSteps(service, LIMIT) for service in self.services]
        self.stride = stride
        self.asked = [0] * count  # how many questions
        self.reactions: list[list[int]] = [[] for _ in range(count)]

    def ask(self, process: int) -> None:
        part = self.parts[process]
        if part.holds:
            return
        self.asked[process] += 1
        step = self.asked[process] * self.stride
        if part.reached(step):
            self.reactions[process].append(step)
        assert part.reached(step) == (step in self.reactions[process]), "asking again gives the same answer"


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "look", "look", "post", "refused", "unanswered"]), st.integers(0, 3)
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), EVENTS)
def test_every_notice_is_reacted_to_once_at_one_step_by_all(
    count: int, stride: int, events: list[tuple[str, int]]
) -> None:
    """Also where requests to the coordination service fail, before they are done or with their answer."""
    jobs = Jobs(count, stride)
    posted_at: list[int] = []
    for what, process in events:
        process %= count
        if what == "post":
            posted_at.append(max(jobs.asked) * stride)
            with contextlib.suppress(PeerFailedError):
                jobs.parts[process].post(SAVE, None)
        elif what == "look":
            with contextlib.suppress(PeerFailedError):
                jobs.parts[process].look()
        elif what == "ask":
            jobs.ask(process)
        else:
            jobs.services[process].faults.append("refused" if what == "refused" else "unanswered")
    for service in jobs.services:
        service.faults.clear()
    for _ in range(4):  # To the end: all look until nobody is held, and go as far as the furthest.
        for _ in range(3):
            for part in jobs.parts:
                part.look()
        assert not any(part.holds for part in jobs.parts)
        while min(jobs.asked) < max(jobs.asked):
            jobs.ask(jobs.asked.index(min(jobs.asked)))
        for process in range(count):
            jobs.ask(process)
    assert all(found == jobs.reactions[0] for found in jobs.reactions)
    assert len(jobs.reactions[0]) <= len(posted_at)
    for step in posted_at:
        assert any(reaction > step for reaction in jobs.reactions[0]), "a reaction follows the notice"


def test_many_notices_leave_few_keys() -> None:
    jobs = Jobs(3, 1)
    for number in range(40):
        jobs.parts[number % 3].post(SAVE, None)
        for _ in range(2):
            for part in jobs.parts:
                part.look()
        for process in range(3):
            jobs.ask(process)
        if number == 20:
            keys = jobs.cluster.key_count()
    assert [len(found) for found in jobs.reactions] == [40, 40, 40]
    assert jobs.cluster.key_count() <= keys


def test_a_restore_of_an_older_step_does_not_put_the_reaction_off() -> None:
    jobs = Jobs(2, 1)
    for process in (0, 1):
        for _ in range(50):
            jobs.ask(process)
    jobs.parts[1].post(LEAVE, 1)
    for _ in range(2):
        for part in jobs.parts:
            part.look()
    for part in jobs.parts:
        part.begin_after(10)
        assert part.reached(11)
        assert [(found.process, found.notice) for found in part.notices] == [(1, LEAVE)]


def test_where_training_may_begin_anew_the_reaction_is_at_the_next_question_of_all() -> None:
    """A notice may stand from before, come while some are through with the call and others not, or after it."""
    for looks_before in range(3):
        jobs = Jobs(2, 1)
        for part in jobs.parts:
            part.begin_after(100)
        if looks_before:
            jobs.parts[1].post(LEAVE, 1)
            jobs.parts[1].look()  # It says that it is at step 100.
        if looks_before == 2:
            jobs.parts[0].look()
            jobs.parts[1].look()
        jobs.parts[0].may_begin_anew()
        if looks_before == 1:
            jobs.parts[0].look()
            jobs.parts[1].look()
        jobs.parts[1].may_begin_anew()
        if not looks_before:
            jobs.parts[1].post(LEAVE, 1)
            for _ in range(2):
                for part in jobs.parts:
                    part.look()
        assert [part.reached(1) for part in jobs.parts] == [True, True]
        assert [part.met for part in jobs.parts] == [1, 1]
        for part in jobs.parts:
            part.may_begin_anew()
        assert all(part.reached(1) for part in jobs.parts), "the same question has the same answer"
        assert not any(part.reached(2) for part in jobs.parts)


def test_a_loop_that_asks_while_the_step_is_being_agreed_on_waits_for_it() -> None:
    jobs = Jobs(2, 1)
    jobs.ask(0)
    jobs.parts[1].post(LEAVE, None)
    jobs.parts[0].look()
    assert jobs.parts[0].holds
    for _ in range(7):
        jobs.ask(1)  # That one has not looked yet, and gets ahead.
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(jobs.parts[0].reached(2)))
    waiting.start()
    for _ in range(2):
        jobs.parts[1].look()
        jobs.parts[0].look()
    waiting.join(20)
    assert answers == [False]
    jobs.asked[0] = 2
    while jobs.asked[0] < 8:
        jobs.ask(0)
    jobs.parts[1].look()
    jobs.ask(1)
    assert jobs.reactions == [[8], [8]]


def test_nobody_waits_for_a_process_that_says_nothing() -> None:
    cluster = InMemoryCluster(2)
    leader = AgreedSteps(cluster.coordinator(0), timedelta(0))
    other = AgreedSteps(cluster.coordinator(1), timedelta(seconds=-30))
    leader.post(LEAVE, 0)
    leader.look()
    assert not leader.reached(1)
    assert "processes [1] did not say" in leader.take_trouble()
    assert not leader.take_trouble()
    leader.post(SAVE, 0)
    other.look()
    with pytest.raises(CoordinationTimeoutError, match="process 0"):
        other.reached(1)


def test_nobody_waits_for_a_process_that_has_ended() -> None:
    jobs = Jobs(2, 1)
    jobs.parts[0].post(LEAVE, 0)
    jobs.parts[0].look()
    assert jobs.parts[0].holds
    jobs.parts[1].close()
    jobs.parts[0].look()
    assert not jobs.parts[0].reached(1)


def test_a_process_alone_reacts_at_its_next_step() -> None:
    part = AgreedSteps(SingleProcess(), LIMIT)
    assert not part.reached(4)
    part.post(SAVE, 0)
    assert part.reached(5)
    assert not part.reached(6)
    part.post(SAVE, 0)
    assert part.reached(9)


@pytest.mark.parametrize("leaving", [0, 1])
def test_who_could_not_say_that_it_leaves_says_so_at_its_next_look(leaving: int) -> None:
    jobs = Jobs(2, 1)
    other = jobs.parts[1 - leaving]
    jobs.services[leaving].faults.append("refused")
    with pytest.raises(PeerFailedError):
        jobs.parts[leaving].close()
    other.post(LEAVE, 1 - leaving)
    other.look()
    assert other.holds
    jobs.parts[leaving].look()
    other.look()
    assert not other.holds
    assert not other.reached(1)
    assert [part.take_trouble() for part in jobs.parts] == ["", ""]
