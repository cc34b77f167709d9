"""Boxes against brute force: a box is the set of elements that its slices select in a numpy array."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.shards import Box, Shard, block_ranges, covers, dtype_of

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
filled_shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    bounds = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


def mask(boxes: Sequence[Box], shape: tuple[int, ...]) -> np.ndarray:
    """Which elements of an array of this shape lie in any of the boxes."""
    found = np.zeros(shape, bool)
    for box in boxes:
        found[box.slices()] = True
    return found


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), boxes_in(shape))))
def test_a_box_selects_as_many_elements_as_it_says(case: tuple[tuple[int, ...], Box]) -> None:
    shape, box = case
    selected = np.zeros(shape)[box.slices()]
    assert selected.shape == box.shape
    assert selected.size == box.size
    assert Box.whole(shape).contains(box)


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), boxes_in(shape), boxes_in(shape))))
def test_the_intersection_is_what_both_boxes_select(case: tuple[tuple[int, ...], Box, Box]) -> None:
    shape, one, other = case
    common = one.intersect(other)
    both = mask([one], shape) & mask([other], shape)
    assert (common is None) == (not both.any())
    assert common == other.intersect(one)
    if common is not None:
        assert (mask([common], shape) == both).all()
        assert one.contains(common)
        assert other.contains(common)


@given(filled_shapes.flatmap(lambda shape: st.tuples(st.just(shape), boxes_in(shape), boxes_in(shape))))
def test_a_box_contains_another_when_it_selects_all_of_it(case: tuple[tuple[int, ...], Box, Box]) -> None:
    shape, outer, inner = case
    within = not (mask([inner], shape) & ~mask([outer], shape)).any()
    if inner.size:
        assert outer.contains(inner) == within
    if outer.contains(inner):
        moved = inner.relative_to(outer)
        numbers = np.arange(math.prod(shape)).reshape(shape)
        assert (numbers[outer.slices()][moved.slices()] == numbers[inner.slices()]).all()
    else:
        with pytest.raises(ValueError, match="does not lie within"):
            inner.relative_to(outer)


@given(
    shapes.flatmap(
        lambda shape: st.tuples(st.just(shape), boxes_in(shape), st.lists(boxes_in(shape), max_size=8))
    )
)
def test_boxes_cover_a_box_when_together_they_select_all_of_it(
    case: tuple[tuple[int, ...], Box, list[Box]],
) -> None:
    shape, wanted, boxes = case
    missing = mask([wanted], shape) & ~mask(boxes, shape)
    assert covers(boxes, wanted) == (not missing.any())


@given(filled_shapes, st.data())
def test_the_parts_of_a_partition_cover_and_all_but_one_do_not(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    parts = [Box.whole(shape)]
    for _ in range(data.draw(st.integers(0, 6))):
        i = data.draw(st.integers(0, len(parts) - 1))
        splittable = [axis for axis, n in enumerate(parts[i].shape) if n > 1]
        if not splittable:
            continue
        box, axis = parts.pop(i), data.draw(st.sampled_from(splittable))
        at = data.draw(st.integers(box.start[axis] + 1, box.stop[axis] - 1))
        parts.append(Box(box.start, (*box.stop[:axis], at, *box.stop[axis + 1 :])))
        parts.append(Box((*box.start[:axis], at, *box.start[axis + 1 :]), box.stop))
    parts = data.draw(st.permutations(parts))
    assert covers(parts, Box.whole(shape))
    assert not covers(parts[1:], Box.whole(shape))


def test_a_scalar_is_covered_by_its_only_box() -> None:
    scalar = Box((), ())
    assert scalar.size == 1
    assert covers([scalar], scalar)
    assert not covers([], scalar)
    assert scalar.intersect(scalar) == scalar


def test_nothing_is_needed_to_cover_a_box_without_elements() -> None:
    assert covers([], Box((0, 2), (4, 2)))


bounds = st.one_of(st.none(), st.integers(-9, 9))


@given(shapes, st.data())
def test_slices_and_the_box_made_of_them_select_the_same(shape: tuple[int, ...], data: st.DataObject) -> None:
    index = tuple(slice(data.draw(bounds), data.draw(bounds)) for _ in shape)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    box = Box.from_slices(index, shape)
    assert Box.whole(shape).contains(box)
    assert np.array_equal(numbers[index], numbers[box.slices()])
    assert Box.from_slices(box.slices(), shape) == box


def test_slices_that_skip_elements_name_no_box() -> None:
    with pytest.raises(ValueError, match="unit-step"):
        Box.from_slices((slice(0, 4, 2),), (4,))


@pytest.mark.parametrize(("start", "stop"), [((0,), ()), ((2,), (1,)), ((-1,), (1,))])
def test_bounds_that_are_no_box_are_refused(start: tuple[int, ...], stop: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="box"):
        Box(start, stop)


def test_different_shards_have_different_names() -> None:
    shards = [
        Shard("w", Box((0,), (4,))),
        Shard("w", Box((0,), (44,))),
        Shard("w", Box((), ())),
        Shard("v", Box((), ())),
    ]
    assert len({str(shard) for shard in shards}) == len(shards)


@given(st.integers(0, 1000), st.integers(1, 64))
def test_blocks_follow_each_other_and_only_the_last_is_shorter(nbytes: int, block_bytes: int) -> None:
    ranges = block_ranges(nbytes, block_bytes)
    assert [at for at, _ in ranges] == list(range(0, nbytes, block_bytes))
    assert sum(length for _, length in ranges) == nbytes
    assert all(length == block_bytes for _, length in ranges[:-1])
    assert all(0 < length <= block_bytes for _, length in ranges)


@pytest.mark.parametrize(
    ("name", "itemsize"),
    [
        ("float32", 4),
        ("bfloat16", 2),
        ("bool", 1),
        ("complex64", 8),
        ("float8_e4m3fn", 1),
        ("int4", 1),
        ("uint2", 1),
    ],
)
def test_every_dtype_name_gives_its_dtype(name: str, itemsize: int) -> None:
    assert dtype_of(name).itemsize == itemsize
    assert dtype_of(name).name == name


def test_dtype_names_of_ml_dtypes_give_its_types() -> None:
    assert dtype_of("bfloat16") == np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", ["object", "O", "no such type", "V0", "U0", "finfo", "__name__", ""])
def test_names_of_no_fixed_size_dtype_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="dtype"):
        dtype_of(name)


@given(st.text(max_size=8))
def test_any_text_is_a_dtype_of_fixed_size_or_a_value_error(name: str) -> None:
    try:
        dtype = dtype_of(name)
    except ValueError:
        return
    assert dtype.itemsize > 0
    assert not dtype.hasobject
