"""A file that appears: written by a preStop hook of Kubernetes, an operator, or a program that watches nodes.

It may be empty, or have JSON: `deadline` (a time with a zone, or seconds since 1970) or `seconds` (from the
time at which the file was written), `kind` and `detail`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import stat
import time
from pathlib import Path
from typing import cast

from emergency_ckpt.preemption.notice import Kind, Notice, parse_json, parse_time, plain
from emergency_ckpt.preemption.source import SourceError

FILE = "file"
PERIOD_SECONDS = 0.5
FRESH_SECONDS = 600.0
"""A file that lies there when the watch begins, and is older than this, was meant for somebody before."""
_SETTLE_SECONDS = 0.2
_MAX_BYTES = 64 * 1024
_log = logging.getLogger("emergency_ckpt.preemption")


class NoticeFile:
    """One such file. See `Source`."""

    name = FILE

    def __init__(self, path: Path) -> None:
        self.period_seconds = PERIOD_SECONDS
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._notice: Notice | None = None
        self._first = True

    def look(self) -> Notice | None:
        first, self._first = self._first, False
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            self._seen = self._notice = None
            return None
        except OSError as error:
            raise SourceError(f"{self._path} cannot be looked at: {error.strerror}") from error
        seen = (found.st_ino, found.st_mtime_ns, found.st_size)
        if seen == self._seen:
            return self._notice
        now = time.time()
        if first and now - found.st_mtime > FRESH_SECONDS:
            self._seen = seen
            _log.warning("%s is old and does not count; write it anew, or remove it", self._path)
            return None
        if 0 <= now - found.st_mtime < _SETTLE_SECONDS:
            return self._notice  # It may be being written.
        body = self._read()
        written = f"{found.st_ino}.{found.st_mtime_ns}.{hashlib.sha256(body).hexdigest()[:16]}"
        notice = dataclasses.replace(parse_file(body, found.st_mtime, now), id=written)
        self._seen, self._notice = seen, notice
        return notice

    def close(self) -> None:
        """A look at a file ends by itself."""

    def _read(self) -> bytes:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            with open(fd, "rb") as file:
                # What it says is for people; that it is there counts.
                return file.read(_MAX_BYTES) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        except OSError:
            return b""


def parse_file(body: bytes, written: float, now: float) -> Notice:
    """What a file says that was written at `written`. What cannot be read is a detail: the file counts."""
    deadline, kind, detail = None, "terminate", ""
    try:
        raw = parse_json(body) if body.strip() else {}
        if not isinstance(raw, dict):
            raise ValueError("no JSON object")
        kind, detail = raw.get("kind", kind), plain(str(raw.get("detail", "")))
        if (said := raw.get("deadline")) is not None:
            deadline = parse_time(said) if isinstance(said, str) else said
        elif (seconds := raw.get("seconds")) is not None:
            if type(seconds) not in (int, float):
                raise ValueError(f"no number of seconds: {seconds!r:.40}")
            deadline = written + seconds
        return Notice(FILE, cast(Kind, kind), now, deadline, detail)
    except (ValueError, OverflowError):
        return Notice(FILE, "terminate", now, None, plain(body.decode("ascii", "replace"), 200))
