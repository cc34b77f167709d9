"""YAML as MaxText's files write it: numbers, None, text that only looks like a number, and broken files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.config.values import read_file, read_value
from emergency_ckpt.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10_000", 10_000),
        ("-1", -1),
        ("+3", 3),
        ("0", 0),
        ("0x1f", 31),
        ("1e-3", 0.001),
        ("3.e-5", 3e-5),
        ("1.e-05", 1e-5),
        ("1.", 1.0),
        (".5", 0.5),
        ("1_000.5", 1000.5),
        ("1e6", 1e6),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("None", None),
        ("null", None),
        ("~", None),
        ("", None),
        ("'None'", "None"),
        ('"12"', "12"),
        ("on", "on"),
        ("yes", "yes"),
        ("none", "none"),
        ("12:30", "12:30"),
        ("010", "010"),
        ("2024-01-15", "2024-01-15"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("[a, 1, None]", ["a", 1, None]),
        ("{a: 1.e-2}", {"a": 0.01}),
    ],
)
def test_a_scalar_is_read_as_a_python_user_means_it(text: str, value: Any) -> None:
    found = read_value(text, "here").value
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("2024_01", "2024_01"),
        ("1e3", "1e3"),
        ("a #b", "a #b"),
        (" a ", "a"),
        ("'quoted # text'", "quoted # text"),
        ("a: b: c", "a: b: c"),
        ("*star", "*star"),
        ("@at", "@at"),
        ("[x]", "[x]"),
        ("bell\x07", "bell\x07"),
    ],
)
def test_text_is_kept_as_written_for_flags_that_take_text(text: str, kept: str) -> None:
    assert read_value(text, "here").text == kept


@given(st.text())
def test_any_text_of_a_command_line_can_be_read(text: str) -> None:
    read = read_value(text, "here")
    assert read.text is not None
    assert read.source == "here"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_each_key_of_a_file_knows_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yml", "# comment\nfirst: 1\n\nnested:\n  inner: [1,\n    2]\nlast: x\n")
    found = read_file(path)
    assert {key: (item.value, item.source) for key, item in found.items()} == {
        "first": (1, f"{path}:2"),
        "nested": ({"inner": [1, 2]}, f"{path}:4"),
        "last": ("x", f"{path}:7"),
    }


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert read_file(write(tmp_path / "a.yml", "# nothing\n")) == {}


def test_merge_keys_are_followed_and_the_own_key_wins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yml", "shared: &shared {a: 1, b: 2}\n<<: *shared\nb: 3\n")
    assert {key: item.value for key, item in read_file(path).items()} == {
        "shared": {"a": 1, "b": 2},
        "a": 1,
        "b": 3,
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nb: 2\na: 3\n", r"sets a twice, in lines 1 and 3"),
        ("- a\n- b\n", "lines of the form `key: value`"),
        ("just words\n", "lines of the form `key: value`"),
        ("a: [1, 2\n", r"(?s)not valid YAML.*a\.yml"),
        ("a: !!python/object:os.system {}\n", "(?s)not valid YAML.*python/object"),
        ("a: !!int many\n", "not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
    ],
)
def test_a_broken_file_is_refused_with_the_place(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_file(write(tmp_path / "a.yml", text))
    assert str(tmp_path / "a.yml") in str(caught.value)


def test_an_unreadable_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "latin.yml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_file(tmp_path / "latin.yml")
    with pytest.raises(ConfigError, match="No such file"):
        read_file(tmp_path / "missing.yml")
