"""The file of the platform is read once it is whole; what cannot be right is refused, naming the file."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.errors import CorruptDataError, LocalDirectoryError
from emergency_ckpt.local.init_info import FILE_NAME, InitInfo, parse_init_info, wait_for_init_info

LONG, SHORT = timedelta(seconds=30), timedelta(seconds=0.3)


@pytest.mark.parametrize(
    ("content", "info"),
    [
        (b"0\n10.0.0.7:8476\n", InitInfo(0, "10.0.0.7:8476")),
        (b"17\njob-0-0.job.default.svc:8476", InitInfo(17, "job-0-0.job.default.svc:8476")),
        (b" 3 \r\n[fd00::1]:80 \r\nwhat later versions say\n", InitInfo(3, "[fd00::1]:80")),
    ],
)
def test_process_id_and_address_are_the_first_two_lines(tmp_path: Path, content: bytes, info: InitInfo) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    for is_expected in (True, False):
        assert wait_for_init_info(tmp_path, LONG, is_expected=is_expected) == info


@pytest.mark.parametrize(
    "content",
    [
        b"-1\nhost:1\n",
        b"1e3\nhost:1\n",
        b"99999999\nhost:1\n",
        b"\nhost:1\n",
        b"1\n\n",
        b"1\nhost\n",
        b"1\nhost:0\n",
        b"1\nhost:70000\n",
        b"1\nhost:1 --flag\n",
        b"1\n/etc/passwd:1\n",
        b"\xff\xfe\nhost:1\n",
        "\u0661\nhost:1\n".encode(),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(CorruptDataError, match=FILE_NAME):
        wait_for_init_info(tmp_path, LONG, is_expected=False)


@given(st.binary(max_size=100))
def test_any_bytes_are_an_answer_or_a_refusal(content: bytes) -> None:
    try:
        info = parse_init_info(content, "a file")
    except CorruptDataError:
        return
    assert 0 <= info.process_id < 1 << 20
    assert ":" in info.coordinator_address


def test_a_file_that_is_no_file_or_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"1\nhost:1\n" + b"x" * 5000)
    with pytest.raises(CorruptDataError, match=FILE_NAME):
        wait_for_init_info(tmp_path, LONG, is_expected=True)
    (tmp_path / FILE_NAME).unlink()
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(LocalDirectoryError, match=FILE_NAME):
        wait_for_init_info(tmp_path, LONG, is_expected=True)


def test_where_it_is_not_expected_nobody_waits_for_it(tmp_path: Path) -> None:
    assert wait_for_init_info(tmp_path, LONG, is_expected=False) is None


@pytest.mark.parametrize(("content", "state"), [(None, "is not there"), (b"", "is empty")])
def test_a_file_that_does_not_come_is_named_at_the_limit(
    tmp_path: Path, content: bytes | None, state: str
) -> None:
    if content is not None:
        (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(LocalDirectoryError, match=f"{FILE_NAME} {state} after 0.3 s"):
        wait_for_init_info(tmp_path, SHORT, is_expected=True)


def test_a_file_that_is_still_being_written_is_waited_for(tmp_path: Path) -> None:
    found: list[InitInfo | None] = []
    path = tmp_path / FILE_NAME
    path.write_bytes(b"")
    waits = threading.Thread(
        target=lambda: found.append(wait_for_init_info(tmp_path, LONG, is_expected=False)), name="waits"
    )
    waits.start()
    with path.open("ab", buffering=0) as writing:
        for piece in (b"1", b"2\n10.0.0.", b"7:84", b"76\n"):
            writing.write(piece)
    waits.join(LONG.total_seconds())
    assert found == [InitInfo(12, "10.0.0.7:8476")]
