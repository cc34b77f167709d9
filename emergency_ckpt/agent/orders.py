"""What agents are told of drains: where a life of a run is drained to, and what one process does of one drain.

Only the trainer of this host says where (it alone knows the host's key); other agents name a life that was told
before. Everything is checked before it is used.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.slot_id import SlotId
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.locations import is_url
from emergency_ckpt.persistent.object_store.urls import check_location

MAX_PROCESSES = 65536
MAX_ORDER_BYTES = 32 * 1024 * 1024
_NONCE = re.compile(r"[0-9a-f]{1,64}")
_NAME = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]{0,63}")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class Life:
    """One generation of one run. Raises ValueError for what names none."""

    run: str
    generation: int
    nonce: str

    def __post_init__(self) -> None:
        SlotId(_typed(self.run, str), StepId(_number(self.generation), 0), "0" * 32, 0)
        if self.generation < 1 or not _NONCE.fullmatch(_typed(self.nonce, str)):
            raise ValueError(f"no life of a run has number {self.generation} and nonce {self.nonce!r:.80}")

    def __str__(self) -> str:
        return f"generation {self.generation} of run {self.run}"


@dataclasses.dataclass(frozen=True, slots=True)
class Destination:
    """Where the steps of a life are drained to, and how. Raises ValueError for what cannot be.

    Attributes:
      root: the persistent directory, absolute.
      item: name of the state's directory within a step.
      prefix, digits: how steps are called (`persistent.store.StepNames`).
      concurrent_bytes, max_chunk_bytes, compression, target_data_file_bytes: as in `WriteOptions`.
      timeout_seconds: for each wait of a drain: for the store, and for the parts of others.
      stall_seconds: a request of which nothing moves for so long is cut and repeated.
      tidies: whether agents delete older steps when no trainer is left to do it; False where a policy of the
        trainer decides. max_to_keep, keep_period: which ones stay (`core.retention.superseded_steps`).
    """

    life: Life
    root: str
    item: str
    prefix: str | None
    digits: int | None
    concurrent_bytes: int
    max_chunk_bytes: int
    compression: str
    target_data_file_bytes: int | None
    timeout_seconds: float
    tidies: bool = False
    max_to_keep: int | None = None
    keep_period: int | None = None
    stall_seconds: float = 60.0

    def __post_init__(self) -> None:
        root = _typed(self.root, str)
        if is_url(root):
            check_location(root)
        elif not os.path.isabs(root) or "\0" in root or os.path.normpath(root) != root:
            raise ValueError(f"the persistent directory is no absolute path without detours: {root!r:.200}")
        if not _NAME.fullmatch(_typed(self.item, str)):
            raise ValueError(f"no name of an item: {self.item!r:.80}")
        if self.prefix is not None and (not _typed(self.prefix, str) or set(self.prefix) & set("/\0")):
            raise ValueError(f"no prefix of step directories: {self.prefix!r:.80}")
        for number in (self.digits, self.target_data_file_bytes, self.max_to_keep, self.keep_period):
            if number is not None:
                _number(number)
        _number(self.concurrent_bytes)
        _number(self.max_chunk_bytes)
        _typed(self.compression, str)
        _typed(self.tidies, bool)
        for seconds in (self.timeout_seconds, self.stall_seconds):
            if type(seconds) not in (int, float) or not 0 < seconds < 1e9:
                raise ValueError(f"no time limit: {seconds!r:.40}")


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """What one process does of one drain: it writes its part, and one of all commits.

    Attributes:
      step, ordinal: name the attempt (`persistent.store.Attempt`).
      layout, position: the slot, of `step`; `position` is the number of the part as well.
      holders: the positions that write a part, ascending: the whole step, each shard once.
      commits: whether this one commits.
      of: the life that saved the step, where that is an earlier one than the one that drains it.
      retry: whether the try before this one failed.
      leaving: those of the holders that write only what no other one has, because their hosts go away.
    """

    step: int
    ordinal: int
    layout: str
    position: int
    holders: tuple[int, ...]
    commits: bool
    of: Life | None = None
    retry: bool = False
    leaving: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        SlotId("r", StepId(0, _number(self.step)), _typed(self.layout, str), _number(self.position))
        _number(self.ordinal)
        _typed(self.commits, bool)
        _typed(self.retry, bool)
        holders = [_number(holder) for holder in self.holders]
        if holders != sorted(set(holders)) or not 0 < len(holders) <= MAX_PROCESSES:
            raise ValueError("the holders of a drain are not ascending, or none, or too many")
        if self.position not in holders:
            raise ValueError(f"position {self.position} is none of those that write a part")
        if not {_number(position) for position in self.leaving} <= set(holders):
            raise ValueError("more positions are leaving than write a part")


@dataclasses.dataclass(frozen=True, slots=True)
class Registration:
    """What an agent needs in order to drain without its trainer.

    Attributes:
      process: of the trainer. agents: those of all processes, None where there is none.
      flush: whether the newest complete step is to be drained when the trainer dies.
    """

    destination: Destination
    process: int
    agents: tuple[Endpoint | None, ...]
    flush: bool

    def __post_init__(self) -> None:
        if not 0 <= _number(self.process) < len(self.agents) <= MAX_PROCESSES:
            raise ValueError(f"process {self.process} is none of {len(self.agents)}")
        _typed(self.flush, bool)

    @property
    def life(self) -> Life:
        return self.destination.life


def destination_to_json(destination: Destination) -> dict[str, Any]:
    return dataclasses.asdict(destination)


def destination_from_json(raw: Any) -> Destination:
    """Raises ValueError, as all of these do, for anything that was not made by the other one."""
    fields = _fields(Destination, raw)
    return Destination(**{**fields, "life": life_from_json(fields["life"])})


def life_from_json(raw: Any) -> Life:
    return Life(**_fields(Life, raw))


def share_to_json(share: Share) -> dict[str, Any]:
    return dataclasses.asdict(share)


def share_from_json(raw: Any) -> Share:
    fields = _fields(Share, raw)
    of = None if fields["of"] is None else life_from_json(fields["of"])
    holders, leaving = (tuple(_typed(fields[name], list)) for name in ("holders", "leaving"))
    return Share(**{**fields, "holders": holders, "leaving": leaving, "of": of})


def registration_to_json(registration: Registration) -> dict[str, Any]:
    """The tokens of the agents included."""
    return {
        "destination": destination_to_json(registration.destination),
        "process": registration.process,
        "agents": [agent.to_json() if agent else None for agent in registration.agents],
        "flush": registration.flush,
    }


def registration_from_json(raw: Any) -> Registration:
    fields = _fields(Registration, raw)
    agents = tuple(
        None if agent is None else Endpoint.from_json(agent) for agent in _typed(fields["agents"], list)
    )
    return Registration(
        destination_from_json(fields["destination"]), fields["process"], agents, fields["flush"]
    )


def parse_json(data: bytes) -> Mapping[str, Any]:
    """The JSON object in the body of a request."""
    try:
        return _typed(json.loads(data), dict)
    except RecursionError as error:
        raise ValueError("the request is nested too deeply") from error


def _fields(kind: type[Any], raw: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    if set(_typed(raw, dict)) != names:
        raise ValueError(
            f"a {kind.__name__} has the fields {sorted(names)}, found {sorted(map(str, raw))!s:.300}"
        )
    return dict(raw)


def _number(raw: Any) -> int:
    if type(raw) is not int or not 0 <= raw < 2**63:
        raise ValueError(f"expected a whole number, found {raw!r:.40}")
    return raw


def _typed(raw: Any, kind: type[_T]) -> _T:
    if not isinstance(raw, kind):
        raise ValueError(f"expected a {kind.__name__}, found {raw!r:.40}")
    return raw
