"""Google's metadata server, spoken to over HTTP: values that change while a request waits."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.preemption import gce
from emergency_ckpt.preemption.source import NotHereError, SourceError
from emergency_ckpt.preemption.watch import Watch
from tests.preemption.watching import watching
from tests.servers.gce_metadata import FLAVOR, MAINTENANCE, PREEMPTED, FakeMetadata, fake_gce_metadata
from tests.servers.metadata import Answer


@pytest.fixture
def fake() -> Iterator[FakeMetadata]:
    with fake_gce_metadata() as served:
        yield served


def environment(fake: FakeMetadata) -> dict[str, str]:
    return {"GCE_METADATA_HOST": fake.url.removeprefix("http://")}


def test_changes_are_heard_while_requests_wait_and_each_event_is_one_notice(fake: FakeMetadata) -> None:
    with watching(gce.Preemption(environment(fake)), gce.MaintenanceEvent(environment(fake))) as heard:
        fake.wait_for(lambda: fake.waiting == 2)
        fake.set(MAINTENANCE, "MIGRATE_ON_HOST_MAINTENANCE")
        heard.wait()
        before = len(fake.asked)
        fake.set(MAINTENANCE, "NONE")
        fake.wait_for(lambda: len(fake.asked) > before and fake.waiting == 2)
        fake.set(MAINTENANCE, "MIGRATE_ON_HOST_MAINTENANCE")
        heard.wait(2)
        fake.set(PREEMPTED, "TRUE")
        heard.wait(3)
        fake.set(MAINTENANCE, "TERMINATE_ON_HOST_MAINTENANCE")
        notices = heard.wait(4)
    assert [notice.kind for notice in notices] == ["migrate", "migrate", "terminate", "terminate"]
    assert [round((n.deadline or 0) - n.received) for n in notices] == [60, 60, 30, 60]
    assert len({notice.key for notice in notices}) == 4
    # Another agent of this machine finds what stands there, with another deadline, and it is the same.
    with watching(gce.Preemption(environment(fake))) as again:
        (notice,) = again.wait()
    assert notice.key == notices[2].key
    assert notice.deadline != notices[2].deadline
    assert not notices[0].asks_for_save
    assert notices[2].asks_for_save


def test_a_wait_that_ends_without_a_change_is_followed_by_another(fake: FakeMetadata) -> None:
    with watching(gce.Preemption(environment(fake), wait_seconds=0)) as heard:
        fake.wait_for(lambda: len(fake.asked) > 5)
        fake.set(PREEMPTED, "TRUE")
        assert len(heard.wait()) == 1


def test_whatever_the_server_answers_the_watch_goes_on(fake: FakeMetadata) -> None:
    answers = [
        None,
        Answer(503, headers=dict(FLAVOR)),
        Answer(404, headers=dict(FLAVOR)),
        Answer(500),
        None,
        Answer(200, b"TRUE"),  # Without the flavor it is somebody else.
        Answer(200, b"<html>", dict(FLAVOR)),
        Answer(200, b"\xff\xfe", dict(FLAVOR)),
        None,
        Answer(200, b"T" * 70_000, dict(FLAVOR)),
    ]
    fake.misbehave = lambda method, path: answers.pop(0) if answers else None
    with watching(gce.Preemption(environment(fake), wait_seconds=0)) as heard:
        fake.wait_for(lambda: not answers)
        fake.set(PREEMPTED, "TRUE")
        assert [notice.detail for notice in heard.wait()] == ["preempted"]


def test_a_machine_without_the_server_is_noticed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "emergency_ckpt.preemption")
    with pytest.raises(NotHereError):
        gce.Preemption({"GCE_METADATA_HOST": "127.0.0.1:9"}).look()
    with fake_gce_metadata() as fake:
        fake.misbehave = lambda method, path: Answer(404)
        with pytest.raises(NotHereError, match="404"):
            gce.MaintenanceEvent(environment(fake)).look()


def test_a_close_ends_requests_that_wait(fake: FakeMetadata) -> None:
    watch = Watch([gce.Preemption(environment(fake)), gce.MaintenanceEvent(environment(fake))], lambda _: None)
    fake.wait_for(lambda: fake.waiting == 2)
    assert watch.close(20)
    assert watch.close()
    source = gce.Preemption(environment(fake))
    source.close()
    with pytest.raises(SourceError):
        source.look()


@given(st.text(max_size=40) | st.sampled_from(["TRUE", "FALSE", "NONE"]), st.floats(0, 1e10))
def test_any_value_is_understood_or_a_value_error(value: str, now: float) -> None:
    for parse in (gce.parse_preempted, gce.parse_maintenance_event):
        try:
            notice = parse(value, now)
        except ValueError:
            continue
        assert notice is None or (notice.deadline or 0) > now
