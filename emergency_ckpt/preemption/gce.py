"""Google Compute Engine: preemption and maintenance of this machine, as its metadata server says.

Each look asks for the value, and then waits for a change of it, so that a notice arrives within moments. See
"View and query VM metadata" and "Query the metadata server for maintenance event notices" in Google's
documentation of Compute Engine.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import os
import re
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from emergency_ckpt.preemption.machine import DMI, boot_id, firmware_says
from emergency_ckpt.preemption.metadata_server import MetadataServer, NobodyError, Reply
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.preemption.source import NotHereError, SourceError

PREEMPTED, MAINTENANCE = "gce-preempted", "gce-maintenance"
REQUEST_SECONDS = 3.0
WAIT_SECONDS = 60
# What Google gives at least: from the notice to the end of a preempted machine, and to the begin of an event.
PREEMPTION_SECONDS = 30.0
MAINTENANCE_SECONDS = 60.0
_ETAG = re.compile(r"[!-~]{1,200}")


def is_gce(environment: Mapping[str, str] = os.environ, dmi: Path = DMI) -> bool:
    """Whether this seems to be a machine of Compute Engine: two small files and a variable are looked at."""
    if environment.get("GCE_METADATA_HOST"):
        return True
    return firmware_says("google", ("product_name", "bios_vendor"), dmi)


def endpoint(environment: Mapping[str, str] = os.environ) -> str:
    """Where the metadata server is reached; by its address, which takes no name service."""
    return f"http://{environment.get('GCE_METADATA_HOST') or '169.254.169.254'}"


class _Value(abc.ABC):
    """A value of the metadata server that changes when there is a notice. See `Source`."""

    name = ""
    page = ""
    period_seconds = 0.0

    def __init__(self, environment: Mapping[str, str] = os.environ, wait_seconds: int = WAIT_SECONDS) -> None:
        """Raises NotHereError."""
        self._known = is_gce(environment)
        self._server = MetadataServer(endpoint(environment))
        self._wait_seconds = wait_seconds
        self._etag: str | None = None
        self._value: str | None = None
        self._notice: Notice | None = None
        self._times: collections.Counter[str] = collections.Counter()  # that each value has begun

    def look(self) -> Notice | None:
        reply = self._ask()
        value = reply.text
        etag = reply.headers.get("etag", "")
        self._etag = etag if _ETAG.fullmatch(etag) else None
        # Without it there is nothing to wait with.
        self.period_seconds = 0.0 if self._etag else 5.0
        if value != self._value:
            try:
                notice = self.parse(value, time.time())
            except ValueError as error:
                self._etag = None
                raise SourceError(f"{self.page} says what is no value of it ({error})") from error
            self._value, self._notice = value, self._named(notice, value)
        return self._notice

    def close(self) -> None:
        self._server.close()

    def _named(self, notice: Notice | None, value: str) -> Notice | None:
        """The server tells no events apart: here one is a value from when it begins until it is another one.

        Who looks anew, in a later process, names what stands by then as one that has looked all the time.
        """
        self._times[value] += 1
        event = f"{value} {self._times[value]} of boot {boot_id()}"
        return None if notice is None else dataclasses.replace(notice, id=event)

    @abc.abstractmethod
    def parse(self, value: str, now: float) -> Notice | None:
        """The notice that a value is, if any. Raises ValueError for what is no value."""

    def _ask(self) -> Reply:
        page, seconds = self.page, REQUEST_SECONDS
        if self._etag is not None:
            query = {"wait_for_change": "true", "timeout_sec": self._wait_seconds, "last_etag": self._etag}
            page, seconds = f"{page}?{urllib.parse.urlencode(query)}", seconds + self._wait_seconds
        self._etag = None  # After a failure the value is asked for without waiting.
        try:
            reply = self._server.request("GET", page, {"Metadata-Flavor": "Google"}, seconds)
        except SourceError as error:
            if self._value is None and (isinstance(error, NobodyError) or not self._known):
                raise NotHereError(str(error)) from error
            raise
        if reply.status == 200 and reply.headers.get("metadata-flavor") == "Google":
            return reply
        why = f"{self._server.url} answers {self.page} with status {reply.status}"
        if self._value is None and reply.status == 404:
            raise NotHereError(why)
        if self._value is None and reply.headers.get("metadata-flavor") != "Google" and not self._known:
            raise NotHereError(f"{why}, and not as Google's metadata server does")
        raise SourceError(why)


class Preemption(_Value):
    """Whether this machine is being preempted."""

    name = PREEMPTED
    page = "/computeMetadata/v1/instance/preempted"

    def parse(self, value: str, now: float) -> Notice | None:
        return parse_preempted(value, now)


class MaintenanceEvent(_Value):
    """What maintenance of its host does to this machine."""

    name = MAINTENANCE
    page = "/computeMetadata/v1/instance/maintenance-event"

    def parse(self, value: str, now: float) -> Notice | None:
        return parse_maintenance_event(value, now)


def parse_preempted(value: str, now: float) -> Notice | None:
    """Raises ValueError for anything but TRUE and FALSE."""
    if value not in ("TRUE", "FALSE"):
        raise ValueError(f"{value!r:.80}")
    return (
        Notice(PREEMPTED, "terminate", now, now + PREEMPTION_SECONDS, "preempted") if value == "TRUE" else None
    )


def parse_maintenance_event(value: str, now: float) -> Notice | None:
    """Raises ValueError for anything but NONE and the documented events."""
    deadline = now + MAINTENANCE_SECONDS
    match value:
        case "NONE":
            return None
        case "MIGRATE_ON_HOST_MAINTENANCE":
            return Notice(MAINTENANCE, "migrate", now, deadline, value)
        case "TERMINATE_ON_HOST_MAINTENANCE":
            return Notice(MAINTENANCE, "terminate", now, deadline, value)
        case _:
            raise ValueError(f"{value!r:.80}")
