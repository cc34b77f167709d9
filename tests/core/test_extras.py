"""The text of a process's extras: what was put in comes out, and nothing else is believed."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.extras import Item, ProcessExtras, joined_items
from emergency_ckpt.errors import CorruptDataError

names = st.text("abcxyz_09", min_size=1, max_size=3)
paths = st.lists(names, min_size=1, max_size=2).map("/".join)
items = st.builds(Item, names, st.dictionaries(paths, st.binary(max_size=4), max_size=2))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
extras = st.builds(
    ProcessExtras, st.dictionaries(names, json_values, max_size=2), st.dictionaries(names, items, max_size=2)
).flatmap(
    lambda made: st.sets(st.sampled_from(sorted(made.values) or [""])).map(
        lambda same: dataclasses.replace(made, same_everywhere=frozenset(same & made.values.keys()))
    )
)


@given(extras)
def test_what_was_put_in_comes_out(given_extras: ProcessExtras) -> None:
    assert ProcessExtras.from_text(given_extras.to_text()) == given_extras


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../b", "", "a//b", "a\\b", "a/", "\0"])
def test_a_path_that_leaves_its_item_is_refused(path: str) -> None:
    text = ProcessExtras({}, {"data": Item("h", {path: b""})}).to_text()
    with pytest.raises(CorruptDataError, match="damaged"):
        ProcessExtras.from_text(text)


@given(extras, st.data())
def test_damaged_text_is_refused_or_still_extras(given_extras: ProcessExtras, data: st.DataObject) -> None:
    text = given_extras.to_text()
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:at] + data.draw(st.sampled_from('{}[]",:x0')) + text[at + 1 :]
    with contextlib.suppress(CorruptDataError):
        assert isinstance(ProcessExtras.from_text(damaged), ProcessExtras)


@pytest.mark.parametrize(
    "raw",
    [
        [],
        {},
        {"values": 1, "items": {}},
        {"values": {}, "items": {}, "global": ["a"]},
        {"values": {}, "items": {"a": 1}},
        None,
    ],
)
def test_other_json_is_refused(raw: object) -> None:
    with pytest.raises(CorruptDataError):
        ProcessExtras.from_text(json.dumps(raw))


@given(st.lists(st.builds(ProcessExtras, items=st.dictionaries(names, items, max_size=2)), max_size=3))
def test_joined_items_hold_every_file_and_the_first_of_equal_paths(parts: list[ProcessExtras]) -> None:
    joined = joined_items(parts)
    for name, item in joined.items():
        holders = [part.items[name] for part in parts if name in part.items]
        assert item.handler == holders[0].handler
        assert item.files.keys() == {path for held in holders for path in held.files}
        for path, content in item.files.items():
            assert content == next(held.files[path] for held in holders if path in held.files)
    assert joined.keys() == {name for part in parts for name in part.items}
