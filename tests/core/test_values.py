"""Values come back with their type and their bits; damaged ones are refused."""

from __future__ import annotations

import enum
import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.values import MAX_VALUE_BYTES, Value, captured, values_from_json, values_to_json
from emergency_ckpt.errors import CorruptDataError, UnsupportedStateError

PLAIN = st.one_of(
    st.booleans(),
    st.integers(),
    st.integers(-(2**20000), 2**20000),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.text(st.characters(categories=["Cs", "L"])),
    st.binary(),
)


def through_json(value: Any) -> Any:
    text = json.dumps(values_to_json({"x": value}), allow_nan=False)
    return values_from_json(json.loads(text))["x"]


@given(st.dictionaries(st.text(), PLAIN))
def test_python_values_come_back_through_json(values: dict) -> None:
    found = values_from_json(json.loads(json.dumps(values_to_json(values), allow_nan=False)))
    assert {k: (type(v), repr(v) if type(v) is not int else v) for k, v in found.items()} == {
        k: (type(v), repr(v) if type(v) is not int else v) for k, v in values.items()
    }


def test_lone_surrogates_are_not_joined() -> None:
    assert through_json("\ud800\udc00") == "\ud800\udc00"
    assert through_json(np.str_("\ud800")) == "\ud800"


SCALARS = [
    *(np.dtype(name).type(1) for name in ("?", *"bBhHiIlLqQefdFD")),
    *(
        np.zeros((), kind)[()]
        for kind in vars(ml_dtypes).values()
        if isinstance(kind, type) and issubclass(kind, np.generic)
    ),
    np.float64(math.nan),
    np.float32(-0.0),
    np.frombuffer(b"\x01\x00\xc0\x7f", np.float32)[0],  # a NaN with a payload
    ml_dtypes.bfloat16(1.5),
    ml_dtypes.int4(-8),
    np.datetime64("2020-01-01T00:00:00.123456789"),
    np.datetime64("NaT"),
    np.timedelta64(-3, "25s"),
    np.str_("ab"),
    np.bytes_(b"ab"),
    np.array([(1, 2.5)], [("a", "<i4"), ("b", ">f8")])[0],
    np.void(b"abc"),
]


@pytest.mark.parametrize("value", SCALARS, ids=lambda v: f"{type(v).__name__} {v.dtype}")
def test_numpy_scalars_come_back_bit_for_bit(value: np.generic) -> None:
    found = through_json(value)
    assert found.dtype == value.dtype
    assert isinstance(found, np.generic)
    assert np.asarray(found).tobytes() == np.asarray(value).tobytes()


@pytest.mark.parametrize("value", [np.str_("a\0"), np.str_(""), np.bytes_(b"a\0\0"), np.bytes_(b"")])
def test_numpy_strings_keep_the_zeros_at_their_end(value: Any) -> None:
    found = through_json(value)
    assert (type(found), len(found), found) == (type(value), len(value), value)


NESTED = np.dtype([("x", "<i2", (2, 3)), ("y", [("z", "S3"), ("t", "M8[ns]")]), ("w", ml_dtypes.bfloat16)])

ARRAYS = [
    np.array(["2020-01-01", "NaT"], "M8[D]"),
    np.array([1, 2], "m8[ms]"),
    np.array([b"ab", b""]),
    np.array([["text", "\U0001f600"]]),
    np.array([1.5, -0.0], ">f4"),
    np.arange(4, dtype=">u2").reshape(2, 2),
    np.zeros(3, NESTED),
    np.zeros(2, np.dtype({"names": ["a", "b"], "formats": ["i1", "i8"], "offsets": [0, 8], "itemsize": 24})),
    np.zeros(2, "V7"),
    np.zeros(2, ml_dtypes.complex32),
    np.zeros((0, 3), "S4"),
    np.array("2020", "M8[Y]"),
    np.array(["2020-01-01", "2021-01-01"], "M8[D]")[::-1],
    np.asfortranarray(np.array([["a", "b"], ["c", "d"]])),
]


@pytest.mark.parametrize("value", ARRAYS, ids=lambda v: f"{v.dtype} {v.shape}")
def test_arrays_of_what_is_no_plain_number_come_back(value: np.ndarray) -> None:
    found = through_json(value)
    assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes())
    assert found.flags.writeable


class Phase(enum.IntEnum):
    WARM = 3


class Mode(enum.Enum):
    FAST = "fast"
    RAW = b"raw"
    ODD = ()


class Named(str):
    def __str__(self) -> str:
        return "something else"


class Counted(int):
    pass


@pytest.mark.parametrize(
    ("value", "plain"),
    [(Phase.WARM, 3), (Mode.FAST, "fast"), (Mode.RAW, b"raw"), (Named("a"), "a"), (Counted(4), 4)],
)
def test_members_of_enums_and_classes_of_the_user_are_kept_as_what_they_are_made_of(
    value: Any, plain: Any
) -> None:
    found = captured("x", value)
    assert (type(found), found) == (type(plain), plain)


def test_bytes_between_the_fields_of_a_structure_do_not_tell_replicas_apart() -> None:
    dtype = np.dtype({"names": ["a"], "formats": ["i1"], "offsets": [0], "itemsize": 8})
    arrays = [np.frombuffer(bytes([5, *[fill] * 7]), dtype) for fill in (0, 255)]
    for first, second in (arrays, [array[0] for array in arrays]):
        assert values_to_json({"x": first}) == values_to_json({"x": second})


def test_what_is_captured_does_not_change_with_its_owner() -> None:
    array, record = np.array(["a", "b"]), np.zeros(1, [("n", "i4")])
    held = captured("a", array), captured("r", record[0])
    array[:], record["n"] = "c", 7
    assert held[0].tolist() == ["a", "b"]  # type: ignore[union-attr]
    assert held[1].tolist() == (0,)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "value",
    [
        [1],
        None,
        object(),
        Mode.ODD,
        np.array([object()]),
        np.array(["a", "b"], np.dtypes.StringDType()),
        np.ma.masked_array(["a", "b"], [True, False]),
        np.zeros(1, [("a", "i4")]).view(np.recarray),
        np.zeros(2, [("a", "O")]),
        np.zeros(3, "V0"),
        np.longdouble(1),
        np.zeros(2, np.clongdouble),
        np.zeros(2, [("a", np.longdouble)]),
    ],
    ids=lambda v: f"{type(v).__name__} {getattr(v, 'dtype', '')}",
)
def test_what_has_no_form_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UnsupportedStateError, match=r"leaf 'opt\.x' is of type"):
        captured("opt.x", value)


@pytest.mark.parametrize(
    "value",
    [
        "x" * (MAX_VALUE_BYTES + 1),
        b"x" * (MAX_VALUE_BYTES + 1),
        1 << (8 * MAX_VALUE_BYTES + 1),
        np.zeros(MAX_VALUE_BYTES, "S2"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_is_too_large_for_metadata_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UnsupportedStateError, match=rf"leaf 'x'.*may have {MAX_VALUE_BYTES} bytes"):
        captured("x", value)


DAMAGED: list[Any] = [
    ["int", "3"],
    ["int", True],
    ["int", 1.0],
    ["bool", 1],
    ["float", 1],
    ["float", "00"],
    ["complex", [1.0]],
    ["list", []],
    ["str", 1],
    ["str", ["//8="]],
    ["bytes", "?"],
    ["numpy", ["object", "00"]],
    ["numpy", ["int32", "00"]],
    ["numpy", 3],
    ["numpy", ["i4,i4", "0000000000000000"]],
    ["numpy", ["<V0", ""]],
    ["array", ["|O8", [1], "AAAAAAAAAAA="]],
    ["array", ["<M8[D]", [-1], ""]],
    ["array", ["<M8[D]", [2**70], ""]],
    ["array", ["<M8[D]", [1.5], ""]],
    ["array", ["<M8[parsec]", [0], ""]],
    ["array", [{"fields": [["a", "int32", 0]], "itemsize": 2}, [0], ""]],
    ["array", [{"fields": [], "itemsize": 0}, [0], ""]],
    ["array", [{"base": "int32", "shape": [-1]}, [0], ""]],
    ["array", [{}, [0], ""]],
    ["array", ["S1", [0] * 65, ""]],
    7,
    None,
    ["int"],
    [["int"], 1],
]


@pytest.mark.parametrize("raw", DAMAGED, ids=str)
def test_what_is_not_a_value_is_refused(raw: object) -> None:
    with pytest.raises(CorruptDataError, match="'x'"):
        values_from_json({"x": raw})


@pytest.mark.parametrize("raw", [None, [], 3, "x"])
def test_what_is_no_table_of_values_is_refused(raw: object) -> None:
    with pytest.raises(CorruptDataError):
        values_from_json(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
KINDS = st.sampled_from(
    ["bool", "int", "float", "complex", "str", "bytes", "np.str", "np.bytes", "numpy", "array", "?"]
)


@given(st.tuples(KINDS, JSON))
def test_arbitrary_content_is_read_or_refused(raw: tuple[str, Any]) -> None:
    try:
        found: Value = values_from_json({"x": list(raw)})["x"]
    except CorruptDataError:
        return
    assert type(found) is type(captured("x", found))


def test_a_value_of_another_type_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedStateError, match="leaf 'x' is of type list"):
        values_to_json({"x": [1]})  # pyright: ignore[reportArgumentType]
