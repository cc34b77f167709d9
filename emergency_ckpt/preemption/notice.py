"""What a notice is: a word that this host, or the job on it, is about to end, or that somebody wants a save.

It travels between processes as one line of JSON; whatever is read is checked before it is used. Where it begins
it gets an id, by which it is known wherever it comes to, and however often.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from datetime import UTC, datetime
from typing import Any, Literal, get_args

Kind = Literal["terminate", "migrate", "rebalance", "save"]
"""This host goes away; it stands still while it is moved; it may go away; somebody asks for a save."""

MAX_LINE_BYTES = 8192
STANDS_SECONDS = 120.0
"""How long a notice without a deadline is told to trainers that come after it."""
NoticeKey = tuple[str, str]
"""The source, and what tells its notices apart."""
_MAX_SOURCE = 64
_MAX_ID = 200
_MOST_KNOWN = 1000
_MAX_DETAIL = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Notice:
    """One notice. Raises ValueError for what is none.

    Attributes:
      source: who said so, such as `aws-spot`.
      kind: what is going to happen.
      received: when it was heard of, in seconds since 1970.
      deadline: when it happens, in seconds since 1970; None where that is not known.
      detail: what was said, for people.
      id: tells the event from others of the source, and is the same for whoever hears of it, as often as it is
        looked at; without one that are the kind, the deadline and the detail.
    """

    source: str
    kind: Kind
    received: float
    deadline: float | None = None
    detail: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"no kind of notice: {self.kind!r:.40}")
        texts = (
            ("source", self.source, _MAX_SOURCE),
            ("detail", self.detail, _MAX_DETAIL),
            ("id", self.id, _MAX_ID),
        )
        for name, text, most in texts:
            if not isinstance(text, str) or len(text) > most or not (text.isprintable() and text.isascii()):
                raise ValueError(f"the {name} of a notice is no plain text of at most {most}: {text!r:.80}")
        for moment in (self.received, self.deadline):
            if moment is not None:
                _moment(moment)

    @property
    def key(self) -> NoticeKey:
        """What tells two notices apart: not when they were heard of."""
        return (self.source, self.id or f"{self.kind} {self.deadline} {self.detail}")

    @property
    def asks_for_save(self) -> bool:
        """Whether the job is to save now. A move or a risk is told, and training goes on."""
        return self.kind in ("terminate", "save")

    def stands(self, now: float) -> bool:
        """Whether trainers that begin at `now` are told of it. A wish for a save concerns those before."""
        if self.kind == "save":
            return False
        return now < (self.received + STANDS_SECONDS if self.deadline is None else self.deadline)

    def to_line(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @classmethod
    def from_json(cls, raw: Any) -> Notice:
        """Raises ValueError for anything that was not made by `to_line`; programs may leave out the id."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(raw, dict) or {*raw, "id"} != names:
            raise ValueError(f"no notice: {raw!r:.80}")
        return cls(**raw)

    @classmethod
    def from_line(cls, line: bytes) -> Notice:
        """Raises ValueError."""
        return cls.from_json(parse_json(line))

    def __str__(self) -> str:
        when = "" if self.deadline is None else f", at {_said(self.deadline)}"
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.source}: {_WORDS[self.kind]}{when}{detail}"


class Known:
    """The notices that were heard of, the latest thousand."""

    def __init__(self) -> None:
        self._keys: dict[NoticeKey, None] = {}

    def is_new(self, notice: Notice) -> bool:
        """Whether it was not heard of before; it is known from now on."""
        if notice.key in self._keys:
            return False
        if len(self._keys) >= _MOST_KNOWN:
            del self._keys[next(iter(self._keys))]
        self._keys[notice.key] = None
        return True


def new_id() -> str:
    """Of an event that is heard of once, where it is."""
    return secrets.token_hex(8)


_WORDS = {
    "terminate": "this host goes away",
    "migrate": "this host will stand still while it is moved",
    "rebalance": "this host may go away soon",
    "save": "a save is asked for",
}


def parse_json(data: bytes) -> Any:
    """Any JSON. Raises ValueError for what is none, or nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_time(text: Any) -> float:
    """The moment that an RFC 3339 time with a zone names, in seconds since 1970. Raises ValueError."""
    if not isinstance(text, str) or len(text) > 64:
        raise ValueError(f"no time: {text!r:.80}")
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"a time without a zone: {text!r}")
    try:
        return _moment(moment.timestamp())
    except OverflowError as error:
        raise ValueError(f"no time: {text!r}") from error


def plain(text: str, most: int = _MAX_DETAIL) -> str:
    """Text of others as a detail may have it."""
    return "".join(c if c.isascii() and c.isprintable() else " " for c in text[:most]).strip()


def _moment(seconds: Any) -> float:
    if type(seconds) not in (int, float) or not math.isfinite(seconds) or not 0 <= seconds < 1e11:
        raise ValueError(f"no moment: {seconds!r:.40}")
    return float(seconds)


def _said(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
