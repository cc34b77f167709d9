"""Where the processes of a job tell each other of drains, over the coordination service."""

from __future__ import annotations

import dataclasses
import json
from datetime import timedelta

from emergency_ckpt.agent.drain import OVER, Verdict
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.jaxio.coordination import Coordinator
from emergency_ckpt.persistent.attempts import Attempt


class CoordinatedBoard:
    """Calls and verdicts as write-once keys; those before the last ones are deleted: none pile up."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._first = 0  # the oldest attempt of which something is kept

    def call(self, generation: int, ordinal: int, step: StepId) -> StepId:
        called = json.dumps([step.generation, step.step]).encode()
        return _step(self._coordinator.put_once(f"{_attempt(generation, ordinal)}/call", called))

    def await_call(self, generation: int, ordinal: int, timeout: timedelta) -> StepId:
        return _step(self._coordinator.get(f"{_attempt(generation, ordinal)}/call", timeout))

    def called(self, generation: int, ordinal: int) -> StepId | None:
        found = self._coordinator.try_get(f"{_attempt(generation, ordinal)}/call")
        return None if found is None else _step(found)

    def end(self, generation: int, ordinal: int) -> None:
        while self.call(generation, ordinal, OVER) != OVER:
            ordinal += 1  # That was called, and never begun.
        self._coordinator.delete(_left(generation))

    def leave(self, generation: int, ordinal: int) -> None:
        process = self._coordinator.process_index
        self._coordinator.put(f"{_left(generation)}/{process}", str(ordinal).encode())

    def left(self, generation: int) -> dict[int, int]:
        found = self._coordinator.entries(_left(generation))
        return {int(process): int(ordinal) for process, ordinal in found.items()}

    def urge(self, generation: int, ordinal: int) -> None:
        self._coordinator.put(f"{_attempt(generation, ordinal)}/urged", b"")

    def is_urged(self, generation: int, ordinal: int) -> bool:
        return self._coordinator.try_get(f"{_attempt(generation, ordinal)}/urged") is not None

    def announce(self, attempt: Attempt, verdict: Verdict) -> Verdict:
        said = json.dumps(dataclasses.astuple(verdict)).encode()
        stands = _verdict(self._coordinator.put_once(_key(attempt), said))
        if verdict.result == "committed":
            # A commit has the parts of all processes, and each had read the verdict before its part. What was
            # committed and not known to be so takes no part the next time: one more verdict stays.
            for older in range(self._first, attempt.ordinal - 1):
                self._coordinator.delete(_attempt(attempt.generation.number, older))
                self._first = older + 1
        return stands

    def wait(self, attempt: Attempt, timeout: timedelta) -> Verdict:
        return _verdict(self._coordinator.get(_key(attempt), timeout))

    def peek(self, attempt: Attempt) -> Verdict | None:
        found = self._coordinator.try_get(_key(attempt))
        return None if found is None else _verdict(found)


def _attempt(generation: int, ordinal: int) -> str:
    """The key beneath which all lies that is said of an attempt."""
    return f"drain/{generation}/{ordinal}"


def _key(attempt: Attempt) -> str:
    return f"{_attempt(attempt.generation.number, attempt.ordinal)}/verdict"


def _left(generation: int) -> str:
    return f"drain/{generation}/left"


def _step(data: bytes) -> StepId:
    return StepId(*json.loads(data))


def _verdict(data: bytes) -> Verdict:
    return Verdict(*json.loads(data))
