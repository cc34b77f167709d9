"""Calls that may never return, of a store that does not answer or of another library, within a time limit.

Nothing can end a call that the kernel holds: its thread is left behind, and ends when the call does or with the
process. Every other thread is joined here.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

from emergency_ckpt.errors import StoreUnreachableError

_T = TypeVar("_T")


def within(seconds: float, what: str, call: Callable[[], _T]) -> _T:
    """What `call` returns or raises; StoreUnreachableError, beginning with `what`, when the time is over."""
    ended: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def run() -> None:
        try:
            ended.set_result(call())
        except BaseException as error:  # Raised again where it is waited for.
            ended.set_exception(error)

    thread = threading.Thread(target=run, name=f"emergency_ckpt {what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise StoreUnreachableError(
            f"{what}: no answer within {seconds:g} s. Check that the store is mounted and reachable."
        )
    return ended.result()
