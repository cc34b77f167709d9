"""Asks an agent for drains, and tells it what a trainer works on.

A connection of its own for each request that begins something: what was sent is never sent twice unseen.
"""

from __future__ import annotations

import dataclasses
import json
from datetime import timedelta
from typing import Any, get_args

from emergency_ckpt.agent.connection import PeerConnection
from emergency_ckpt.agent.drains import Ending
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.lives import LifeReport
from emergency_ckpt.agent.orders import (
    Destination,
    Life,
    Registration,
    Share,
    destination_to_json,
    registration_to_json,
    share_to_json,
)
from emergency_ckpt.agent.progress import Progress
from emergency_ckpt.agent.record import AgentRecord
from emergency_ckpt.core.retrying import StoreReason, parse_reason
from emergency_ckpt.errors import PeerUnavailableError
from emergency_ckpt.preemption.notice import Notice

TIMEOUT = timedelta(seconds=20)


@dataclasses.dataclass(frozen=True, slots=True)
class DrainReport:
    """How far a drain is: `ending` None while it runs. `cause`: why the store failed, if so."""

    ending: Ending | None
    nbytes: int
    reason: str
    cause: StoreReason = "other"


class OrderClient:
    """Speaks with one agent. Every method raises PeerUnavailableError. Safe to use from any thread."""

    def __init__(self, endpoint: Endpoint, timeout: timedelta = TIMEOUT, dial: str | None = None) -> None:
        self.endpoint = endpoint
        self._timeout = timeout
        self._dial = dial

    @classmethod
    def of_this_host(cls, record: AgentRecord, timeout: timedelta = TIMEOUT) -> OrderClient:
        """With the key of this host, which the agent's record has."""
        return cls(dataclasses.replace(record.endpoint, token=record.owner), timeout, record.dial)

    # With the key of the host.

    def register(self, trainer: str, registration: Registration) -> None:
        """Tells what the attached trainer works on, in place of what it said before."""
        self._ask("PUT", f"/v1/trainers/{trainer}", registration_to_json(registration))

    def say_goodbye(self, trainer: str) -> None:
        """Nothing is left to do for this trainer."""
        self._ask("DELETE", f"/v1/trainers/{trainer}")

    def begin(self, destination: Destination, share: Share) -> str:
        """Begins a drain; its slot is pinned when this returns. Returns the id of the drain."""
        order = {"destination": destination_to_json(destination), "share": share_to_json(share)}
        return self._drain_id(self._ask("POST", "/v1/drains", order))

    def request_save(self, detail: str, wish: str = "") -> int:
        """Asks the trainers of this host for a save; returns how many were told. `wish`: the id of one."""
        said = self._ask("POST", "/v1/notices", {"kind": "save", "detail": detail, "id": wish})
        told = said.get("told") if isinstance(said, dict) else None
        if type(told) is not int:
            raise self._nonsense("what is no number of trainers")
        return told

    def pass_on(self, notice: Notice, process: int | None = None) -> None:
        """Tells of a notice that another host of the job heard; `process`: of the host that goes away."""
        self._ask("POST", "/v1/notices", {**dataclasses.asdict(notice), "process": process})

    def tell_progress(self, trainer: str, progress: Progress) -> None:
        """How far the attached trainer is."""
        self._ask("PUT", f"/v1/trainers/{trainer}/progress", progress.to_json())

    # With the token.

    def look(self, drain: str, wait: timedelta = timedelta(0)) -> DrainReport:
        """How far a drain is; the agent waits for its end for a while."""
        said = self._ask("GET", f"/v1/drains/{drain}?wait={wait.total_seconds():g}")
        try:
            ending, nbytes, reason = said["ending"], said["bytes"], said["reason"]
            if not (ending is None or ending in get_args(Ending)) or type(nbytes) is not int:
                raise ValueError(f"{ending!r:.40}, {nbytes!r:.40}")
            return DrainReport(ending, nbytes, str(reason), parse_reason(said["cause"]))
        except (TypeError, KeyError, ValueError) as error:
            raise self._nonsense(f"the state of a drain ({error})") from error

    def give_up(self, drain: str, reason: str) -> None:
        """Ends a drain that waits for others."""
        self._ask("DELETE", f"/v1/drains/{drain}", {"reason": reason})

    def look_at(self, life: Life) -> LifeReport:
        """What the agent knows of the trainers of a life."""
        said = self._ask("POST", "/v1/lives", dataclasses.asdict(life))
        try:
            return LifeReport.from_json(said)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise self._nonsense(f"the state of a life ({error})") from error

    def begin_of_life(self, life: Life, share: Share, *, urgent: bool = False) -> str:
        """Begins a drain of a life that a trainer there has told of; returns the id of the drain.

        `urgent`: its trainers may live, and their drains go on.
        """
        order = {"life": dataclasses.asdict(life), "share": share_to_json(share), "urgent": urgent}
        return self._drain_id(self._ask("POST", "/v1/lives/drains", order))

    def _drain_id(self, said: Any) -> str:
        drain = said.get("drain") if isinstance(said, dict) else None
        if not isinstance(drain, str) or not drain.isalnum():
            raise self._nonsense("a drain without an id")
        return drain

    def _ask(self, method: str, page: str, content: Any = None) -> Any:
        connection = PeerConnection(self.endpoint, self._timeout, self._dial)
        try:
            body = None if content is None else json.dumps(content).encode()
            return connection.read_json(method, page, body)
        finally:
            connection.close()

    def _nonsense(self, what: str) -> PeerUnavailableError:
        return PeerUnavailableError(f"the agent at {self.endpoint} answers with {what}", "nonsense")
