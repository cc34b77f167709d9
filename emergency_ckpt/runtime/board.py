"""Where the processes of a job tell each other how a drain ended, over the coordination service."""

from __future__ import annotations

import json
from datetime import timedelta

from emergency_ckpt.agent.drain import Verdict
from emergency_ckpt.jaxio.coordination import Coordinator
from emergency_ckpt.persistent.attempts import Attempt


class CoordinatedBoard:
    """Verdicts as write-once keys; the one before last is deleted, so that they do not pile up."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._announced: list[Attempt] = []

    def announce(self, attempt: Attempt, verdict: Verdict) -> Verdict:
        said = json.dumps([verdict.result, verdict.reason]).encode()
        stands = self._parse(self._coordinator.put_once(self._key(attempt), said))
        if verdict.result == "committed":
            # A commit has the parts of all processes, and each had read the verdict before its part.
            for older in self._announced:
                self._coordinator.delete(self._key(older))
            self._announced = []
        self._announced.append(attempt)
        return stands

    def wait(self, attempt: Attempt, timeout: timedelta) -> Verdict:
        return self._parse(self._coordinator.get(self._key(attempt), timeout))

    def peek(self, attempt: Attempt) -> Verdict | None:
        found = self._coordinator.try_get(self._key(attempt))
        return None if found is None else self._parse(found)

    def _key(self, attempt: Attempt) -> str:
        return f"drain/{attempt.step_id.generation}/{attempt.step}/{attempt.ordinal}"

    def _parse(self, data: bytes) -> Verdict:
        result, reason = json.loads(data)
        return Verdict(result, reason)
