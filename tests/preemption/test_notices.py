"""Notices as values and lines, files that appear, and which sources are chosen."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.errors import ConfigError
from emergency_ckpt.preemption.choosing import SourceOptions, choose_sources, names_of
from emergency_ckpt.preemption.notice import Known, Notice
from emergency_ckpt.preemption.notice_file import FRESH_SECONDS, NoticeFile, parse_file
from tests.preemption.watching import watching

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["source", "kind", "received", "deadline", "detail", "id", "seconds"]),
            inner,
            max_size=6,
        )
    ),
    max_leaves=8,
)
ANYTHING = st.binary(max_size=200) | JSON.map(lambda raw: json.dumps(raw).encode())


@given(ANYTHING)
def test_any_line_is_a_notice_or_a_value_error(line: bytes) -> None:
    try:
        notice = Notice.from_line(line)
    except ValueError:
        return
    assert Notice.from_line(notice.to_line()) == notice


@given(ANYTHING, st.floats(1, 1e10))
def test_any_file_is_a_notice(body: bytes, written: float) -> None:
    notice = parse_file(body, written, written + 1)
    assert Notice.from_line(notice.to_line()) == notice


def test_what_a_file_says_of_time() -> None:
    assert parse_file(b"", 100.0, 101.0).deadline is None
    assert parse_file(b'{"seconds": 25}', 100.0, 101.0).deadline == 125.0
    assert parse_file(b'{"deadline": "1970-01-01T00:05:00+00:00"}', 100.0, 101.0).deadline == 300.0
    assert parse_file(b'{"deadline": 300}', 100.0, 101.0).deadline == 300.0
    assert parse_file(b'{"kind": "save", "detail": "by hand\\n"}', 100.0, 101.0).kind == "save"
    spoken = parse_file(b"node problem: disk", 100.0, 101.0)
    assert (spoken.kind, spoken.detail) == ("terminate", "node problem: disk")


def test_a_file_that_appears_is_told_once_until_it_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "notice"
    source = NoticeFile(path)
    source.period_seconds = 0.01
    with watching(source) as heard:
        for count, written in enumerate(('{"seconds": 25}', '{"seconds": 50}', "", "")):
            path.write_text(written)
            heard.wait(count + 1)
        again = NoticeFile(path).look()
    assert len({notice.deadline for notice in heard.notices}) == 3
    assert len({notice.key for notice in heard.notices}) == 4, "that it says the same is no matter"
    assert again is not None
    assert again.key == heard.notices[-1].key, "whoever looks at it knows it as the same"


def test_a_file_of_a_time_before_counts_once_it_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "notice"
    path.touch()
    assert NoticeFile(path).look() is None, "it may be being written"

    def write(age_seconds: float) -> None:
        moment = time.time() - age_seconds
        os.utime(path, (moment, moment))

    write(1)
    assert NoticeFile(path).look() is not None
    write(FRESH_SECONDS + 10)
    stale = NoticeFile(path)
    assert stale.look() is None
    assert stale.look() is None
    write(1)
    assert stale.look() is not None


def test_a_thing_that_is_no_file_is_never_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    before = time.time() - 1
    os.utime(tmp_path / "pipe", (before, before))
    notice = NoticeFile(tmp_path / "pipe").look()
    assert notice is not None
    assert notice.detail == ""


def test_a_notice_is_known_by_its_id_and_without_one_by_its_words() -> None:
    known = Known()
    assert known.is_new(Notice("request", "save", 1.0))
    assert not known.is_new(Notice("request", "save", 2.0))
    assert known.is_new(Notice("request", "save", 2.0, 60.0))
    assert known.is_new(Notice("request", "save", 1.0, id="1"))
    assert not known.is_new(Notice("request", "terminate", 2.0, 60.0, "more", id="1"))
    said = json.loads(Notice("request", "save", 1.0, id="1").to_line())
    assert Notice.from_json(said).id == "1"
    del said["id"]
    assert Notice.from_json(said) == Notice("request", "save", 1.0)


def test_what_stands_is_told_to_those_who_come_later() -> None:
    assert Notice("aws-spot", "terminate", 100.0, 220.0).stands(219.0)
    assert not Notice("aws-spot", "terminate", 100.0, 220.0).stands(221.0)
    assert Notice("file", "terminate", 100.0).stands(110.0)
    assert not Notice("file", "terminate", 100.0).stands(1000.0)
    assert not Notice("request", "save", 100.0).stands(100.0)


def test_the_sources_that_are_named_are_chosen_and_no_others(tmp_path: Path) -> None:
    def chosen(names: str, file: Path | None = None, **environment: str) -> list[str]:
        options = SourceOptions(names_of(names), file)
        return [source.name for source in choose_sources(options, environment)]

    assert chosen("aws,gce-preempted") == ["aws-spot", "aws-rebalance", "gce-preempted"]
    assert chosen("aws", AWS_EC2_METADATA_DISABLED="true") == []
    assert chosen("off", tmp_path) == []
    assert chosen("gce", tmp_path) == ["gce-preempted", "gce-maintenance", "file"]
    assert {"aws-spot", "gce-preempted"} <= set(
        chosen("auto", AWS_EC2_METADATA_SERVICE_ENDPOINT="http://h", GCE_METADATA_HOST="h")
    )
    for wrong in ("azure", "auto,aws", "off,gce", ""):
        with pytest.raises(ConfigError, match="preemption_sources"):
            SourceOptions(names_of(wrong))
