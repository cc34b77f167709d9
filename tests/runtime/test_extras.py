"""Extras come back as they were, or are refused when they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.extras import ProcessExtras
from emergency_ckpt.errors import ExtrasError
from emergency_ckpt.runtime.declared_extras import GlobalExtras, ReshardedExtras
from emergency_ckpt.runtime.extras import MAX_BYTES, SavedExtras, WantedExtras, capture, convert


def deliver(saved: SavedExtras, targets: dict[str, Any] | None) -> dict[str, Any]:
    return WantedExtras(targets or {}).deliver(saved)


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


class Kept:
    """Something with a state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def get_state(self) -> Any:
        return self.state

    def set_state(self, state: Any) -> None:
        self.state = state


def saved_by(count: int, **values: Any) -> dict[int, ProcessExtras]:
    """What each of so many processes saved: every value with its process number, but for declared ones."""
    saved = {}
    for process in range(count):
        given = {n: v if isinstance(v, GlobalExtras) else [v, process] for n, v in values.items()}
        text = capture(given, {})
        assert text is not None
        saved[process] = ProcessExtras.from_text(text)
    return saved


def all_states(states: list[Any], process: int, count: int) -> Any:
    return {"states": states, "process": process, "count": count}


def test_declarations_change_nothing_for_the_same_number_of_processes() -> None:
    def never(states: list[Any], process: int, count: int) -> Any:
        raise AssertionError("there is nothing to reshard")

    text = capture({"a": ReshardedExtras(Kept(5), never), "b": GlobalExtras(Kept("x"))}, {})
    assert text is not None
    a, b = Kept(), Kept()
    found = deliver(
        SavedExtras(ProcessExtras.from_text(text), ""), {"a": ReshardedExtras(a, never), "b": GlobalExtras(b)}
    )
    assert (found, a.state, b.state) == ({"a": 5, "b": "x"}, 5, "x")


def test_what_is_global_is_had_from_any_one_process() -> None:
    saved = saved_by(4, schedule=GlobalExtras({"rate": b"\x01"}), data="d")
    made = convert({}, {2: saved[2]}, 4, 1, 2)
    assert made is not None
    again = ProcessExtras.from_text(made.to_text())
    assert (again, again.same_everywhere) == (made, {"schedule"})
    assert deliver(SavedExtras(made, "of others", is_converted=True), None) == {"schedule": {"rate": b"\x01"}}
    with pytest.raises(ExtrasError, match="'data' are wanted, but they are of others"):
        deliver(SavedExtras(made, "they are of others", is_converted=True), {"data": Kept()})


def test_resharding_gets_all_states_in_order_and_its_own_place() -> None:
    made = convert({"data": ReshardedExtras(Kept(), all_states)}, saved_by(3, data=np.arange(2)), 3, 1, 2)
    assert made is not None
    found = deliver(SavedExtras(made, "", is_converted=True), {"data": ReshardedExtras(None, all_states)})
    assert (found["data"]["process"], found["data"]["count"]) == (1, 2)
    assert [[list(array), p] for array, p in found["data"]["states"]] == [[[0, 1], p] for p in range(3)]


def test_missing_states_are_named_by_their_owners() -> None:
    saved = saved_by(6, data=1)
    target = {"data": ReshardedExtras(None, all_states)}
    with pytest.raises(ExtrasError, match="saved by 6 processes, and those of processes 1, 4 are on no"):
        convert(target, {p: saved[p] for p in (0, 2, 3, 5)}, 6, 0, 2)
    with pytest.raises(ExtrasError, match="processes 0, 1, 2"):
        convert(target, {}, 3, 0, 2)
    assert convert(target, saved_by(3, other=1), 3, 0, 2) is None


def test_a_failing_reshard_function_is_named_with_its_error() -> None:
    def fail(states: list[Any], process: int, count: int) -> Any:
        raise LookupError("no such record")

    with pytest.raises(ExtrasError, match=r"'data' failed for process 1 of 2 .* LookupError: no such record"):
        convert({"data": ReshardedExtras(None, fail)}, saved_by(3, data=1), 3, 1, 2)


def test_what_resharding_makes_is_bounded_and_plain() -> None:
    saved = saved_by(3, data=1)
    with pytest.raises(ExtrasError, match="at most 1048576 are allowed"):
        convert({"data": ReshardedExtras(None, lambda *_: "x" * MAX_BYTES)}, saved, 3, 0, 2)
    with pytest.raises(ExtrasError, match="of type object, which cannot be saved"):
        convert({"data": ReshardedExtras(None, lambda *_: object())}, saved, 3, 0, 2)


def test_declarations_that_make_no_sense_are_refused() -> None:
    with pytest.raises(TypeError, match="declared a second time"):
        GlobalExtras(GlobalExtras(1))
    with pytest.raises(TypeError, match="expected a function"):
        ReshardedExtras(1, "fold")  # type: ignore[arg-type]
