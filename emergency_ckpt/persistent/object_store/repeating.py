"""Requests to a store: each within a time limit, repeated while that may help, and never without an end.

A request that hangs is left behind in its thread, which ends with the time limit of its socket.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TypeVar

from emergency_ckpt.core.jitter import JITTER
from emergency_ckpt.errors import PersistentStoreError, StoreUnreachableError
from emergency_ckpt.persistent.bounded import within
from emergency_ckpt.persistent.object_store.operations import Limits

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """What a failed request means. `passing`: the same request may succeed a little later."""

    error: PersistentStoreError
    passing: bool = False


Explain = Callable[[Exception, str], Failure | None]
"""What an exception of a store's library means, the operation being `what`; None: not of the store."""


def repeated(
    what: str,
    request: Callable[[int], _T],
    limits: Limits,
    explain: Explain,
    attempt_seconds: float | None = None,
    nbytes: int = 0,
) -> _T:
    """What `request`, called with the number of earlier tries, returns at last.

    Args:
      what: the operation and its object, which begins the messages.
      attempt_seconds: limit of one try; None for as long as there is time, where the request itself notices
        that nothing moves.
      nbytes: how many bytes are sent, which take their time.

    Raises the error that `explain` makes of the last failure, with the number of tries.
    """
    allowance = nbytes / limits.bytes_per_second
    begun = time.monotonic()
    deadline = begun + limits.total_seconds + allowance
    for tries in range(limits.attempts):
        left = max(deadline - time.monotonic(), 0.001)
        seconds = left if attempt_seconds is None else min(left, attempt_seconds + allowance)
        try:
            return within(seconds, what, lambda number=tries: request(number))
        except StoreUnreachableError as error:  # Of `within`: the libraries' own errors are not of this class.
            text = f"{what}: no answer within {seconds:.3g} s. Check the endpoint, the network and the server."
            failure, cause = Failure(StoreUnreachableError(text), passing=True), error
        except Exception as error:
            known = explain(error, what)
            if known is None:
                raise
            failure, cause = known, error
        pause = _pause(limits, tries)
        last = tries + 1 == limits.attempts or time.monotonic() + pause >= deadline
        if not failure.passing or last:
            raise _after(failure.error, tries + 1, time.monotonic() - begun) from cause
        time.sleep(pause)
    raise AssertionError("Limits.attempts is positive")


def _pause(limits: Limits, tries: int) -> float:
    """Doubling from try to try, and different for each of many clients that were refused together."""
    shortest, longest = limits.pause_seconds
    return JITTER.uniform(0.5, 1.5) * min(shortest * 2**tries, longest)


def _after(error: PersistentStoreError, tries: int, seconds: float) -> PersistentStoreError:
    if tries == 1:
        return error
    return type(error)(f"{error} ({tries} tries in {seconds:.1f} s)")
