"""A number in another type is the same number, or it is refused."""

from __future__ import annotations

import enum
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.conversion import as_array, converted
from emergency_ckpt.core.shards import dtype_of

DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint64", "float16", "float32", "float64"),
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn", "float6_e2m3fn"),
    *("int1", "uint1", "int2", "uint2", "int4", "uint4", "complex64", "complex128", "complex32", "bcomplex32"),
]
NUMBERS = st.one_of(
    st.booleans(),
    st.integers(-20, 20),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.floats(width=16),
    st.sampled_from([0.5, -1.5, 0.0, -0.0, math.nan, math.inf, 448.0]),
    st.complex_numbers(max_magnitude=4),
    st.integers(-8, 8).map(complex),
)


@given(NUMBERS, st.sampled_from(DTYPES))
def test_a_dtype_holds_the_very_number_or_nothing(number: Any, name: str) -> None:
    found = as_array(number, dtype_of(name))
    if found is not None:
        assert (found.dtype, found.shape) == (dtype_of(name), ())
        again = complex(found[()])
        assert repr(again) == repr(complex(number)).replace("-nan", "nan")
        assert number != number or found[()].item() == number


@given(st.sampled_from(DTYPES), st.binary(min_size=16, max_size=16))
def test_every_number_of_a_dtype_is_held_by_that_dtype(name: str, data: bytes) -> None:
    dtype = dtype_of(name)
    scalar = np.frombuffer(data, dtype)[0]
    if name in ("int1", "uint1", "int2", "uint2", "int4", "uint4", "bool", "float4_e2m1fn", "float6_e2m3fn"):
        scalar = scalar.item() and dtype.type(scalar.item())  # Their bytes have bits that mean nothing.
    found = as_array(scalar, dtype)
    assert found is not None
    assert repr(found[()].item()) == repr(np.asarray(scalar, dtype)[()].item())


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0.1, "float32"),
        (300, "int8"),
        (-1, "uint8"),
        (2, "bool"),
        (0.5, "int32"),
        (2**53 + 1, "float64"),
        (2**64, "uint64"),
        (math.nan, "int32"),
        (math.nan, "float4_e2m1fn"),
        (-0.0, "int8"),
        (0.0, "float8_e8m0fnu"),
        (1e300, "float32"),
        (1j, "float32"),
        (1j, "bfloat16"),
        (257, "bfloat16"),
        (8, "int4"),
        ("1", "int32"),
        (b"1", "int32"),
        (np.datetime64("2020"), "int64"),
        (np.zeros(1), "float64"),
    ],
)
def test_what_a_dtype_cannot_hold_is_refused(number: Any, name: str) -> None:
    assert as_array(number, dtype_of(name)) is None


@pytest.mark.parametrize(
    ("number", "name", "found"),
    [
        (0.1, "float32", np.float32(0.1)),
        (0.1, "bfloat16", 0.10009765625),
        (np.float32(0.1), "float16", np.float16(0.1)),
        (1e300, "float32", None),
        (-1.5, "float8_e8m0fnu", None),
        (2**53 + 1, "float64", None),
        (0.5, "int32", None),
        (b"x", "float32", None),
        (np.array(["x"]), "float32", None),
    ],
)
def test_only_floats_are_rounded_and_only_to_floats_in_reach(number: Any, name: str, found: Any) -> None:
    array = as_array(number, dtype_of(name), rounds=True)
    assert (None if array is None else float(array)) == (None if found is None else float(found))


class Phase(enum.IntEnum):
    COLD = 1
    WARM = 3


class Mode(enum.Enum):
    FAST = "fast"
    SLOW = b"slow"


class Flags(enum.Flag):
    A = 1
    B = 2


class Counted(int):
    pass


class Ratio(float):
    pass


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (5, 5),
        (np.int32(5), 5),
        (5.0, 5),
        (5, 5.0),
        (np.asarray(5, np.int8), 5),
        (True, 1),
        (1, True),
        (2 + 0j, 2),
        (5, np.int32(5)),
        (np.float32(0.5), ml_dtypes.bfloat16(0.5)),
        (7, np.uint64(7)),
        (7, np.longlong(7)),
        ("a", np.str_("a")),
        (np.str_("a"), "a"),
        (b"a", np.bytes_(b"a")),
        (3, Phase.WARM),
        (np.int8(3), Phase.WARM),
        ("fast", Mode.FAST),
        (b"slow", Mode.SLOW),
        (3, Flags.A | Flags.B),
        (3, Counted(3)),
        (np.float32(0.5), Ratio(0.5)),
        (np.datetime64("2020"), np.datetime64("2020")),
    ],
    ids=lambda v: f"{type(v).__name__}",
)
def test_what_is_the_same_comes_in_the_type_that_is_wanted(saved: Any, wanted: Any) -> None:
    found = converted(saved, type(wanted))
    assert (type(found), found) == (type(wanted), wanted)


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (0.5, int),
        (2**53 + 1, float),
        (-0.0, int),
        (math.nan, int),
        (math.inf, int),
        (1j, float),
        (2, bool),
        (np.float32(0.5), int),
    ],
)
def test_among_python_numbers_what_does_not_fit_stays_as_it_was_saved(saved: Any, wanted: type) -> None:
    found = converted(saved, wanted)
    assert (type(found), repr(found)) == (type(saved), repr(saved))


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        ("a", int),
        (1, str),
        (b"a", str),
        ("a", bytes),
        (0.5, np.int32),
        (2, Phase),
        ("slow", Mode),
        (0.5, Counted),
        (np.datetime64("2020"), int),
        (1, np.datetime64),
        (1, np.void),
        (1, np.ndarray),
        (np.zeros(2), float),
        (np.array(["a"]), str),
        pytest.param(1 << 40_000, np.float64, id="thousands of digits"),
    ],
)
def test_what_cannot_be_had_is_refused(saved: Any, wanted: type) -> None:
    with pytest.raises(ValueError, match=r"has no form as|it is no array|is not a valid"):
        converted(saved, wanted)


def test_an_array_is_given_as_a_copy() -> None:
    saved = np.array(["a"])
    converted(saved, np.ndarray)[:] = "b"
    assert saved.tolist() == ["a"]
