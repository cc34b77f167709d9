"""What an agent remembers beyond its own end: who told it of which work, and which drains have not ended.

It lies in one file beside the agent's record, put in place by rename after each change, readable by its owner
only: it has the tokens by which agents of one job reach each other, as that record has. Whatever else is found
in its place is ignored and replaced.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import xxhash

from emergency_ckpt.agent.orders import (
    Destination,
    Registration,
    Share,
    destination_from_json,
    destination_to_json,
    registration_from_json,
    registration_to_json,
    share_from_json,
    share_to_json,
)
from emergency_ckpt.agent.presence import is_trainer_id
from emergency_ckpt.agent.private_files import read_private, write_private
from emergency_ckpt.agent.trainers import Registered, State
from emergency_ckpt.errors import CorruptDataError, EmergencyCheckpointError

MEMORY = "agent.memory"
_FORMAT = b"emergency_ckpt agent memory 2"
_MAX_BYTES = 64 * 1024 * 1024
_MOST_DRAINS = 1024
_UNFINISHED: tuple[State, ...] = ("alive", "gone")
_log = logging.getLogger("emergency_ckpt.agent")


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """One process's share of a drain that the trainer of this host asked for."""

    destination: Destination
    share: Share


@dataclasses.dataclass(frozen=True, slots=True)
class Remembered:
    """What the agent before left.

    Attributes:
      port, token: where others know it.
      trainers: by id, what they registered, and in which state they were seen last.
      orders: drains that had not ended.
    """

    port: int
    token: str = dataclasses.field(repr=False)
    trainers: dict[str, Registered]
    orders: tuple[Order, ...]


class Memory:
    """The memory of the agent of one directory, whose lock the caller holds. Safe to use from any thread."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / MEMORY
        self._guard = threading.Lock()
        self._written: bytes | None = None
        self._texts: dict[str, tuple[Registration, str]] = {}

    def recall(self) -> Remembered | None:
        """What the agent before left; None where it left nothing, or nothing that can be understood."""
        try:
            data = read_private(self._path, "memory of an agent", _MAX_BYTES)
            return None if data is None else _parsed(data)
        except EmergencyCheckpointError as error:
            _log.warning("what an agent before this one left is ignored, and replaced: %s", error)
            return None

    def keep(self, port: int, token: str, trainers: dict[str, Registered], orders: Iterable[Order]) -> None:
        """Puts down what is left to do; nothing left, nothing lies there. A failure is logged."""
        orders = tuple(orders)
        with self._guard:
            if not orders and not any(each.state in _UNFINISHED for each in trainers.values()):
                self._forget()
                return
            body = self._encoded(port, token, trainers, orders)
            data = b"%s %s\n%s" % (_FORMAT, xxhash.xxh3_128_hexdigest(body).encode(), body)
            if len(data) > _MAX_BYTES:
                _log.error(
                    "%d bytes are too many to be remembered: an agent after this one does not know", len(data)
                )
                self._forget()
                return
            if data == self._written:
                return
            try:
                write_private(self._path, data)
                self._written = data
            except EmergencyCheckpointError as error:
                _log.error("an agent after this one will not know what is left to do: %s", error)

    def _encoded(
        self, port: int, token: str, trainers: dict[str, Registered], orders: Sequence[Order]
    ) -> bytes:
        # Of a large job a registration is long, and stays the same.
        for id_, each in trainers.items():
            known = self._texts.get(id_)
            if known is None or known[0] is not each.registration:
                text = json.dumps(registration_to_json(each.registration), separators=(",", ":"))
                self._texts[id_] = (each.registration, text)
        self._texts = {id_: known for id_, known in self._texts.items() if id_ in trainers}
        told = ",".join(
            f'["{id_}","{each.state}",{self._texts[id_][1]}]' for id_, each in sorted(trainers.items())
        )
        asked = json.dumps([[destination_to_json(o.destination), share_to_json(o.share)] for o in orders])
        return f'{{"port":{port},"token":{json.dumps(token)},"trainers":[{told}],"drains":{asked}}}'.encode()

    def _forget(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            _log.error("%s cannot be removed: %s", self._path, error.strerror)
        self._written = None


def _parsed(data: bytes) -> Remembered:
    head, _, body = data.partition(b"\n")
    if not head.startswith(_FORMAT + b" "):
        raise CorruptDataError(f"it begins with {head[:60]!r}, expected {_FORMAT.decode()!r}")
    if head != b"%s %s" % (_FORMAT, xxhash.xxh3_128_hexdigest(body).encode()):
        raise CorruptDataError(f"the checksum of its {len(data)} bytes does not match")
    try:
        raw: Any = json.loads(body)
        port, token = raw["port"], raw["token"]
        if type(port) is not int or not 0 < port < 65536 or not isinstance(token, str):
            raise ValueError("it names no port and token")
        trainers = {id_: _registered(id_, state, told) for id_, state, told in raw["trainers"]}
        orders = tuple(Order(destination_from_json(d), share_from_json(s)) for d, s in raw["drains"])
        if len(orders) > _MOST_DRAINS:
            raise ValueError(f"it has {len(orders)} drains")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptDataError(f"it cannot be understood: {type(error).__name__}: {error}") from error
    return Remembered(port, token, trainers, orders)


def _registered(id_: Any, state: Any, told: Any) -> Registered:
    if not isinstance(id_, str) or not is_trainer_id(id_) or state not in get_args(State):
        raise ValueError(f"no trainer has the id {id_!r:.80} and the state {state!r:.40}")
    return Registered(registration_from_json(told), cast(State, state))
