"""A process that does not answer is named within a time limit; whoever is back goes on with the others."""

from __future__ import annotations

import re
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.integration.processes import Job, run_job
from tests.integration.silent_job import LATE, fall_silent
from tests.integration.training_job import train

LIMIT = timedelta(seconds=180)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[list[str]]]:
    """Root, results and output of a job whose process 1 was silent in several ways, stopped twice at last."""
    root = tmp_path_factory.mktemp("silence")
    with Job(fall_silent, 2, str(root)) as running:
        running.wait_for_line(0, "step 6 ", LIMIT)

        def newest_complete(process: int) -> int:
            said = [re.match(r"step \d+ complete (\d+)", line) for line in running.lines(process)]
            return max((int(found[1]) for found in said if found), default=0)

        def wait_for_progress() -> None:
            before = newest_complete(0)
            running.wait_until(lambda: min(newest_complete(0), newest_complete(1)) > before, LIMIT)

        wait_for_progress()
        running.signal(LATE, signal.SIGSTOP)
        seen = len(running.lines(0))
        running.wait_until(lambda: len(running.lines(0)) > seen, LIMIT)
        running.signal(LATE, signal.SIGCONT)
        wait_for_progress()
        running.signal(LATE, signal.SIGSTOP)
        running.wait_for_line(0, "processes that had not reported: [1]", LIMIT)
        running.signal(LATE, signal.SIGCONT)
        wait_for_progress()
        running.signal(LATE, signal.SIGTERM)
        assert running.wait(LIMIT) == [0, 0], running.describe()
        return root, [running.result(p) for p in range(2)], [running.lines(p) for p in range(2)]


Ended = tuple[Path, list[dict[str, Any]], list[list[str]]]


@pytest.mark.parametrize("what", ["start", "first restore", "reload"])
def test_who_is_missing_is_named_on_both_sides_and_the_next_call_is_in_step(ended: Ended, what: str) -> None:
    waited, late = (result["told"][what] for result in ended[1])
    assert waited.startswith("CoordinationTimeoutError: process 0 waited 4 s")
    assert "missing: [1]" in waited
    assert late.startswith("PeerFailedError: process 0: process 0 waited 4 s")
    assert "missing: [1]" in late


@pytest.mark.parametrize("what", ["vain reload", "vain restore"])
def test_a_process_that_waits_in_vain_alone_takes_all_along(ended: Ended, what: str) -> None:
    other, alone = (result["told"][what] for result in ended[1])
    assert alone == "CoordinationTimeoutError: saves were still running after 16 s"
    assert other.startswith("PeerFailedError: process 1: saves were still running")


def test_a_stopped_process_costs_the_saves_that_it_missed_and_nothing_else(ended: Ended) -> None:
    first, second = ended[1]
    assert first["left_at"] == second["left_at"]
    assert first["complete"] == second["complete"] == first["left_at"]
    assert first["counters"]["saves_complete"] == second["counters"]["saves_complete"]
    assert first["counters"]["saves_abandoned"] >= 1
    ends = [r["counters"]["saves_abandoned"] + r["counters"]["saves_skipped"] for r in ended[1]]
    assert ends[0] == ends[1]


def test_one_slice_alone_goes_on_where_both_ended(ended: Ended) -> None:
    """The ramdisk of one slice is a whole job's: shards count, not the shape of the job that sealed them."""
    root, results, _ = ended
    (alone,) = run_job(train, 1, str(root), 1, results[0]["left_at"], {})
    assert (alone["start"], alone["source"]) == (results[0]["left_at"], "own slot")
