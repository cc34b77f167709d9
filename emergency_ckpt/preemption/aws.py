"""AWS: what the instance metadata service says of a spot instance: its interruption, and a higher risk of one.

Version 2 of the service, with a token that is renewed in time; version 1 only where that was allowed. A page
that is not there (404) means that there is no notice. See "Spot Instance interruption notices", "EC2 instance
rebalance recommendations" and "Use the Instance Metadata Service" in Amazon's user guide of EC2.
"""

from __future__ import annotations

import abc
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from emergency_ckpt.preemption.machine import DMI, firmware_says
from emergency_ckpt.preemption.metadata_server import MetadataServer, NoAnswerError, NobodyError, Reply
from emergency_ckpt.preemption.notice import Notice, parse_json, parse_time, plain
from emergency_ckpt.preemption.source import NotHereError, SourceError

SPOT, REBALANCE = "aws-spot", "aws-rebalance"
# Amazon recommends to look every five seconds.
PERIOD_SECONDS = 5.0
REQUEST_SECONDS = 2.0
_TOKEN_SECONDS = 21600
_TOKEN = re.compile(r"[!-~]{1,1024}")
_WORD = re.compile(r"[a-z][a-z-]{0,39}")
_ENDPOINTS = {"ipv4": "http://169.254.169.254", "ipv6": "http://[fd00:ec2::254]"}

Version1 = Literal["never", "allowed"]


def is_aws(environment: Mapping[str, str] = os.environ, dmi: Path = DMI) -> bool:
    """Whether this seems to be an instance of EC2: a few small files and variables are looked at."""
    if environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        return True
    return firmware_says("amazon", ("sys_vendor", "board_vendor", "bios_vendor"), dmi)


def endpoint(environment: Mapping[str, str] = os.environ) -> str:
    """Where the service is reached. Raises NotHereError where it is switched off."""
    if environment.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        raise NotHereError("AWS_EC2_METADATA_DISABLED=true")
    if said := environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        return said
    mode = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "ipv4").lower()
    if mode not in _ENDPOINTS:
        raise NotHereError(f"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE is {mode!r:.40}; expected IPv4 or IPv6")
    return _ENDPOINTS[mode]


class Imds:
    """The instance metadata service. Of one thread, but for `close`."""

    def __init__(self, url: str, version1: Version1, seconds: float = REQUEST_SECONDS) -> None:
        self._server = MetadataServer(url)
        self._version1 = version1
        self._seconds = seconds
        self._token: str | None = None
        self._token_ends = 0.0

    def get(self, page: str) -> Reply:
        """Raises SourceError, NobodyError where nobody listens."""
        reply = self._get(page)
        if reply.status == 401 and self._token is not None:  # It ended early, or the service was restarted.
            self._token = None
            reply = self._get(page)
        if reply.status == 401:
            self._token = None
            raise SourceError(f"{self._server.url} refuses {page} (401): it wants version 2 of the protocol")
        if reply.status == 403:
            raise NotHereError(f"{self._server.url} refuses {page} (403): the service is switched off")
        if reply.status not in (200, 404):
            raise SourceError(f"{self._server.url} answers {page} with status {reply.status}")
        return reply

    def close(self) -> None:
        self._server.close()

    def _get(self, page: str) -> Reply:
        token = self._current_token()
        headers = {} if token is None else {"X-aws-ec2-metadata-token": token}
        return self._server.request("GET", page, headers, self._seconds)

    def _current_token(self) -> str | None:
        """None: version 1 is spoken."""
        if self._token is not None and time.monotonic() < self._token_ends:
            return self._token
        self._token = None
        try:
            self._token, seconds = self._ask_token()
        except NobodyError:
            raise
        except SourceError as error:
            if self._version1 == "allowed":
                return None
            raise SourceError(f"{error}; version 1 of the protocol is not allowed") from error
        # It is renewed when a tenth of its life is left.
        self._token_ends = time.monotonic() + 0.9 * seconds
        return self._token

    def _ask_token(self) -> tuple[str, float]:
        wanted = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
        try:
            reply = self._server.request("PUT", "/latest/api/token", wanted, self._seconds)
        except NoAnswerError as error:
            raise SourceError(
                f"{error}. In a container the hop limit of the instance may be too low: set its "
                "HttpPutResponseHopLimit to 2"
            ) from error
        if reply.status != 200:
            raise SourceError(f"{self._server.url} gives no token: status {reply.status}")
        if not _TOKEN.fullmatch(reply.text):
            raise SourceError(f"{self._server.url} gives a token that is none")
        said = reply.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        return reply.text, min(int(said), _TOKEN_SECONDS) if re.fullmatch(r"\d{1,9}", said) else _TOKEN_SECONDS


class _Page(abc.ABC):
    """A page of the service that says something when there is a notice. See `Source`."""

    name = ""
    page = ""

    def __init__(
        self,
        version1: Version1 = "never",
        environment: Mapping[str, str] = os.environ,
        request_seconds: float = REQUEST_SECONDS,
    ) -> None:
        """Raises NotHereError."""
        self.period_seconds = PERIOD_SECONDS
        self._known = is_aws(environment)
        self._imds = Imds(endpoint(environment), version1, request_seconds)
        self._is_spot: bool | None = None  # not known as long as nothing has answered

    def look(self) -> Notice | None:
        try:
            if self._is_spot is None:
                self._is_spot = self._look_at_life_cycle()
            reply = self._imds.get(self.page)
        except SourceError as error:
            if self._is_spot is None and (isinstance(error, NobodyError) or not self._known):
                raise NotHereError(str(error)) from error
            raise
        if reply.status == 404:
            return None
        try:
            return self.parse(reply.body, time.time())
        except ValueError as error:
            raise SourceError(f"{self.page} says what is no notice ({error})") from error

    def close(self) -> None:
        self._imds.close()

    @abc.abstractmethod
    def parse(self, body: bytes, now: float) -> Notice:
        """The notice that the page is. Raises ValueError for what is none."""

    def _look_at_life_cycle(self) -> bool:
        """Raises NotHereError for an instance that is known to be none of spot."""
        reply = self._imds.get("/latest/meta-data/instance-life-cycle")
        said = reply.text if reply.status == 200 else ""
        if _WORD.fullmatch(said) and said != "spot":
            raise NotHereError(f"this is no spot instance but {said}")
        return True


class SpotInterruption(_Page):
    """The notice, two minutes before, that a spot instance is stopped, terminated or sent to sleep."""

    name = SPOT
    page = "/latest/meta-data/spot/instance-action"

    def parse(self, body: bytes, now: float) -> Notice:
        return parse_spot_action(body, now)


class RebalanceRecommendation(_Page):
    """The word that a spot instance is at a higher risk."""

    name = REBALANCE
    page = "/latest/meta-data/events/recommendations/rebalance"

    def parse(self, body: bytes, now: float) -> Notice:
        return parse_rebalance(body, now)


def parse_spot_action(body: bytes, now: float) -> Notice:
    """`{"action": "terminate", "time": "2017-09-18T08:22:00Z"}`. Raises ValueError for anything else.

    A known action whose time cannot be read is a notice without a deadline.
    """
    raw = parse_json(body)
    action = raw.get("action") if isinstance(raw, dict) else None
    if not isinstance(action, str) or not _WORD.fullmatch(action):
        raise ValueError(f"{raw!r:.80}")
    try:
        deadline = parse_time(raw.get("time"))
    except ValueError:
        if action not in ("terminate", "stop", "hibernate"):
            raise
        deadline = None
    return Notice(SPOT, "terminate", now, deadline, action, plain(f"{action} {raw.get('time')}", 100))


def parse_rebalance(body: bytes, now: float) -> Notice:
    """`{"noticeTime": "2020-10-27T08:22:00Z"}`. Raises ValueError for anything else."""
    raw = parse_json(body)
    if not isinstance(raw, dict):
        raise ValueError(f"{raw!r:.80}")
    said = raw.get("noticeTime")
    parse_time(said)
    return Notice(REBALANCE, "rebalance", now, None, plain(f"recommended at {said}"), plain(str(said)))
