"""The notices of an agent: what its sources say, and what people ask for, told to the trainers that listen.

They hear of it on the request that they hold open (`attachment`), as a line of JSON between the heartbeats.
What trainers pass on, which other hosts heard, is told to no trainer: they all know.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from aiohttp import web

from emergency_ckpt.agent.door import BY_OWNER, refuse
from emergency_ckpt.agent.orders import MAX_PROCESSES
from emergency_ckpt.preemption.notice import MAX_LINE_BYTES, Notice, new_id, parse_json

REQUEST = "request"
_MOST_KEPT = 100
_MOST_UNHEARD = 100
_REQUEST_SECONDS = 10.0
_log = logging.getLogger("emergency_ckpt.agent")


class Notices:
    """What there is to hear. Of one event loop, but for `tell_from_thread`.

    Args:
      here: hears of each notice that is of this host. elsewhere: hears of those that trainers pass on, and of
        which process's host they are, where that is known.
    """

    def __init__(
        self,
        here: Callable[[Notice], None] = lambda _: None,
        elsewhere: Callable[[Notice, int | None], None] = lambda _, __: None,
    ) -> None:
        self._here = here
        self._elsewhere = elsewhere
        self._listeners: set[asyncio.Queue[Notice | None]] = set()
        self._kept: list[Notice] = []
        self._loop = asyncio.get_running_loop()
        self.heard = 0

    def tell(self, notice: Notice) -> int:
        """Tells all that listen; returns how many they are."""
        self.heard += 1
        self._kept = [*self._kept[1 - _MOST_KEPT :], notice]
        told = 0
        for listener in self._listeners:
            with contextlib.suppress(asyncio.QueueFull):  # One that reads nothing is cut anyway.
                listener.put_nowait(notice)
                told += 1
        _log.warning("notice from %s; told to %d trainer(s)", notice, told)
        self._here(notice)
        return told

    def tell_from_thread(self, notice: Notice) -> None:
        with contextlib.suppress(RuntimeError):  # The loop has ended.
            self._loop.call_soon_threadsafe(self.tell, notice)

    @contextlib.contextmanager
    def listening(self) -> Iterator[asyncio.Queue[Notice | None]]:
        """What comes from now on, and what stands; None: there will be no more."""
        queue: asyncio.Queue[Notice | None] = asyncio.Queue(_MOST_UNHEARD)
        for notice in self.standing():
            queue.put_nowait(notice)
        self._listeners.add(queue)
        try:
            yield queue
        finally:
            self._listeners.discard(queue)

    @property
    def listeners(self) -> int:
        """How many trainers listen: those that save when they hear that their host goes away."""
        return len(self._listeners)

    def end(self) -> None:
        """Whoever listens hears that there will be no more."""
        for listener in self._listeners:
            with contextlib.suppress(asyncio.QueueFull):
                listener.put_nowait(None)

    def standing(self) -> list[Notice]:
        """Those that concern whoever begins now."""
        now = time.time()
        return [notice for notice in self._kept if notice.stands(now)]

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/notices", self._show), web.post("/v1/notices", self._take)]

    async def _show(self, request: web.Request) -> web.Response:
        return web.json_response([dataclasses.asdict(notice) for notice in self.standing()])

    async def _take(self, request: web.Request) -> web.Response:
        """Somebody on this host asks for a save, or says that the host goes away; or a trainer passes on."""
        if not request.get(BY_OWNER):
            return refuse(403, "not_of_this_host", "only who has the key of this host may ask for a save")
        data = bytearray()
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                async for chunk in request.content.iter_chunked(MAX_LINE_BYTES):
                    data += chunk
                    if len(data) > MAX_LINE_BYTES:
                        return refuse(413, "too_large", "the request is too long")
            raw = parse_json(bytes(data))
            passed_on = _passed_on(raw)
            notice = passed_on[0] if passed_on else _asked(raw)
        except TimeoutError:
            return refuse(408, "too_slow", "the request did not arrive in time")
        except ValueError as error:
            return refuse(400, "malformed", str(error))
        if passed_on is None:
            return web.json_response({"told": self.tell(notice)})
        self._elsewhere(*passed_on)
        return web.json_response({"told": 0})


def _passed_on(raw: Any) -> tuple[Notice, int | None] | None:
    """A notice with its source, and the process whose host goes away; None for what is no such thing.

    Raises ValueError for one that cannot be.
    """
    if not isinstance(raw, dict) or "source" not in raw:
        return None
    process = raw.pop("process", None)
    notice = Notice.from_json(raw)
    if notice.kind != "terminate":
        raise ValueError(f"only the end of a host is passed on, not {notice.kind!r}")
    if process is not None and (type(process) is not int or not 0 <= process < MAX_PROCESSES):
        raise ValueError(f"no process: {process!r:.40}")
    return notice, process


def _asked(raw: Any) -> Notice:
    if not isinstance(raw, Mapping) or not set(raw) <= {"kind", "detail", "deadline", "id"}:
        raise ValueError("a request has a kind, a detail, a deadline and an id, and nothing else")
    kind, detail, deadline = raw.get("kind", "save"), raw.get("detail", ""), raw.get("deadline")
    # Each request is one of its own, unless it says by an id, or by a deadline, of which event it is.
    known_by = raw.get("id", "") or ("" if deadline is not None else new_id())
    return Notice(REQUEST, kind, time.time(), deadline, detail, known_by)
