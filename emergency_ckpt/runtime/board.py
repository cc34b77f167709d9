"""Where the processes of a job tell each other how a drain ended, over the coordination service."""

from __future__ import annotations

import json
from datetime import timedelta

from emergency_ckpt.agent.drain import Verdict
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.jaxio.coordination import Coordinator


class CoordinatedBoard:
    """Verdicts as write-once keys; the one before last is deleted, so that they do not pile up."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._announced: list[StepId] = []

    def announce(self, step: StepId, verdict: Verdict) -> Verdict:
        said = json.dumps([verdict.result, verdict.reason]).encode()
        stands = self._parse(self._coordinator.put_once(self._key(step), said))
        if verdict.result == "committed":
            # A commit has the parts of all processes, and each had read the verdict before its part.
            for older in self._announced:
                self._coordinator.delete(self._key(older))
            self._announced = []
        self._announced.append(step)
        return stands

    def wait(self, step: StepId, timeout: timedelta) -> Verdict:
        return self._parse(self._coordinator.get(self._key(step), timeout))

    def peek(self, step: StepId) -> Verdict | None:
        found = self._coordinator.try_get(self._key(step))
        return None if found is None else self._parse(found)

    def _key(self, step: StepId) -> str:
        return f"drain/{step.generation}/{step.step}"

    def _parse(self, data: bytes) -> Verdict:
        result, reason = json.loads(data)
        return Verdict(result, reason)
