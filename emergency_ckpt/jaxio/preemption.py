"""JAX's preemption sync point: all processes learn of a notice at one and the same step."""

from __future__ import annotations

from jax.experimental import multihost_utils


class PreemptionQuery:
    """Asks JAX's preemption service once per step; a second question for the same step gets the same answer.

    The service matches step numbers exactly, so it has to be asked at every step. It runs in every job that
    called `jax.distributed.initialize`, also of one process; elsewhere nothing is ever reached.
    """

    def __init__(self) -> None:
        self._available = _service_runs()
        self._step: int | None = None
        self._reached = False

    def reached(self, step: int) -> bool:
        """Whether `step` is the step at which all processes agreed to react to a notice."""
        if not self._available:
            return False
        if step != self._step:
            self._step = step
            self._reached = multihost_utils.reached_preemption_sync_point(step)
        return self._reached


def _service_runs() -> bool:
    from jax._src import distributed

    return distributed.global_state.preemption_sync_manager is not None
