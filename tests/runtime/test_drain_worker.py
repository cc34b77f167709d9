"""Drains of two processes whose store fails: tried again together, held together, not waited for in vain."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from emergency_ckpt.core.lineage import StepId
from tests.runtime.two_drains import SOON, Two, two_processes


@pytest.fixture
def two(ramdisk: Path, tmp_path: Path) -> Iterator[Two]:
    with two_processes(ramdisk, tmp_path) as both:
        yield both


def test_a_step_that_failed_is_committed_when_the_store_is_back_and_told_once(two: Two) -> None:
    with two.outage():
        two.fail(1)
        for process in two.processes:
            (error,) = process.worker.take_errors()
            assert "It is tried again" in str(error)
    for process in two.processes:
        assert process.worker.wait(SOON)
        assert process.worker.take_errors() == []
        assert (process.counted("drains_failed"), process.counted("drains_committed")) == (1, 1)
        assert process.counted("last_committed_step") == 1
    assert two.committed == [1]


def test_who_waits_alone_urges_the_committer_whose_pause_is_longer(two: Two) -> None:
    with two.outage():
        two.fail(1)
    assert two.processes[1].worker.wait(SOON)
    assert two.committed == [1]


def test_whoever_waits_in_an_outage_gets_one_try_and_no_more(two: Two) -> None:
    first, second = two.processes
    with two.outage():
        two.fail(1)
        for ended, waiting in enumerate((first, second, first), 2):
            assert waiting.worker.wait(SOON)
            for process in two.processes:
                assert process.worker.wait_for(ended, SOON)
                assert process.counted("drains_failed") == ended
    assert two.committed == []


def test_no_try_begins_while_drains_are_held_and_the_next_one_does_afterwards(two: Two) -> None:
    first, second = two.processes
    with two.outage():
        two.fail(1)
        assert (attempts := first.worker.hold(SOON)) == 2
        assert second.worker.wait_for(attempts, SOON)
    assert not second.worker.wait(timedelta(seconds=1)), "although it is urged"
    assert "step 1 (generation 1) waits for its next try, after 2 that failed" in second.worker.describe()
    assert first.counted("drains_failed") == second.counted("drains_failed") == 2
    first.worker.release()
    assert second.worker.wait(SOON)
    assert two.committed == [1]


def test_a_step_that_is_given_up_is_not_tried_again(two: Two) -> None:
    with two.outage():
        two.fail(1)
        for process in two.processes:
            process.worker.give_up("it is deleted", 1)
            assert not process.worker.busy
    for process in two.processes:
        assert process.worker.wait(SOON)
        assert process.counted("drains_superseded") == 1
        assert process.local.pin(StepId(1, 1)) is not None
    assert two.committed == []


def test_the_end_of_the_committer_ends_the_waiting_of_the_others(two: Two) -> None:
    first, second = two.processes
    with two.outage():
        two.fail(1)
        first.worker.close()
        assert second.worker.wait(SOON)
        assert not second.worker.busy


def test_a_step_that_is_complete_when_the_manager_has_ended_is_left_to_the_agents_and_no_error(
    two: Two,
) -> None:
    process = two.processes[0]
    process.worker.close()
    process.save_and_drain(5)
    assert process.worker.take_errors() == []
    assert not process.worker.busy


def test_a_step_whose_slot_was_needed_on_one_process_gives_way_to_a_newer_one_on_both(two: Two) -> None:
    first, second = two.processes
    with two.outage():
        two.fail(1)
        for process in two.processes:
            process.save(2)
        assert second.worker.make_room(), "it waits for its next try, and has a slot all the same"
        for number in (3, 4):
            second.save(number)  # Over step 1.
        for number in (3, 4):
            first.save(number)
        for process in two.processes:
            process.worker.take_errors()
    assert second.local.sealed(StepId(1, 1)) is None
    assert first.local.sealed(StepId(1, 1)) is not None
    assert first.worker.wait(SOON)
    assert second.worker.wait(SOON)
    assert two.committed == [4]
    assert [*first.worker.take_errors(), *second.worker.take_errors()] == []


def test_a_slot_that_is_lost_on_one_process_ends_the_tries_at_once_and_the_next_step_is_drained(
    two: Two,
) -> None:
    first, second = two.processes
    with two.outage():
        two.fail(1)
        assert second.worker.make_room()
        second.local.delete(1)
    assert first.worker.wait(SOON)
    assert second.worker.wait(SOON)
    assert not first.worker.busy
    assert "is not on this ramdisk any more" in str(second.worker.take_errors()[-1])
    two.save_and_drain(2)
    assert first.worker.wait(SOON)
    assert two.committed == [2]
