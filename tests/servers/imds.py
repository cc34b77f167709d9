"""A fake of Amazon's instance metadata service, after its user guide: tokens, and pages that appear."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tests.servers.metadata import Answer, Fake, served

TOKEN_PAGE = "/latest/api/token"
LIFE_CYCLE = "/latest/meta-data/instance-life-cycle"
SPOT_ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


class FakeImds(Fake):
    """`pages` are what there is; all others are 404. `wants_token`: version 1 is switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: dict[str, bytes] = {LIFE_CYCLE: b"spot"}
        self.wants_token = True
        self.tokens: list[str] = []
        self.token_seconds: str | None = None

    def expire_tokens(self) -> None:
        self.tokens.clear()

    def answer(self, method: str, path: str, headers: Any) -> Answer:
        if path == TOKEN_PAGE:
            said = headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if method != "PUT" or not said.isdigit() or not 1 <= int(said) <= 21600:
                return Answer(400)
            token = f"AQAEA{len(self.asked)}=="
            self.tokens.append(token)
            return Answer(
                200, token.encode(), {"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": self.token_seconds or said}
            )
        token = headers.get("X-aws-ec2-metadata-token")
        if token not in self.tokens and (self.wants_token or token is not None):
            return Answer(401)
        if path not in self.pages:
            return Answer(404, b"<html>404 - Not Found</html>")
        return Answer(200, self.pages[path])


@contextlib.contextmanager
def fake_imds() -> Iterator[FakeImds]:
    fake = FakeImds()
    with served(fake):
        yield fake
