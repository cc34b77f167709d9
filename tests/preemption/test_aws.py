"""Amazon's metadata service, spoken to over HTTP: what is a notice, and all that is none."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.preemption import aws
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.preemption.source import NotHereError, SourceError
from emergency_ckpt.preemption.watch import Watch
from tests.preemption.watching import wait_until_off, watching
from tests.servers import imds
from tests.servers.imds import FakeImds, fake_imds
from tests.servers.metadata import Answer

ACTION = b'{"action": "terminate", "time": "2031-09-18T08:22:00Z"}'
DEADLINE = 1947486120.0


@pytest.fixture
def fake() -> Iterator[FakeImds]:
    with fake_imds() as served:
        yield served


def spot(fake: FakeImds, version1: aws.Version1 = "never") -> aws.SpotInterruption:
    source = aws.SpotInterruption(version1, {"AWS_EC2_METADATA_SERVICE_ENDPOINT": fake.url}, 0.3)
    source.period_seconds = 0.02
    return source


def asked(fake: FakeImds, page: str) -> int:
    return sum(path == page for _, path in fake.asked)


def test_both_notices_are_told_once_with_their_times_and_one_token_serves_many_looks(fake: FakeImds) -> None:
    rebalance = aws.RebalanceRecommendation("never", {"AWS_EC2_METADATA_SERVICE_ENDPOINT": fake.url + "/"})
    rebalance.period_seconds = 0.02
    with watching(spot(fake), rebalance) as heard:
        fake.wait_for(lambda: asked(fake, imds.SPOT_ACTION) > 3)
        assert not heard.notices
        fake.pages[imds.REBALANCE] = b'{"noticeTime": "2031-09-18T08:00:00Z"}'
        heard.wait()
        fake.pages[imds.SPOT_ACTION] = ACTION
        heard.wait(2)
        seen = asked(fake, imds.SPOT_ACTION)
        fake.wait_for(lambda: asked(fake, imds.SPOT_ACTION) > seen + 3)
    assert heard.kinds(2) == [("aws-rebalance", "rebalance"), ("aws-spot", "terminate")]
    notice = heard.notices[1]
    assert (notice.deadline, notice.detail, notice.asks_for_save) == (DEADLINE, "terminate", True)
    assert aws.parse_spot_action(ACTION, 1.0).key == notice.key, "hours later, by another agent"
    assert aws.parse_spot_action(ACTION.replace(b":22:", b":42:"), 1.0).key != notice.key
    assert not heard.notices[0].asks_for_save
    assert asked(fake, imds.TOKEN_PAGE) == 2


def test_a_token_that_ends_early_is_replaced_and_one_of_short_life_before_it_ends(fake: FakeImds) -> None:
    source = spot(fake)
    assert source.look() is None
    fake.expire_tokens()
    assert source.look() is None
    assert asked(fake, imds.TOKEN_PAGE) == 2
    fake.token_seconds = "0"
    fake.expire_tokens()
    for _ in range(2):
        assert source.look() is None
    assert asked(fake, imds.TOKEN_PAGE) == 4


@pytest.mark.parametrize("token", [Answer(404), Answer(500), Answer(200, b"\xff\x00"), Answer(0, silent=True)])
def test_without_a_token_version_1_is_spoken_only_where_it_is_allowed(fake: FakeImds, token: Answer) -> None:
    fake.wants_token = False
    fake.pages[imds.SPOT_ACTION] = ACTION
    fake.misbehave = lambda method, path: token if path == imds.TOKEN_PAGE else None
    environment = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": fake.url}
    source = aws.SpotInterruption("never", environment)
    source._imds._seconds = 0.3
    with pytest.raises(
        SourceError, match="version 1 of the protocol is not allowed" if not token.silent else "hop"
    ):
        source.look()
    allowed = aws.SpotInterruption("allowed", environment)
    allowed._imds._seconds = 0.3
    notice = allowed.look()
    assert notice is not None
    assert notice.deadline == DEADLINE
    fake.wants_token = True  # The instance wants version 2, and gives no token: nothing can be done.
    with pytest.raises(SourceError, match="wants version 2"):
        allowed.look()


def test_whatever_the_service_answers_the_watch_goes_on_and_says_so_once(
    fake: FakeImds, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "emergency_ckpt.preemption")
    source = spot(fake)
    nothing = Answer(404)
    answers = [
        Answer(500),
        Answer(500),
        Answer(429),
        nothing,
        Answer(200, b"<html>please log in</html>"),
        Answer(200, b"[" * 60_000),
        nothing,
        Answer(200, b"x" * 70_000),
        Answer(200, b'{"action": "terminate"'),
        nothing,
        Answer(0, silent=True),
        nothing,
    ]
    fake.misbehave = lambda method, path: answers.pop(0) if answers and path == imds.SPOT_ACTION else None
    fake.pages[imds.SPOT_ACTION] = ACTION
    with watching(source) as heard:
        assert heard.wait()[0].deadline == DEADLINE
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in warned if "status 500" in line]) == 1
    assert any("did not answer" in line for line in warned)
    assert [r for r in caplog.records if r.getMessage() == "aws-spot answers again"]


def test_a_machine_without_the_service_is_noticed_at_once_and_said_in_one_line(
    fake: FakeImds, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "emergency_ckpt.preemption")
    with pytest.raises(NotHereError, match="AWS_EC2_METADATA_DISABLED"):
        aws.SpotInterruption("never", {"AWS_EC2_METADATA_DISABLED": "True"})
    for wrong in ("ftp://x", "http://", "http://h:port", "h"):
        with pytest.raises(NotHereError, match="no address"):
            aws.SpotInterruption("never", {"AWS_EC2_METADATA_SERVICE_ENDPOINT": wrong})
    nobody = aws.SpotInterruption("never", {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9"})
    fake.pages[imds.LIFE_CYCLE] = b"on-demand"
    watch = Watch([nobody, spot(fake)], lambda notice: None)
    wait_until_off(watch)
    assert watch.close()
    lines = [record for record in caplog.records if "is not watched" in record.getMessage()]
    assert len(lines) == 2
    assert {record.levelno for record in lines} == {logging.INFO}


def test_a_service_that_is_switched_off_is_not_asked_again(fake: FakeImds) -> None:
    fake.misbehave = lambda method, path: Answer(403) if method == "GET" else None
    with pytest.raises(NotHereError, match="switched off"):
        spot(fake).look()


def test_a_machine_of_amazon_is_known_by_small_files(tmp_path: Path) -> None:
    assert not aws.is_aws({}, tmp_path)
    (tmp_path / "sys_vendor").write_text("Amazon EC2\n")
    assert aws.is_aws({}, tmp_path)
    assert aws.endpoint({}) == "http://169.254.169.254"
    assert aws.endpoint({"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IPv6"}) == "http://[fd00:ec2::254]"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(["stop", "2031-01-01T00:00:00Z"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["action", "time", "noticeTime", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.binary(max_size=200) | JSON.map(lambda raw: json.dumps(raw).encode()), st.floats(0, 1e10))
def test_anything_is_a_notice_or_a_value_error(body: bytes, now: float) -> None:
    for parse in (aws.parse_spot_action, aws.parse_rebalance):
        try:
            notice = parse(body, now)
        except ValueError:
            continue
        assert Notice.from_line(notice.to_line()) == notice
