"""What JAX's preemption service says: that a process of the job received SIGTERM.

Its handler, in C++, hides the signal from the process that received it; the service writes a key for all.
"""

from __future__ import annotations

# What XLA's preemption sync manager writes when a signal comes.
_KEY = "RECEIVED_PREEMPTION_NOTICE"


def signalled() -> bool:
    """Whether some process of the job was told to end. False also where no preemption service runs.

    Raises RuntimeError of JAX where the coordination service cannot be reached.
    """
    from jax._src import distributed

    state = distributed.global_state
    if state.client is None or state.preemption_sync_manager is None:
        return False
    try:
        return bool(state.client.key_value_try_get(_KEY))
    except RuntimeError as error:
        if str(error).startswith("NOT_FOUND"):
            return False
        raise
