"""Targets are judged by medians of the right figures; what was not measured is not judged."""

from __future__ import annotations

import pytest

from benchmarks.samples import Samples
from benchmarks.targets import (
    BARE,
    FETCH,
    FETCH_STREAMS,
    LENGTHENING,
    MEMCPY,
    ORBAX,
    OURS,
    TARGETS,
    fetch_measurement,
    judge,
)


def measured() -> Samples:
    """A job that reaches every target just so."""
    ours = {
        "save_sealed_seconds": [0.1, 0.1, 0.1],
        "first_save_sealed_seconds": [1.0],
        "restore_seconds": [0.2],
        "idle_call_seconds": [20e-6],
        LENGTHENING: [0.1],
        "save_blocked_seconds": [5e-3],
        "memory_growth_bytes": [4.0 * 1024 * 1024],
        "intact_fetched_bytes": [0.0],
        "slice_lost_fetched_beside_bytes": [0.0],
        "plan_seconds": [2.0],
        "plan_bytes": [1024.0 * 1024 * 1024],
    }
    names = [fetch_measurement(shards, streams) for shards in ("64 MiB", "100 kB") for streams in FETCH_STREAMS]
    fetched = {name: [0.5] for name in names}
    copied = {name: [0.4] for name in names}
    orbax = {
        "save_sealed_seconds": [0.1, 1.5, 9.0],
        "first_save_sealed_seconds": [2.0],
        "restore_seconds": [1.0],
        LENGTHENING: [0.5],
    }
    memcpy = {"copy_seconds": [0.06, 0.06, 0.06]}
    return Samples({OURS: ours, ORBAX: orbax, MEMCPY: memcpy, FETCH: fetched, BARE: copied})


def test_a_target_that_is_just_reached_is_reached() -> None:
    found = judge(measured())
    assert len(found) == len(TARGETS)
    assert [each.reached for each in found] == [True] * len(TARGETS)
    assert found[0].first is not None
    assert found[0].first.median == 2


@pytest.mark.parametrize(
    ("index", "measurement", "value"),
    [
        (0, "save_sealed_seconds", 0.101),
        (1, "save_sealed_seconds", 0.101),
        (2, "restore_seconds", 0.201),
        (3, "idle_call_seconds", 21e-6),
        (4, LENGTHENING, 0.101),
        (5, "save_blocked_seconds", 5.1e-3),
        (6, "memory_growth_bytes", 4.1 * 1024 * 1024),
        (7, "intact_fetched_bytes", 1.0),
        (8, "slice_lost_fetched_beside_bytes", 1.0),
        (-2, "plan_seconds", 2.1),
        (-1, "plan_bytes", 1025.0 * 1024 * 1024),
    ],
)
def test_a_target_that_is_just_missed_is_missed(index: int, measurement: str, value: float) -> None:
    samples = measured()
    samples.values[OURS][measurement] = [value] * 3
    assert judge(samples)[index].reached is False


def test_what_was_not_measured_is_not_judged() -> None:
    assert [each.reached for each in judge(Samples())] == [None] * len(TARGETS)
