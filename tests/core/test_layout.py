"""Layouts: equal ones have equal names, they survive the wire, and damaged ones are refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.layout import SHARD_ALIGNMENT, Layout, LeafSpec
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.errors import CorruptDataError

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=6)
dtypes = st.sampled_from(["float32", "bfloat16", "int4", "bool", "complex64", "float64"])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    leaves = draw(
        st.lists(
            st.builds(LeafSpec, names, st.lists(st.integers(0, 6), max_size=3).map(tuple), dtypes),
            max_size=4,
            unique_by=lambda leaf: leaf.name,
        )
    )
    shards: list[Shard] = []
    for leaf in leaves:
        for _ in range(draw(st.integers(1, 3))):
            pairs = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in leaf.shape]
            shards.append(Shard(leaf.name, Box(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))))
    process_slice = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)))
    held = st.lists(st.sampled_from(shards), max_size=6) if shards else st.just([])
    holders = {process: draw(held) for process in range(len(process_slice))}
    files = draw(
        st.dictionaries(st.sampled_from(["_METADATA", "d/_CHECKPOINT_METADATA", "x"]), st.binary(max_size=9))
    )
    return Layout.build(leaves, holders, process_slice, draw(st.sets(names, max_size=2)), files)


@given(layouts())
def test_a_layout_survives_the_wire(layout: Layout) -> None:
    again = Layout.from_bytes(layout.to_bytes())
    assert again == layout
    assert again.hash == layout.hash
    assert again.to_bytes() == layout.to_bytes()


@given(layouts(), layouts())
def test_layouts_have_one_hash_when_they_are_equal_and_only_then(one: Layout, other: Layout) -> None:
    assert (one.hash == other.hash) == (one == other)


@given(layouts(), st.data())
def test_changing_any_part_changes_the_hash(layout: Layout, data: st.DataObject) -> None:
    changes: dict[str, Any] = {
        "leaves": (*layout.leaves, LeafSpec("another leaf", (2,), "int8")),
        "shards": (*layout.shards, Shard("another leaf", Box((0,), (1,)))),
        "process_shards": (*layout.process_shards, ()),
        "process_slice": (*layout.process_slice, 1),
        "value_leaves": (*layout.value_leaves, "another value"),
        "metadata_files": (*layout.metadata_files, ("another file", b"")),
    }
    part = data.draw(st.sampled_from(sorted(changes)))
    assert dataclasses.replace(layout, **{part: changes[part]}).hash != layout.hash


@given(layouts())
def test_the_order_in_which_a_layout_is_built_does_not_matter(layout: Layout) -> None:
    holders = {
        p: [layout.shards[i] for i in reversed(held)] * 2 for p, held in enumerate(layout.process_shards)
    }
    again = Layout.build(
        reversed(layout.leaves),
        dict(reversed(holders.items())),
        layout.process_slice,
        reversed(layout.value_leaves),
        dict(reversed(layout.metadata_files)),
    )
    assert again == layout


@given(layouts())
def test_shards_lie_aligned_and_apart_within_the_slot(layout: Layout) -> None:
    for process, held in enumerate(layout.process_shards):
        entries = layout.slot_entries(process)
        assert [entry.shard for entry in entries] == list(held)
        assert [entry.nbytes for entry in entries] == [layout.shard_nbytes[shard] for shard in held]
        assert all(entry.offset % SHARD_ALIGNMENT == 0 for entry in entries)
        ends = [entry.offset + entry.nbytes for entry in entries]
        assert all(end <= after.offset for end, after in zip(ends, entries[1:], strict=False))
        assert all(end <= layout.data_bytes(process) for end in ends)
        assert layout.data_bytes(process) % SHARD_ALIGNMENT == 0


@given(layouts())
def test_processes_with_the_same_shards_have_the_same_slots(layout: Layout) -> None:
    for one, held in enumerate(layout.process_shards):
        for other, others in enumerate(layout.process_shards):
            if held == others:
                assert layout.slot_entries(one) == layout.slot_entries(other)
                assert layout.data_bytes(one) == layout.data_bytes(other)


@given(layouts())
def test_holders_and_held_shards_say_the_same(layout: Layout) -> None:
    for shard, holders in enumerate(layout.shard_holders):
        assert holders == tuple(p for p, held in enumerate(layout.process_shards) if shard in held)
        assert layout.shard_index[layout.shards[shard]] == shard


# What comes from disk or from a peer may be anything.


def refused_or_sound(data: bytes) -> None:
    """Whatever parses can be used without surprises; nothing but CorruptDataError is raised."""
    try:
        layout = Layout.from_bytes(data)
    except CorruptDataError:
        return
    assert Layout.from_bytes(layout.to_bytes()) == layout
    for process in range(layout.process_count):
        layout.slot_entries(process)
        assert layout.data_bytes(process) >= 0
    for shard in layout.shards:
        assert Box.whole(layout.leaf[shard.leaf].shape).contains(shard.box)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptDataError):
        Layout.from_bytes(data)


@given(layouts(), st.data())
def test_damaged_bytes_are_refused_or_make_a_sound_layout(layout: Layout, data: st.DataObject) -> None:
    damaged = bytearray(layout.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    refused_or_sound(bytes(damaged))


@given(layouts(), st.data())
def test_a_layout_that_is_cut_short_is_refused(layout: Layout, data: st.DataObject) -> None:
    whole = layout.to_bytes()
    with pytest.raises(CorruptDataError):
        Layout.from_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])


hostile_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "a/../b", "", "O", "f4,O", "(2,)f4", "\x00"]),
    st.lists(st.integers(-2, 2), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(layouts(), st.data())
def test_hostile_values_are_refused_or_make_a_sound_layout(layout: Layout, data: st.DataObject) -> None:
    raw = json.loads(layout.to_bytes())
    node, key = raw, data.draw(st.sampled_from(sorted(raw)))
    while isinstance(node[key], list) and node[key] and data.draw(st.booleans()):
        node, key = node[key], data.draw(st.integers(0, len(node[key]) - 1))
    if data.draw(st.booleans()):
        node[key] = data.draw(hostile_values)
    else:
        del node[key]
    refused_or_sound(json.dumps(raw).encode())


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("format", 3),
        ("format", True),
        ("leaves", [["w", [4], "object"]]),
        ("leaves", [["w", [1e999], "int8"]]),
        ("leaves", [["w", [-4], "int8"]]),
        ("leaves", [["w", [8], "int8"], ["w", [8], "int8"]]),
        ("leaves", [["w", [2**61, 4], "int8"]]),
        ("cuts", [[1, [0, 9], [0], [0]]]),
        ("cuts", [[1, [0, 0, 1, 1], [0], [0]]]),
        ("cuts", [[1, [4, 0], [0], [0]]]),
        ("cuts", [[1, [-1, 8], [0], [0]]]),
        ("cuts", [[1, [0, 2**70], [0], [0]]]),
        ("cuts", [[2, [0, 8, 0, 8], [0], [0]]]),
        ("cuts", [[2, [4, 8, 0, 4], [0], [0]]]),
        ("cuts", [[3, [0, 8], [0], [0]]]),
        ("cuts", [[-1, [0, 8], [0], [0]]]),
        ("cuts", [[0, [], [], []]]),
        ("cuts", [[1, [0, 8], [0], [1]]]),
        ("cuts", [[1, [0, 8], [0], [-1]]]),
        ("cuts", [[1, [0, 8], [1], [0]]]),
        ("cuts", [[1, [0, 8], [0, 0], [0, 0]]]),
        ("cuts", [[1, [0, 8], [0], []]]),
        ("cuts", []),
        ("shards", [["v", 0]]),
        ("shards", [["w", 0], ["w", 0]]),
        ("shards", [["w", 1]]),
        ("shards", [["w", -1]]),
        ("process_kinds", [1]),
        ("process_kinds", [-1]),
        ("process_kinds", [0, 0]),
        ("process_slice", [-1]),
        ("metadata_files", [["../x", ""]]),
        ("metadata_files", [["/x", ""]]),
        ("metadata_files", [["x", "not base64!"]]),
    ],
)
def test_a_contradiction_is_refused(part: str, value: Any) -> None:
    sound = Layout.build([LeafSpec("w", (8,), "int8")], {0: [Shard("w", Box((0,), (8,)))]}, (0,))
    raw = json.loads(sound.to_bytes())
    assert Layout.from_bytes(json.dumps(raw).encode()) == sound
    raw[part] = value
    with pytest.raises(CorruptDataError):
        Layout.from_bytes(json.dumps(raw).encode())


def in_format_1(layout: Layout) -> Layout:
    return dataclasses.replace(layout, format=1)


@given(layouts())
def test_layouts_of_format_1_are_read_and_keep_their_names(layout: Layout) -> None:
    old = in_format_1(layout)
    raw = json.loads(old.to_bytes())
    assert raw["format"] == 1
    assert raw["shards"] == [[s.leaf, list(s.box.start), list(s.box.stop)] for s in layout.shards]
    assert raw["process_shards"] == [list(held) for held in layout.process_shards]
    again = Layout.from_bytes(old.to_bytes())
    assert again == old
    assert again.hash == old.hash != layout.hash
    assert (again.shards, again.process_shards) == (layout.shards, layout.process_shards)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("shards", [["w", [0], [9]]]),
        ("shards", [["w", [0, 0], [1, 1]]]),
        ("shards", [["v", [0], [1]]]),
        ("shards", [["w", [4], [0]]]),
        ("shards", [["w", [0], [8]], ["w", [0], [8]]]),
        ("shards", [["w", [4], [8]], ["w", [0], [4]]]),
        ("process_shards", [[1]]),
        ("process_shards", [[-1]]),
        ("process_shards", [[0, 0]]),
        ("process_shards", [[0], [0]]),
    ],
)
def test_a_contradiction_in_format_1_is_refused(part: str, value: Any) -> None:
    sound = in_format_1(Layout.build([LeafSpec("w", (8,), "int8")], {0: [Shard("w", Box((0,), (8,)))]}, (0,)))
    raw = json.loads(sound.to_bytes())
    raw[part] = value
    with pytest.raises(CorruptDataError):
        Layout.from_bytes(json.dumps(raw).encode())


@given(layouts(), st.data())
def test_hostile_values_in_format_1_are_refused_or_make_a_sound_layout(
    layout: Layout, data: st.DataObject
) -> None:
    raw = json.loads(in_format_1(layout).to_bytes())
    node, key = raw, data.draw(st.sampled_from(["shards", "process_shards"]))
    while isinstance(node[key], list) and node[key] and data.draw(st.booleans()):
        node, key = node[key], data.draw(st.integers(0, len(node[key]) - 1))
    node[key] = data.draw(hostile_values)
    refused_or_sound(json.dumps(raw).encode())


def test_leaves_that_are_cut_and_held_alike_are_written_once() -> None:
    def written(leaves: int) -> int:
        boxes = {p: [Box((p % 8,), (p % 8 + 1,))] for p in range(16)}
        names = [f"leaf{i:04}" for i in range(leaves)]
        layout = Layout.build_from_boxes(
            [LeafSpec(name, (8,), "int8") for name in names], dict.fromkeys(names, boxes), (0,) * 8 + (1,) * 8
        )
        assert len(layout.shards) == 8 * leaves
        return len(layout.to_bytes())

    assert written(1001) - written(1000) < 50


def test_a_small_text_cannot_name_more_shards_than_memory_holds() -> None:
    rows = 10_000
    bounds = [bound for row in range(rows) for bound in (row, row + 1)]
    names = [f"{i}" for i in range(rows)]
    raw = {
        "format": 2,
        "leaves": [[name, [rows], "int8"] for name in names],
        "cuts": [[rows, bounds, [0] * rows, list(range(rows))]],
        "shards": [[name, 0] for name in names],
        "process_kinds": [0],
        "process_slice": [0],
        "value_leaves": [],
        "metadata_files": [],
    }
    with pytest.raises(CorruptDataError, match="more than"):
        Layout.from_bytes(json.dumps(raw).encode())


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(CorruptDataError):
        Layout.from_bytes(b"[" * 100_000)
