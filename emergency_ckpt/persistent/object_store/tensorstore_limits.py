"""TensorStore's own limits: how it notices a request of which nothing moves, and how it repeats what failed.

By itself it waits for ever. Its HTTP client takes limits from the environment, once for a process, before the
first request: those that are set there stand.
"""

from __future__ import annotations

import os
from typing import Any

from emergency_ckpt.persistent.object_store.operations import Limits

_LEAST_BYTES_PER_SECOND = 1024
_CONNECT_SECONDS = 10.0
_REPETITIONS = 12


def request_retries(limits: Limits) -> dict[str, Any]:
    """The specification of repetitions of a key-value store; makes sure that requests end."""
    seconds = max(1, round(limits.attempt_seconds))
    connect = max(1, round(min(limits.attempt_seconds, _CONNECT_SECONDS)))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(seconds))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", str(_LEAST_BYTES_PER_SECOND))
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", str(connect))
    shortest, longest = 2 * limits.pause_seconds[0], limits.pause_seconds[1]
    return {
        "max_retries": _REPETITIONS,
        "initial_delay": f"{min(shortest, longest):g}s",
        "max_delay": f"{longest:g}s",
    }
