"""Targets are judged by medians of the right figures; what was not measured is not judged."""

from __future__ import annotations

import pytest

from benchmarks.samples import Samples
from benchmarks.targets import LENGTHENING, MEMCPY, ORBAX, OURS, TARGETS, judge


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
    }
    orbax = {
        "save_sealed_seconds": [0.1, 1.5, 9.0],
        "first_save_sealed_seconds": [2.0],
        "restore_seconds": [1.0],
        LENGTHENING: [0.5],
    }
    return Samples({OURS: ours, ORBAX: orbax, MEMCPY: {"copy_seconds": [0.06, 0.06, 0.06]}})


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
    ],
)
def test_a_target_that_is_just_missed_is_missed(index: int, measurement: str, value: float) -> None:
    samples = measured()
    samples.values[OURS][measurement] = [value] * 3
    assert judge(samples)[index].reached is False


def test_what_was_not_measured_is_not_judged() -> None:
    assert [each.reached for each in judge(Samples())] == [None] * len(TARGETS)
