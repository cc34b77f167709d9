"""Numbers in lines are short and round correctly at the borders of their units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.telemetry.units import format_bytes, format_seconds


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024 * 1024 - 1, "1.0 MiB"),
        (512 * 1024**2, "512.0 MiB"),
        (3 * 1024**4 // 2, "1.5 TiB"),
        (5000 * 1024**5, "5000.0 PiB"),
    ],
)
def test_bytes_are_given_in_the_largest_unit_that_fits(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (1e-9, "0 ms"),
        (0.0004, "0.4 ms"),
        (0.000412, "0.41 ms"),
        (0.0099, "9.9 ms"),
        (0.081, "81 ms"),
        (0.9996, "1.00 s"),
        (2.5, "2.50 s"),
        (99.94, "99.9 s"),
        (187, "3 min 7 s"),
        (3599.9, "1 h 0 min"),
        (7260, "2 h 1 min"),
    ],
)
def test_durations_are_given_in_the_unit_a_person_would_use(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.integers(0, 1024**6))
def test_bytes_never_show_1024_of_a_unit_that_has_a_larger_one(nbytes: int) -> None:
    number, unit = format_bytes(nbytes).split()
    assert float(number) < 1024 or unit == "PiB"


@given(st.floats(0, 1e6))
def test_durations_are_never_longer_than_twelve_characters(seconds: float) -> None:
    assert len(format_seconds(seconds)) <= 12
