"""Leaves that are not arrays come back with their type and their bits; damaged ones are refused."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.errors import CorruptDataError, UnsupportedStateError
from emergency_ckpt.persistent.values import as_array, values_from_json, values_to_json

PLAIN = st.one_of(st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text())


@given(st.dictionaries(st.text(), PLAIN))
def test_python_values_come_back_through_json(values: dict) -> None:
    found = values_from_json(json.loads(json.dumps(values_to_json(values))))
    assert {k: (type(v), repr(v)) for k, v in found.items()} == {
        k: (type(v), repr(v)) for k, v in values.items()
    }


@pytest.mark.parametrize(
    "value",
    [
        np.float32(0.1),
        np.float64(math.nan),
        np.int8(-3),
        np.bool_(True),
        np.complex64(1 + 2j),
        ml_dtypes.bfloat16(1.5),
    ],
)
def test_numpy_scalars_come_back_bit_for_bit(value: np.generic) -> None:
    found = values_from_json(json.loads(json.dumps(values_to_json({"x": value}))))["x"]
    assert np.asarray(found).dtype == np.asarray(value).dtype
    assert np.asarray(found).tobytes() == np.asarray(value).tobytes()
    assert as_array("x", value).tobytes() == np.asarray(value).tobytes()


@pytest.mark.parametrize(
    "raw", [["int", "3"], ["list", []], ["numpy", ["object", "00"]], ["numpy", 3], 7, ["int"]]
)
def test_what_is_not_a_value_is_refused(raw: object) -> None:
    with pytest.raises(CorruptDataError):
        values_from_json({"x": raw})


def test_a_value_of_another_type_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedStateError, match="leaf 'x' is a list"):
        values_to_json({"x": [1]})  # pyright: ignore[reportArgumentType]
