"""The shard server: what an agent answers, page by page. It tells what lies on disk, and changes nothing there.

It serves ids only, never paths, to holders of its token. Every wait has a limit, and every size that a request
may cause is bounded: connections, bodies, answers, and requests that are worked on at a time.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import io
import logging
import os
import ssl
import stat
import time
from collections.abc import AsyncIterator, Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import CONTENT_TYPE_LATEST

from emergency_ckpt.agent.block_ranges import MAX_REQUEST_BYTES, Asked
from emergency_ckpt.agent.counters import Counters
from emergency_ckpt.agent.door import BY_OWNER, REFUSAL, Door, MalformedRequests, guard, refuse
from emergency_ckpt.agent.drains import Drains
from emergency_ckpt.agent.endpoint import FORMAT_VERSION
from emergency_ckpt.agent.job_pages import JobPages
from emergency_ckpt.agent.last_calls import LastCalls
from emergency_ckpt.agent.memory import Order
from emergency_ckpt.agent.notices import Notices
from emergency_ckpt.agent.orders import Registration
from emergency_ckpt.agent.presence import Condition
from emergency_ckpt.agent.progress import ProgressBoard
from emergency_ckpt.agent.sending import Body, Ending, Sender
from emergency_ckpt.agent.slot_id import SlotId, is_layout_hash
from emergency_ckpt.agent.slots_on_disk import SlotOnDisk, SlotsOnDisk
from emergency_ckpt.agent.trainers import Trainers, is_trainer_id

HEARTBEAT_SECONDS = 2.0
HEARTBEAT = b".\n"
_SLOT = "/v1/runs/{run}/steps/{generation}/{step}/slots/{layout}/{position}"
_DISK_THREADS = 4
_KEEP_ALIVE_SECONDS = 75.0
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one server takes on.

    Attributes:
      connections: at a time; whoever comes beyond that is told to come back.
      answers: requests for slots and layouts that are worked on at a time; others wait `queue_seconds`.
      request_seconds: for a request to arrive whole.
      stall_seconds: for which a client may read nothing.
      leave_seconds: for what is being sent when the agent leaves.
    """

    connections: int = 512
    answers: int = 32
    queue_seconds: float = 20.0
    request_seconds: float = 10.0
    stall_seconds: float = 20.0
    leave_seconds: float = 5.0


class ShardServer:
    """Serves the slots below one ramdisk directory. All methods are of one event loop.

    `left` is set when somebody asked this agent to leave; `flushes` counts what is left of dead trainers,
    `stalled` tells of those that hang, `is_current` says whether its directory is still there, `remember` puts
    down what is left to do (in any thread).
    """

    def __init__(
        self,
        root: Path,
        token: str,
        owner: str,
        limits: ServerLimits,
        on_death: Callable[[str, Registration], None] = lambda _, __: None,
        condition: Callable[[str], Condition] = lambda _: "gone",
    ) -> None:
        """`owner`: the key of this host. `on_death`, `condition`: see `Trainers`."""
        self.counters = Counters()
        self.trainers = Trainers(on_death, condition)
        self.left = asyncio.Event()
        self._root = root
        self._limits = limits
        self._slots = SlotsOnDisk(root)
        self.board = ProgressBoard()
        self.last_calls = LastCalls(self.trainers, self.board, self.counters, self._largest_slot)
        self.notices = Notices(self.last_calls.hear_here, self.last_calls.hear_of_other)
        self.drains = Drains(self._slots, self.counters)
        self.drains.orders_changed = lambda: self.remember()
        self.remember: Callable[[], None] = lambda: None
        self.flushes: Callable[[], int] = lambda: 0
        self.is_current: Callable[[], bool] = lambda: True
        self.stalled: Callable[[], list[dict[str, Any]]] = list
        self._pages = JobPages(
            self.trainers,
            self.drains,
            self.board,
            self.last_calls,
            limits.request_seconds,
            lambda: self.remember(),
        )
        self._started = time.time()
        self._sender = Sender(limits.answers, limits.stall_seconds)
        self._places = asyncio.Semaphore(limits.answers)
        self._disk = concurrent.futures.ThreadPoolExecutor(_DISK_THREADS, "emergency_ckpt disk")
        self._stopping = asyncio.Event()
        self._app = web.Application(
            middlewares=[self._count, guard(token, owner)], client_max_size=MAX_REQUEST_BYTES
        )
        self._app.add_routes(
            [
                web.get("/healthz", self._health),
                web.get("/metrics", self._metrics),
                web.get("/v1/status", self._status),
                web.get("/v1/attach", self._attach),
                web.post("/v1/leave", self._leave),
                web.get("/v1/inventory", self._inventory),
                web.get("/v1/layouts/{hash}", self._layout),
                web.get(f"{_SLOT}/manifest", self._manifest),
                web.post(f"{_SLOT}/shards", self._shards),
                *self._pages.routes(),
                *self.notices.routes(),
            ]
        )
        log = logging.getLogger("emergency_ckpt.agent.http")
        log.addFilter(MalformedRequests(self.counters.refusals.labels("no_http").inc))
        self._runner = web.AppRunner(
            self._app,
            logger=log,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,
            auto_decompress=False,
            keepalive_timeout=_KEEP_ALIVE_SECONDS,
            shutdown_timeout=limits.leave_seconds,
        )
        self._door: Door | None = None

    async def start(self, host: str, ports: Sequence[int], context: ssl.SSLContext | None) -> int:
        """Listens on the first of these ports that can be had (0: any free one) and serves from now on.

        Returns the port. Raises OSError where it cannot listen on any.
        """
        await self._runner.setup()
        assert self._runner.server is not None
        self._door = Door(self._runner.server, self._limits.connections, self._limits.request_seconds)
        self.counters.watch("trainers", "trainers that live", lambda: self.trainers.count)
        self.counters.watch("running_drains", "drains that have not ended", lambda: self.drains.running)
        self.counters.watch(
            "running_retries", "those that are tried again after a failure", lambda: self.drains.retries
        )
        self.counters.watch(
            "persistent_step_age_seconds",
            "since this agent committed a step last; NaN where it has committed none",
            lambda: self.drains.seconds_since_commit,
        )
        self.counters.watch("running_flushes", "flushes that have not ended", lambda: self.flushes())
        self.counters.watch(
            "running_last_calls", "last calls that have not ended", lambda: self.last_calls.pending
        )
        self.counters.watch(
            "stalled_trainers", "trainers whose step takes too long", lambda: len(self.stalled())
        )
        self.counters.watch("notices", "notices that were heard", lambda: self.notices.heard)
        self.counters.watch("connections", "open connections", lambda: self._connections.connections)
        self._door.refused = self.counters.refused_connections.inc
        for port in ports[:-1]:
            with contextlib.suppress(OSError):
                return await self._door.open(host, port, context)
        return await self._door.open(host, ports[-1], context)

    async def look_around(self) -> None:
        """Deals with trainers that died unattached, and with what an agent before this one was asked for.

        Notices that stand concern trainers that came after them, too.
        """
        self.trainers.look()
        self.last_calls.look()

        def is_left_alone(order: Order) -> bool:
            """A trainer that lives does it itself, or asks again."""
            return self.trainers.states(order.destination.life).get(order.share.position) != "alive"

        await self._on_disk(lambda: self.drains.resume(is_left_alone))

    def _largest_slot(self) -> int:
        """Reads the disk."""
        return max((slot.bytes for slot in self._slots.all()), default=0)

    def slot_runs(self) -> set[str]:
        """The runs whose slots lie here. Reads the disk."""
        return {slot.id.run for slot in self._slots.all()}

    async def stop(self) -> None:
        """Accepts nothing more, lets what is being sent end for a while, then cuts it."""
        if self._door is not None:
            await self._door.close()
        self._stopping.set()
        self.notices.end()
        cutting = asyncio.get_running_loop().call_later(self._limits.leave_seconds, self._sender.cut_all)
        await self._runner.cleanup()
        cutting.cancel()
        self._sender.close()
        self._pages.close()
        self._disk.shutdown(wait=True)

    @property
    def _connections(self) -> Door:
        assert self._door is not None
        return self._door

    # What an agent is.

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self.counters.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _status(self, request: web.Request) -> web.Response:
        # Whoever asks is about to use this agent.
        with self.trainers.in_use():
            slots = await self._on_disk(self._slots.all)
        return web.json_response(
            {
                "format": FORMAT_VERSION,
                "version": metadata.version("emergency_ckpt"),
                "pid": os.getpid(),
                "directory": str(self._root),
                "started": self._started,
                "runs": sorted({slot.id.run for slot in slots}),
                "trainers": self.trainers.count,
                "drains": self.drains.running,
                "flushes": self.flushes(),
                "last_calls": self.last_calls.pending,
                "stalled": self.stalled(),
                "connections": self._connections.connections,
                "bytes_served": self.counters.bytes_served_total,
                "leaving": self.left.is_set() or not self.is_current(),
            }
        )

    async def _attach(self, request: web.Request) -> web.StreamResponse:
        """Held open by a trainer as long as it lives; the heartbeat tells it that the agent lives, too.

        One that listens is told of notices in between.
        """
        trainer = request.query.get("trainer")
        if trainer is not None and not is_trainer_id(trainer):
            return refuse(400, "malformed", "this is not the id of a trainer")
        response = web.StreamResponse(headers={"Cache-Control": "no-store"})
        response.enable_chunked_encoding()
        listens = self.notices.listening() if "notices" in request.query else contextlib.nullcontext(None)
        with self.trainers.attached(trainer), listens as notices:
            await response.prepare(request)
            while not self._stopping.is_set():
                await response.write(HEARTBEAT)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        if notices is None:
                            await self._stopping.wait()
                        elif (notice := await notices.get()) is not None:
                            await response.write(notice.to_line())
        return response

    async def _leave(self, request: web.Request) -> web.Response:
        if not request.get(BY_OWNER):
            return refuse(403, "not_of_this_host", "only who has the key of this host may end its agent")
        self.left.set()
        return web.json_response({"leaving": True}, status=202)

    # What it holds.

    async def _inventory(self, request: web.Request) -> web.Response:
        slots = await self._on_disk(self._slots.all)
        return web.json_response([_told(slot) for slot in slots])

    async def _layout(self, request: web.Request) -> web.Response:
        layout_hash = request.match_info["hash"]
        if not is_layout_hash(layout_hash):
            return refuse(400, "malformed", "this is not the hash of a layout")
        async with self._place() as place:
            if not place:
                return _busy()
            data = await self._on_disk(lambda: self._slots.layout_bytes(layout_hash))
            if data is None:
                return refuse(404, "layout_not_here", "no directory here has this layout")
            return await self._send_bytes(request, data)

    async def _manifest(self, request: web.Request) -> web.Response:
        try:
            wanted = SlotId.parse(request.match_info)
        except ValueError as error:
            return refuse(400, "malformed", str(error))
        async with self._place() as place:
            if not place:
                return _busy()
            slot = await self._on_disk(lambda: self._slots.find(wanted))
            data = await self._on_disk(lambda: self._slots.manifest_bytes(slot)) if slot else None
            if data is None:
                return _not_here(wanted)
            return await self._send_bytes(request, data)

    async def _send_bytes(self, request: web.Request, data: bytes) -> web.Response:
        """Whole, before the place is given back: so many answers are in memory at a time and no more."""
        response = web.Response(body=data, content_type="application/octet-stream")
        try:
            async with asyncio.timeout(self._limits.stall_seconds + len(data) / MAX_REQUEST_BYTES):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _shards(self, request: web.Request) -> web.StreamResponse:
        try:
            wanted = SlotId.parse(request.match_info)
        except ValueError as error:
            return refuse(400, "malformed", str(error))
        async with self._place() as place:
            if not place:
                return _busy()
            try:
                async with asyncio.timeout(self._limits.request_seconds):
                    asked = await request.read()
            except TimeoutError:
                return refuse(408, "too_slow", "the request did not arrive in time")
            return await self._answer(request, wanted, asked)

    async def _answer(self, request: web.Request, wanted: SlotId, asked: bytes) -> web.StreamResponse:
        try:
            body = await self._on_disk(lambda: self._body(wanted, asked))
        except ValueError as error:
            return refuse(400, "malformed", str(error))
        except OSError:
            body = None
        if body is None:
            return _not_here(wanted)
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        began = time.monotonic()
        sending = asyncio.ensure_future(self._sender.send(request, response, body))
        try:
            with self.trainers.in_use():
                ending = await asyncio.shield(sending)
        except asyncio.CancelledError:
            # The client went away, maybe with all of it. The thread that sends knows, and keeps its place.
            await asyncio.wait([sending])
            if sending.exception() is None:
                self._count_sent(sending.result(), body, began)
            raise
        self._count_sent(ending, body, began)
        return response

    def _count_sent(self, ending: Ending, body: Body, began: float) -> None:
        self.counters.count_answer(ending, body.shards, body.nbytes, time.monotonic() - began)

    def _body(self, wanted: SlotId, asked: bytes) -> Body | None:
        """The pieces of a slot that were asked for; None where it is not here, or not usable.

        Raises ValueError for a request that no client of ours makes, OSError for data that cannot be opened.
        """
        ranges = Asked.from_bytes(asked)
        slot = self._slots.find(wanted)
        places = self._slots.places(slot) if slot is not None else None
        if slot is None or places is None:
            return None
        pieces = ranges.pieces(places)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(slot.data, flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return None
        asked_for = len(ranges.whole) + len(ranges.parts)
        return Body(io.FileIO(descriptor), pieces, slot.is_current, asked_for)

    # How requests are handled.

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._connections.hear(request)
        try:
            response = await handler(request)
        except ConnectionError:
            # The client is gone; nobody reads what is answered.
            if request.transport is not None:
                request.transport.abort()
            response = refuse(400, "client_gone", "the client closed the connection")
        resource = request.match_info.route.resource
        page = resource.canonical if resource is not None else "other"
        self.counters.requests.labels(page, str(response.status)).inc()
        if (code := response.get(REFUSAL)) is not None:
            self.counters.refusals.labels(code).inc()
        return response

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[bool]:
        """One of the places for answers; False where none became free in time."""
        try:
            async with asyncio.timeout(self._limits.queue_seconds):
                await self._places.acquire()
        except TimeoutError:
            yield False
            return
        try:
            yield True
        finally:
            self._places.release()

    async def _on_disk(self, read: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, read)


def _told(slot: SlotOnDisk) -> dict[str, Any]:
    return {
        "run": slot.id.run,
        "nonce": slot.nonce,
        "generation": slot.id.step.generation,
        "step": slot.id.step.step,
        "layout": slot.id.layout,
        "position": slot.id.position,
        "digest": slot.digest,
        "listed": slot.listed,
        "bytes": slot.bytes,
        "missing": slot.missing,
        "extras_of": list(slot.extras_of),
    }


def _not_here(wanted: SlotId) -> web.Response:
    return refuse(404, "slot_not_here", f"{wanted} is not sealed here, or not any more")


def _busy() -> web.Response:
    return refuse(503, "busy", "too many requests at a time: try again")
