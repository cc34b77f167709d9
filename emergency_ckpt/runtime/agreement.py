"""Steps that all processes take together: everyone says what it has, process 0 decides, everyone hears it.

A process that fails says so instead of leaving the others waiting; they raise an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from emergency_ckpt.errors import EmergencyCheckpointError, PeerFailedError
from emergency_ckpt.jaxio.coordination import Coordinator, broadcast_from, collect, contribute

LEADER = 0
# Process 0 gives up first and names who is missing; the others allow for that message to arrive.
_MARGIN = timedelta(seconds=30)


def agree(
    coordinator: Coordinator,
    key: str,
    mine: Callable[[], Any],
    decide: Callable[[list[Any]], Any],
    timeout: timedelta,
) -> Any:
    """What `decide` makes of the values of all processes, in order of their indices. Collective.

    `mine` runs on every process, `decide` on process 0; both give JSON. Raises what they raise, on the process
    where it happened; PeerFailedError naming that process on the others; CoordinationTimeoutError naming who
    did not answer within `timeout`. The key must not have been used before.
    """
    failure: Exception | None = None
    said: dict[str, Any] = {}
    try:
        said = {"value": mine()}
    except Exception as error:
        failure = error
        said = {"error": _describe(error)}
    contribute(coordinator, f"{key}/all", json.dumps(said).encode())
    verdict: bytes | None = None
    if coordinator.process_index == LEADER:
        try:
            verdict = json.dumps(_decide(coordinator, f"{key}/all", decide, timeout)).encode()
        except Exception as error:
            failure = failure or error
            verdict = json.dumps({"error": f"process {LEADER}: {_describe(error)}"}).encode()
    answer = _hear(coordinator, f"{key}/verdict", verdict, timeout)
    if failure is not None:
        raise failure
    if "error" in answer:
        raise PeerFailedError(f"{answer['error']}. Look at the log of that process.")
    return answer["value"]


def tell(coordinator: Coordinator, key: str, make: Callable[[], Any], timeout: timedelta) -> Any:
    """What `make` gives on process 0, on all processes. Collective; errors as in `agree`."""
    failure: Exception | None = None
    value: bytes | None = None
    if coordinator.process_index == LEADER:
        try:
            value = json.dumps({"value": make()}).encode()
        except Exception as error:
            failure = error
            value = json.dumps({"error": f"process {LEADER}: {_describe(error)}"}).encode()
    answer = _hear(coordinator, key, value, timeout)
    if failure is not None:
        raise failure
    if "error" in answer:
        raise PeerFailedError(f"{answer['error']}. Look at the log of that process.")
    return answer["value"]


def _decide(
    coordinator: Coordinator, key: str, decide: Callable[[list[Any]], Any], timeout: timedelta
) -> dict[str, Any]:
    answers = [json.loads(value) for value in collect(coordinator, key, timeout)]
    failed = [f"process {p}: {answer['error']}" for p, answer in enumerate(answers) if "error" in answer]
    if failed:
        more = f" (and {len(failed) - 3} more)" if len(failed) > 3 else ""
        return {"error": "; ".join(failed[:3]) + more}
    return {"value": decide([answer["value"] for answer in answers])}


def _hear(coordinator: Coordinator, key: str, value: bytes | None, timeout: timedelta) -> dict[str, Any]:
    return json.loads(broadcast_from(coordinator, key, value, LEADER, timeout + _MARGIN))


def _describe(error: Exception) -> str:
    if isinstance(error, EmergencyCheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}"
