"""Waiting for uploads through TensorStore: as long as something arrives, and no longer.

TensorStore cannot take back what it has begun. What is cut here goes on by itself until its own limits end it;
it writes under names that nobody will read, and only so many of them may be left at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import tensorstore as ts

from emergency_ckpt.errors import StoreUnreachableError
from emergency_ckpt.persistent.arrays import WriteOptions, settle

_LEAST_BYTES_PER_SECOND = 1024**2
# TensorStore has so much on its way to a bucket at a time, in objects that count when they are whole.
_IN_FLIGHT_BYTES = 1024**3
_LOOK_SECONDS = 0.5
_MOST_CUT = 8
_guard = threading.Lock()
_cut: list[list[Any]] = []


def check_cut() -> None:
    """Raises StoreUnreachableError while too many uploads that were cut have not ended."""
    with _guard:
        _cut[:] = [futures for futures in _cut if not all(future.done() for future in futures)]
        if len(_cut) >= _MOST_CUT:
            raise StoreUnreachableError(
                f"{len(_cut)} uploads that were cut because nothing arrived have not ended yet: no further one "
                "is begun. Check that the store is reachable."
            )


def settle_upload(
    futures: Iterable[Any], what: str, options: WriteOptions, nbytes: int, *, in_bucket: bool
) -> list[Any]:
    """As `arrays.settle`, for what sends `nbytes`: ends as well when nothing of it arrives.

    That is when nothing came to an end for twice the time after which a request is repeated, and for what is on
    its way at 1 MiB/s.
    """
    waited_for = list(futures)
    deadline = time.monotonic() + options.timeout_seconds
    first = arrived = _arrived_bytes()
    moved = time.monotonic()
    while (first_open := next((future for future in waited_for if not future.done()), None)) is not None:
        _wait_for(first_open)
        now, found = time.monotonic(), _arrived_bytes()
        if found != arrived:
            arrived, moved = found, now
        left = max(nbytes - (arrived - first), 0)
        on_its_way = min(left, _IN_FLIGHT_BYTES) if in_bucket else left
        patience = 2 * options.stall_seconds + on_its_way / _LEAST_BYTES_PER_SECOND
        if now > min(deadline, moved + patience):
            with _guard:
                _cut.append(waited_for)
            why = (
                f"no answer from the store within {options.timeout_seconds:g} s"
                if now > deadline
                else f"nothing arrived for {now - moved:.0f} s"
            )
            raise StoreUnreachableError(
                f"{what}: {why}. The upload is cut. Check that the store is reachable, or raise the time limit."
            )
    return settle(waited_for, what, options.timeout_seconds)


def _wait_for(future: Any) -> None:
    try:
        future.result(timeout=_LOOK_SECONDS)
    except Exception:  # Whatever it is, `settle` raises it.
        return


def _arrived_bytes() -> int:
    """Bytes that stores of all kinds have taken from this process."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/")
    return sum(
        int(value.get("value", 0))
        for metric in metrics
        if metric["name"].endswith("/bytes_written")
        for value in metric["values"]
    )
