"""The agents of the job: this host's is found or started, and everybody is told where it listens.

Addresses and tokens go over JAX's coordination service, which the job trusts anyway. A process without an agent
serves nobody; its shards then travel over the device network, where the mesh allows it.
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

from emergency_ckpt.agent.attachment import Attachment, attach
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.options import AgentOptions
from emergency_ckpt.agent.starting import ensure_agent
from emergency_ckpt.errors import CoordinationTimeoutError, EmergencyCheckpointError, PeerUnavailableError
from emergency_ckpt.jaxio.coordination import Coordinator
from emergency_ckpt.telemetry.log import CheckpointLogger


class Peers:
    """Where the agents of all processes are. All processes make one, at the start of their manager.

    Attributes:
      served: whether this process's slots can be fetched by others.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        root: Path | None,
        options: AgentOptions | None,
        log: CheckpointLogger,
        timeout: timedelta,
    ) -> None:
        """`root`: the ramdisk directory; `options` None: no agent is wanted."""
        self._coordinator = coordinator
        self._timeout = timeout
        self._known: dict[int, Endpoint | None] = {}
        self._attachment: Attachment | None = None
        endpoint = None
        if root is not None and options is not None:
            try:
                endpoint = ensure_agent(root, options)
                self._attachment = attach(endpoint)
            except EmergencyCheckpointError as error:
                endpoint = None
                log.error("start", None, f"other hosts cannot fetch shards from this one: {error}")
        self.served = endpoint is not None
        said = json.dumps(endpoint.to_json() if endpoint else None).encode()
        coordinator.put(self._key(coordinator.process_index), said)

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

    def close(self) -> None:
        """Lets go of the agent of this host, which stays as long as somebody needs it."""
        if self._attachment is not None:
            self._attachment.close()

    def _ask(self, process: int) -> Endpoint | None:
        try:
            said = json.loads(self._coordinator.get(self._key(process), self._timeout))
            return None if said is None else Endpoint.from_json(said)
        except (CoordinationTimeoutError, ValueError) as error:
            raise PeerUnavailableError(
                f"process {process} did not say where its agent is: {error}. Look at its log."
            ) from error

    def _key(self, process: int) -> str:
        return f"agents/{process}"
