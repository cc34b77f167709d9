"""Where the processes of a job tell each other of drains, over the coordination service."""

from __future__ import annotations

import dataclasses
import json
from datetime import timedelta

from emergency_ckpt.agent.drain import Verdict
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.jaxio.coordination import Coordinator
from emergency_ckpt.persistent.attempts import Attempt


class CoordinatedBoard:
    """Verdicts as write-once keys; those before the last ones are deleted, so that they do not pile up."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._announced: list[Attempt] = []

    def call(self, generation: int, ordinal: int, step: StepId) -> None:
        self._coordinator.put_once(
            _call(generation, ordinal), json.dumps([step.generation, step.step]).encode()
        )

    def await_call(self, generation: int, ordinal: int, timeout: timedelta) -> StepId:
        return StepId(*json.loads(self._coordinator.get(_call(generation, ordinal), timeout)))

    def urge(self, generation: int, ordinal: int) -> None:
        self._coordinator.put(f"{_call(generation, ordinal)}/urged", b"")

    def is_urged(self, generation: int, ordinal: int) -> bool:
        return self._coordinator.try_get(f"{_call(generation, ordinal)}/urged") is not None

    def announce(self, attempt: Attempt, verdict: Verdict) -> Verdict:
        said = json.dumps(dataclasses.astuple(verdict)).encode()
        stands = self._parse(self._coordinator.put_once(self._key(attempt), said))
        if verdict.result == "committed":
            # A commit has the parts of all processes, and each had read the verdict before its part. What was
            # committed and not known to be so takes no part the next time: one more verdict stays.
            for older in self._announced[:-1]:
                self._coordinator.delete(self._key(older))
                self._coordinator.delete(_call(older.step_id.generation, older.ordinal))
            self._announced = self._announced[-1:]
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
        return Verdict(*json.loads(data))


def _call(generation: int, ordinal: int) -> str:
    """The key beneath which all lies that is said about an attempt before it begins."""
    return f"drain/{generation}/call/{ordinal}"
