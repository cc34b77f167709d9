"""JAX's preemption sync point: all processes learn of a notice at one and the same step.

A signal is seen by JAX itself. Any other notice is told to the service in the very words in which JAX tells a
signal, by a key that is written once, so that both lead to the same step, and no signal handler takes part.
"""

from __future__ import annotations

import datetime
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

# What XLA's preemption sync manager writes when a signal comes, and what it waits for on all processes.
_KEY = "RECEIVED_PREEMPTION_NOTICE"


class _Process:
    """Several managers of one process ask one service."""

    has_asked = False


_process = _Process()


class PreemptionQuery:
    """Asks JAX's preemption service once per step; a second question for the same step gets the same answer.

    The service matches step numbers exactly, so it has to be asked at every step. It runs in every job that
    called `jax.distributed.initialize`, also of one process. A process that did not, and is alone, agrees with
    itself; there only what is announced is reached.
    """

    def __init__(self) -> None:
        self._service = _service_client()
        self._step: int | None = None
        self._reached = False
        self._announced = threading.Event()

    def begin_after(self, step: int) -> None:
        """Training goes on after `step`. Does nothing once a step was asked about.

        Without it a notice that comes before the first question (during the first compilation, say) is lost:
        the service names the step after the newest one that was asked about, and 1 where none was.
        """
        if self._service is not None and not _process.has_asked:
            multihost_utils.reached_preemption_sync_point(step)

    def reached(self, step: int) -> bool:
        """Whether `step` is the step at which all processes agreed to react to a notice."""
        if step != self._step:
            self._step = step
            if self._service is not None:
                _process.has_asked = True
                self._reached = multihost_utils.reached_preemption_sync_point(step)
            else:
                self._reached = self._announced.is_set()
                self._announced.clear()
        return self._reached

    def announce(self) -> str:
        """Tells all processes of a notice, as a signal would. From any thread. Returns what comes of it."""
        if self._service is None:
            if jax.process_count() > 1:
                return "no step is agreed on, because JAX's preemption service does not run"
            self._announced.set()
            return "this process reacts at its next step"
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        try:
            self._service.key_value_set(_KEY, now)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                return "a step was agreed on before, for another notice"
            return f"no step is agreed on, because the coordination service does not answer: {error}"
        return "all processes agree on a step to react at"


def _service_client() -> Any:
    """The client of the coordination service, where the preemption service runs on it; None elsewhere."""
    from jax._src import distributed

    state = distributed.global_state
    return state.client if state.preemption_sync_manager is not None else None
