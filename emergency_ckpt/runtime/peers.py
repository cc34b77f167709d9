"""The agents of the job: this host's is found or started, and everybody is told where it listens.

Addresses and tokens go over JAX's coordination service, which the job trusts anyway. A process without an agent
serves nobody; its shards then travel over the device network, where the mesh allows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.host_agent import HostAgent
from emergency_ckpt.agent.options import AgentOptions
from emergency_ckpt.agent.orders import Destination, Registration
from emergency_ckpt.agent.worker import Worker
from emergency_ckpt.errors import CoordinationTimeoutError, EmergencyCheckpointError, PeerUnavailableError
from emergency_ckpt.jaxio.coordination import Coordinator
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.telemetry.log import CheckpointLogger

_CLOSE = timedelta(seconds=60)


class Peers:
    """Where the agents of all processes are. All processes make one, at the start of their manager.

    Attributes:
      host: the agent of this host; None where none is wanted.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        root: Path | None,
        options: AgentOptions | None,
        log: CheckpointLogger,
        timeout: timedelta,
        *,
        lazily: bool = False,
        on_notice: Callable[[Notice], None] | None = None,
    ) -> None:
        """`root`: the ramdisk directory; `options` None: no agent; `lazily`: it starts when it is needed.

        `on_notice` hears of the notices of the agent, in any thread.
        """
        self._coordinator = coordinator
        self._log = log
        self._timeout = timeout
        self._known: dict[int, Endpoint | None] = {}
        self._telling: Worker[tuple[Destination, bool]] | None = None
        self.host = HostAgent(root, options, on_notice) if root is not None and options is not None else None
        self._lazily = lazily
        self._told: Endpoint | None = None
        if not self.renew():
            coordinator.put(self._key(coordinator.process_index), b"null")

    @property
    def served(self) -> bool:
        """Whether this process's slots can be fetched by others."""
        return self._told is not None

    def renew(self) -> bool:
        """Finds or starts the agent of this host, also one that was lost, and tells the others where it is.

        Costs nothing where it is there. False where nobody serves this process's slots.
        """
        if self.host is None or self._lazily:
            return False
        try:
            endpoint = self.host.connect()
        except EmergencyCheckpointError as error:
            self._log.error("agent", None, f"other hosts cannot fetch shards from this one: {error}")
            return self._told is not None
        if endpoint != self._told:
            said = json.dumps(endpoint.to_json()).encode()
            self._coordinator.put(self._key(self._coordinator.process_index), said)
            self._told = endpoint
        return True

    def forget(self, processes: Iterable[int]) -> None:
        """The agents of these could not be reached: where they are is asked anew when it is needed next."""
        for process in processes:
            self._known.pop(process, None)

    def endpoint(self, process: int) -> Endpoint:
        """Raises PeerUnavailableError where that process has no agent."""
        if process not in self._known:
            self._known[process] = self._ask(process)
        found = self._known[process]
        if found is None:
            raise PeerUnavailableError(
                f"process {process} has no agent that serves its slots. Look at its log for the reason."
            )
        return found

    def work_on(self, destination: Destination, *, flush: bool) -> None:
        """Tells the agent of this host what this process works on, in the background."""
        if self.host is None:
            return
        if self._telling is None:
            self._telling = Worker("agent", self._tell)
        self._telling.submit((destination, flush))

    def close(self, *, is_done: bool = True, limit: timedelta | None = None) -> None:
        """Says goodbye to the agent of this host, which stays as long as somebody needs it.

        Not `is_done`: it sees to what is left, as if this process had died. `limit`: for what it is being told.
        """
        if self._telling is not None:
            self._telling.close(_CLOSE if limit is None else min(limit, _CLOSE))
        if self.host is not None:
            self.host.close(is_done=is_done)

    def _tell(self, work: tuple[Destination, bool]) -> None:
        destination, flush = work
        assert self.host is not None
        try:
            own = self.host.connect()
            process = self._coordinator.process_index
            agents = self._all(self._coordinator.process_count)
            agents[process] = own
            self.host.register(Registration(destination, process, tuple(agents), flush))
        except EmergencyCheckpointError as error:
            self._log.warning("agent", None, f"nobody drains what this process leaves, should it die: {error}")

    def _all(self, count: int) -> list[Endpoint | None]:
        """The agents of all processes, in one round trip; all have told by now."""
        if count == 1:
            return [None]
        said = self._coordinator.entries(_KEYS)
        found: list[Endpoint | None] = []
        for process in range(count):
            try:
                raw = json.loads(said[str(process)])
                found.append(None if raw is None else Endpoint.from_json(raw))
            except (KeyError, ValueError):
                found.append(None)
        return found

    def _ask(self, process: int) -> Endpoint | None:
        try:
            said = json.loads(self._coordinator.get(self._key(process), self._timeout))
            return None if said is None else Endpoint.from_json(said)
        except (CoordinationTimeoutError, ValueError) as error:
            raise PeerUnavailableError(
                f"process {process} did not say where its agent is: {error}. Look at its log."
            ) from error

    def _key(self, process: int) -> str:
        return f"{_KEYS}/{process}"


_KEYS = "agents"
