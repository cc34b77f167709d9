"""Hydration that begins before a restore is called: it costs nobody anything, and the restore goes on from it.

Real processes, agents and sockets; what is restored is compared in each process, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from tests.conftest import fresh_ramdisk
from tests.integration.early_job import LOST, SLICES, live_early
from tests.integration.processes import run_job

Told = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    names = [
        "nothing lost",
        "a ramdisk lost",
        "a shard lost",
        "all lost",
        "an older step",
        "reload",
        "never restores",
        "closes",
        "a source lost",
        "the only source lost",
    ]
    with fresh_ramdisk() as root:
        answers = run_job(
            live_early, SLICES, str(root), names, devices_per_process=2, limit=timedelta(seconds=180)
        )
        yield {name: [answer[name] for answer in answers] for name in names}


def test_where_nothing_is_lost_nothing_is_begun(told: Told) -> None:
    for said in told["nothing lost"]:
        assert not said["thread"]
        assert said["fetched_bytes"] == said["early_bytes"] == 0


def test_what_a_lost_ramdisk_held_is_there_when_the_restore_is_called(told: Told) -> None:
    for process, said in enumerate(told["a ramdisk lost"]):
        assert said["begun"] == (process == LOST)
        wanted = said["restored_bytes"] if process == LOST else 0
        assert said["early_bytes"] == said["ready"] == said["fetched_bytes"] == wanted
        assert len(said["slots"]) >= 1
        assert not said["unsettled"]
        assert not said["threads"]


def test_a_single_shard_is_fetched_into_its_place_early(told: Told) -> None:
    said = told["a shard lost"]
    assert said[1]["begun"]
    assert 0 < said[1]["early_bytes"] == said[1]["fetched_bytes"] < said[1]["restored_bytes"]
    assert not said[0]["begun"]


def test_the_persistent_tier_is_read_early_and_its_extras_come_with_the_restore(told: Told) -> None:
    assert all(said["early_bytes"] == said["ready"] == said["restored_bytes"] > 0 for said in told["all lost"])


def test_another_step_than_the_planned_one_is_restored_as_ever(told: Told) -> None:
    for said in told["an older step"]:
        assert not said["unsettled"]
        assert not said["threads"]
        assert said["restores"] == 2
        assert said["early_bytes"] == 0


def test_a_reload_begins_anew(told: Told) -> None:
    for process, said in enumerate(told["reload"]):
        assert (said["early_bytes"] > 0) == (process == LOST)
        assert not said["threads"]


def test_a_save_without_a_restore_gets_the_slot_at_once_although_a_source_stands_still(told: Told) -> None:
    said = told["never restores"]
    assert said[LOST]["running"]
    assert not said[LOST]["thread"]
    for each in said:
        assert each["complete"] == 16
        assert not each["unsettled"]
        assert each["saves_skipped"] == 0


def test_a_close_ends_the_early_work_although_a_source_stands_still(told: Told) -> None:
    for said in told["closes"]:
        assert not said["thread"]
        assert not said["threads"]


def test_the_restore_takes_from_elsewhere_what_a_source_that_died_early_did_not_give(told: Told) -> None:
    said = told["a source lost"][LOST]
    assert 0 < said["ready"] < said["restored_bytes"]
    assert said["fetched_bytes"] == said["restored_bytes"], "what had come is not fetched again"


def test_a_broadcast_in_place_of_the_only_source_is_in_a_slot_before_the_first_step(told: Told) -> None:
    for said in told["the only source lost"]:
        assert "step 14 (generation 1)" in said["slots"]
        assert not said["unsettled"]
