"""One call for each of many things, some at a time, in threads that nobody waits for when the process ends.

The threads of `concurrent.futures` are joined at the end of the process, whatever they wait for. These are
joined here, by whoever asked for the calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

_T = TypeVar("_T")


def side_by_side(call: Callable[[_T], object], things: Iterable[_T], at_a_time: int, name: str) -> None:
    """Calls `call` with each of `things`. After an error no more are begun; the first one is raised."""
    left, lock, errors = iter(things), threading.Lock(), list[BaseException]()

    def work() -> None:
        try:
            while not errors:
                with lock:
                    try:
                        thing = next(left)
                    except StopIteration:
                        return
                call(thing)
        except BaseException as error:  # Raised again where it is waited for.
            errors.append(error)

    threads = [
        threading.Thread(target=work, name=f"emergency_ckpt {name}", daemon=True) for _ in range(at_a_time)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
