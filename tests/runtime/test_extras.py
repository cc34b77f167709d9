"""Extras come back as they were, or are refused when they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.extras import ProcessExtras
from emergency_ckpt.errors import ExtrasError
from emergency_ckpt.runtime.extras import MAX_BYTES, SavedExtras, capture, deliver

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text().filter(lambda key: "__" not in key), inner),
    max_leaves=20,
)


def round_trip(extras: dict[str, Any]) -> dict[str, Any]:
    text = capture(extras, {})
    assert text is not None
    return deliver(SavedExtras(ProcessExtras.from_text(text), ""), None)


@given(st.dictionaries(st.text(), plain, min_size=1))
def test_plain_data_comes_back_as_it_was(extras: dict[str, Any]) -> None:
    assert round_trip(extras) == extras


@pytest.mark.parametrize("dtype", ["uint32", "float64", "bool", "complex64", "<i2"])
def test_arrays_keep_dtype_shape_and_content(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    found = round_trip({"rng": array})["rng"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    found[0] = 0  # It belongs to the caller.


def test_a_tuple_comes_back_as_a_list_and_numpy_scalars_as_numbers() -> None:
    assert round_trip({"a": (1, np.int64(2), np.float32(0.5))}) == {"a": [1, 2, 0.5]}


@pytest.mark.parametrize("value", [object(), {1: 2}, {"__bytes__": "x"}, np.array([object()]), {1, 2}])
def test_what_cannot_come_back_is_refused_when_it_is_given(value: Any) -> None:
    with pytest.raises(ExtrasError, match="data"):
        capture({"data": value}, {})


def test_no_extras_are_no_extras() -> None:
    assert capture(None, {}) is None
    assert capture({}, {}) is None
    assert deliver(SavedExtras(None, ""), {"plain data needs no object": 1}) == {}


def test_one_byte_too_much_is_too_much() -> None:
    frame = len(ProcessExtras({"a": ""}).to_text())
    assert capture({"a": "x" * (MAX_BYTES - frame)}, {})
    with pytest.raises(ExtrasError, match="the largest is 'a'"):
        capture({"a": "x" * (MAX_BYTES - frame + 1)}, {})


def test_why_extras_are_missing_is_said() -> None:
    class Target:
        def set_state(self, state: Any) -> None:
            raise AssertionError("nothing to set")

    with pytest.raises(ExtrasError, match="saved by 4 processes and this job has 2"):
        deliver(SavedExtras(None, "it was saved by 4 processes and this job has 2"), {"data": Target()})
