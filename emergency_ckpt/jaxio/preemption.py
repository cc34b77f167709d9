"""What JAX's preemption service says: that some process of the job got SIGTERM.

Its handler, in C++, takes the signal from the process that gets it, and writes a key for all processes.
"""

from __future__ import annotations

from typing import Any

import jax

from emergency_ckpt.jaxio.coordination import JaxCoordinator

# What XLA's preemption sync manager writes when a signal comes.
_KEY = "RECEIVED_PREEMPTION_NOTICE"


def service_runs() -> bool:
    """Whether it runs in this process: then it has the handler of SIGTERM, unless somebody took it."""
    return _client() is not None


def signalled() -> str | None:
    """The time in the key, as JAX wrote it; None where no signal came, or no service runs.

    Raises PeerFailedError where the coordination service cannot be reached.
    """
    client = _client()
    if client is None:
        return None
    found = JaxCoordinator(client, jax.process_index(), jax.process_count()).try_get(_KEY)
    return None if found is None else found.decode("ascii", "replace")


def _client() -> Any:
    from jax._src import distributed

    state: Any = distributed.global_state
    return state.client if state.client is not None and state.preemption_sync_manager is not None else None
