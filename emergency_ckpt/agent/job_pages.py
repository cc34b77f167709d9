"""What an agent answers about its trainers and drains.

Only who has the key of this host, which lies in a file that its owner alone can read, may say where steps are
drained to, and how far it is. Agents of other hosts may ask for drains of a life that a trainer of this host
has told of.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from aiohttp import web

from emergency_ckpt.agent.door import BY_OWNER, refuse
from emergency_ckpt.agent.drains import Drains, DrainState, SlotNotHereError, TooManyDrainsError
from emergency_ckpt.agent.last_calls import LastCalls
from emergency_ckpt.agent.lives import LifeReport
from emergency_ckpt.agent.orders import (
    MAX_ORDER_BYTES,
    Destination,
    Life,
    Share,
    destination_from_json,
    life_from_json,
    parse_json,
    registration_from_json,
    share_from_json,
)
from emergency_ckpt.agent.progress import MAX_PROGRESS_BYTES, Progress, ProgressBoard
from emergency_ckpt.agent.trainers import Trainers, is_trainer_id
from emergency_ckpt.errors import EmergencyCheckpointError

_LONGEST_WAIT_SECONDS = 5.0
# Of what other hosts ask: parsed, JSON takes many times its length.
_MAX_LIFE_BYTES = 64 * 1024
_MAX_SHARE_BYTES = 1024 * 1024
_THREADS = 4
_WAITING_THREADS = 64
_T = TypeVar("_T")


class JobPages:
    """The pages, for one event loop."""

    def __init__(
        self,
        trainers: Trainers,
        drains: Drains,
        board: ProgressBoard,
        calls: LastCalls,
        request_seconds: float,
        remember: Callable[[], None],
    ) -> None:
        """`remember`: called in a thread before a trainer hears that what it said was taken."""
        self._remember = remember
        self._board = board
        self._calls = calls
        self._trainers = trainers
        self._drains = drains
        self._request_seconds = request_seconds
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, "emergency_ckpt orders")
        self._waiting = concurrent.futures.ThreadPoolExecutor(_WAITING_THREADS, "emergency_ckpt waiting")

    def routes(self) -> list[web.RouteDef]:
        return [
            web.put("/v1/trainers/{trainer}", self._register),
            web.delete("/v1/trainers/{trainer}", self._say_goodbye),
            web.put("/v1/trainers/{trainer}/progress", self._take_progress),
            web.post("/v1/drains", self._drain),
            web.get("/v1/drains/{drain}", self._look),
            web.delete("/v1/drains/{drain}", self._give_up),
            web.post("/v1/lives", self._look_at_life),
            web.post("/v1/lives/drains", self._drain_of_life),
        ]

    def close(self) -> None:
        """Ends the threads; nothing is asked any more."""
        self._threads.shutdown(wait=True)
        self._waiting.shutdown(wait=True)

    # Of the trainers of this host.

    async def _register(self, request: web.Request) -> web.Response:
        trainer = request.match_info["trainer"]
        if (refusal := _only_owner(request)) is not None:
            return refusal
        try:
            registration = await self._parsed(request, registration_from_json)
        except ValueError as error:
            return refuse(400, "malformed", str(error))
        if not is_trainer_id(trainer) or not self._trainers.register(trainer, registration):
            return refuse(409, "not_attached", "only a trainer that is attached can say what it works on")
        self._drains.forget_left(registration.life, registration.process)
        await self._on_disk(self._remember)
        return web.json_response({"registered": True})

    async def _say_goodbye(self, request: web.Request) -> web.Response:
        if (refusal := _only_owner(request)) is not None:
            return refusal
        self._trainers.leave(request.match_info["trainer"])
        await self._on_disk(self._remember)
        return web.json_response({"left": True})

    async def _take_progress(self, request: web.Request) -> web.Response:
        trainer = request.match_info["trainer"]
        if (refusal := _only_owner(request)) is not None:
            return refusal
        try:
            progress = await self._parsed(request, Progress.from_json, MAX_PROGRESS_BYTES)
        except ValueError as error:
            return refuse(400, "malformed", str(error))
        if not self._trainers.knows(trainer):
            return refuse(409, "not_attached", "only a trainer that is attached can say how far it is")
        self._board.note(trainer, progress)
        return web.json_response({"noted": True})

    async def _drain(self, request: web.Request) -> web.Response:
        if (refusal := _only_owner(request)) is not None:
            return refusal
        # A trainer may die right after it asked: what it asked for is done all the same.
        return await asyncio.shield(self._take_order(request))

    async def _take_order(self, request: web.Request) -> web.Response:
        try:
            destination, share = await self._parsed(request, _order)
        except ValueError as error:
            return refuse(400, "malformed", str(error))
        return await self._begin(destination, share, ordered=True)

    async def _look(self, request: web.Request) -> web.Response:
        try:
            seconds = min(float(request.query.get("wait", "0")), _LONGEST_WAIT_SECONDS)
        except ValueError:
            return refuse(400, "malformed", "the time to wait is no number")
        drain = request.match_info["drain"]
        look = functools.partial(self._drains.look, drain, seconds)
        state = await asyncio.get_running_loop().run_in_executor(self._waiting, look)
        return refuse(404, "no_such_drain", "this drain is not known here") if state is None else _told(state)

    async def _give_up(self, request: web.Request) -> web.Response:
        try:
            reason = await self._parsed(request, lambda raw: str(raw["reason"])[:2000], _MAX_LIFE_BYTES)
        except (ValueError, KeyError) as error:
            return refuse(400, "malformed", str(error))
        if not self._drains.give_up(request.match_info["drain"], reason):
            return refuse(404, "no_such_drain", "this drain is not known here")
        return web.json_response({"given_up": True})

    # Of the agents of other hosts, in the name of a life whose trainers are gone, or have no time left.

    async def _look_at_life(self, request: web.Request) -> web.Response:
        try:
            life = await self._parsed(request, life_from_json, _MAX_LIFE_BYTES)
        except ValueError as error:
            return refuse(400, "malformed", str(error))
        return web.json_response(self._report(life).to_json())

    def _report(self, life: Life) -> LifeReport:
        known = {
            id_: each for id_, each in self._trainers.registered().items() if each.registration.life == life
        }
        told = {each.registration.process: self._board.of(id_) for id_, each in known.items()}
        return LifeReport(
            {each.registration.process: each.state for each in known.values()},
            self._drains.running,
            self._drains.writing,
            tuple(self._drains.of_life(life)),
            self._calls.report(life),
            self._calls.leaving,
            {process: (said.progress.step, said.age_seconds) for process, said in told.items() if said},
        )

    async def _drain_of_life(self, request: web.Request) -> web.Response:
        try:
            life, share, urgent = await self._parsed(request, _order_of_life, _MAX_SHARE_BYTES)
        except ValueError as error:
            return refuse(400, "malformed", str(error))
        registration = self._trainers.find(life)
        if registration is None or not (registration.flush or (urgent and self._calls.allows(life))):
            return refuse(404, "no_such_life", "no trainer of this host has told of this life of the run")
        if not urgent:
            # What waits for parts of this life by now waits in vain: this attempt takes its place.
            self._drains.give_up_waiting(life, "its trainers are gone, and the agents begin anew")
        return await self._begin(registration.destination, share)

    # Of both.

    async def _begin(self, destination: Destination, share: Share, *, ordered: bool = False) -> web.Response:
        begin = functools.partial(self._drains.begin, destination, share, ordered=ordered)
        try:
            with self._trainers.in_use():
                drain = await self._on_disk(begin)
        except SlotNotHereError as error:
            return refuse(404, "slot_not_here", str(error))
        except TooManyDrainsError as error:
            return refuse(503, "too_many_drains", str(error))
        except EmergencyCheckpointError as error:
            return refuse(409, "cannot_drain", str(error))
        return web.json_response({"drain": drain}, status=202)

    async def _parsed(
        self, request: web.Request, parse: Callable[[Any], _T], most_bytes: int = MAX_ORDER_BYTES
    ) -> _T:
        """What a body says. Raises ValueError for one that is too long, too slow or not understood."""
        data = bytearray()
        try:
            async with asyncio.timeout(self._request_seconds):
                async for chunk in request.content.iter_chunked(1 << 16):
                    data += chunk
                    if len(data) > most_bytes:
                        raise ValueError("the request is too long")
        except TimeoutError as error:
            raise ValueError("the request did not arrive in time") from error
        return await self._on_disk(lambda: parse(parse_json(bytes(data))))

    async def _on_disk(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _order(raw: Any) -> tuple[Destination, Share]:
    return destination_from_json(raw.get("destination")), share_from_json(raw.get("share"))


def _order_of_life(raw: Any) -> tuple[Life, Share, bool]:
    return life_from_json(raw.get("life")), share_from_json(raw.get("share")), raw.get("urgent") is True


def _told(state: DrainState) -> web.Response:
    said = {"ending": state.ending, "bytes": state.nbytes, "reason": state.reason, "cause": state.cause}
    return web.json_response(said)


def _only_owner(request: web.Request) -> web.Response | None:
    if request.get(BY_OWNER):
        return None
    return refuse(403, "not_of_this_host", "only who has the key of this host may ask for this")
