"""Save decisions that only one process can make: process 0 makes them and tells the others, once per step.

A decision is a key in the coordination service under (generation, step), written once. Keys that every process
has left behind are deleted, so that they do not pile up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta

from emergency_ckpt.core.schedule import NOTHING_DUE, Due
from emergency_ckpt.errors import CoordinationTimeoutError
from emergency_ckpt.jaxio.coordination import Coordinator
from emergency_ckpt.runtime.agreement import tell

# Keys are deleted in chunks of so many step numbers, when all processes are two chunks further.
CHUNK_STEPS = 500


@dataclasses.dataclass
class _Answer:
    due: Due
    error: Exception | None = None


class ToldDecisions:
    """What process 0 decided at each step of one generation, on every process. All of them ask the same steps.

    Asking again about a step gives the same answer without a word to the others.
    """

    def __init__(self, coordinator: Coordinator, generation: int, timeout: timedelta) -> None:
        self._coordinator = coordinator
        self._prefix = f"decisions/{generation}"
        self._timeout = timeout
        self._answers: dict[int, dict[int, _Answer]] = {}  # by chunk, by step

    def of(self, step: int, decide: Callable[[], Due]) -> Due:
        """What `step` is due for. `decide` runs on process 0, once.

        Raises what `decide` raises, on process 0; PeerFailedError on the others, and at every further question
        about this step. Raises CoordinationTimeoutError naming process 0 when it does not answer in time.
        """
        chunk = step // CHUNK_STEPS
        if chunk not in self._answers:
            self._leave(chunk - 2)
            self._answers[chunk] = {}
        answers = self._answers[chunk]
        if step not in answers:
            answers[step] = self._ask(f"{self._prefix}/{chunk}/{step}", decide)
        answer = answers[step]
        if answer.error is not None:
            raise answer.error
        return answer.due

    def _ask(self, key: str, decide: Callable[[], Due]) -> _Answer:
        def make() -> list[bool]:
            due = decide()
            return [due.local, due.persistent]

        try:
            local, persistent = tell(self._coordinator, key, make, self._timeout)
        except CoordinationTimeoutError:
            raise  # The answer may still come: a further question waits for it again.
        except Exception as error:  # Written once: whoever asks again hears the same.
            return _Answer(NOTHING_DUE, error)
        return _Answer(Due(local, persistent, "policy"))

    def _leave(self, last: int) -> None:
        """Forgets the chunks up to `last`. The process that is the last to do so deletes their keys."""
        for chunk in [known for known in self._answers if known <= last]:
            del self._answers[chunk]
            left = f"{self._prefix}/left/{chunk}"
            if self._coordinator.increment(left) == self._coordinator.process_count:
                self._coordinator.delete(f"{self._prefix}/{chunk}")
                self._coordinator.delete(left)

    def forget_generation(self) -> None:
        """Deletes all keys. One process calls it, when all have begun a later generation."""
        self._coordinator.delete(self._prefix)
