"""Python's wakeup descriptor: a byte per signal, written as it comes, read by a thread of ours.

Whoever had the descriptor before gets every byte, too, and gets it back in the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable

_END = b"\0"  # No signal has this number.


class Wakeup:
    """Made in the main thread. `arrived`: called with the number of each signal that Python handles."""

    def __init__(self, arrived: Callable[[int], None]) -> None:
        self._arrived = arrived
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Those who had it before, the latest one last; replaced as a whole.
        self._others = (_Descriptor(signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)),)
        self._is_unset = False
        self._thread = threading.Thread(target=self._listen, name="emergency_ckpt signals", daemon=True)
        self._thread.start()

    def take(self) -> None:
        """In the main thread: takes the descriptor again, if somebody came after us; those hear as well."""
        current = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if current != self._write:
            self._others = (*self._others, _Descriptor(current))

    def tell_if_deaf(self, number: int) -> None:
        """In a handler of Python: makes up for the byte that went to somebody who came after us."""
        current = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if current == self._write:
            return
        with contextlib.suppress(ValueError, OSError):  # It was closed: ours may stay.
            signal.set_wakeup_fd(current)
        _write(self._write, bytes([number]))

    def put_back(self) -> None:
        """In the main thread: gives the descriptor back, if it is still ours."""
        current = signal.set_wakeup_fd(-1)
        if current == self._write:
            self._is_unset = True
            current = next((other.number for other in reversed(self._others) if other.is_same()), -1)
        with contextlib.suppress(ValueError, OSError):  # It was closed meanwhile.
            signal.set_wakeup_fd(current)

    def close(self, seconds: float) -> None:
        """Ends the thread."""
        _write(self._write, _END)
        self._thread.join(seconds)
        self._close_others()
        # As long as a signal may write into it, or somebody may put it back, the number must not become
        # another file's.
        if self._is_unset and not self._thread.is_alive():
            os.close(self._read)
            os.close(self._write)

    def abandon(self) -> None:
        """In a forked child, which has no thread."""
        self._close_others()
        if self._is_unset:
            os.close(self._read)
            os.close(self._write)

    def _close_others(self) -> None:
        for other in self._others:
            other.close()

    def _listen(self) -> None:
        while numbers := os.read(self._read, 256):
            for number in numbers:
                if number == _END[0]:
                    return
                for other in self._others:
                    other.pass_on(number)
                self._arrived(number)


class _Descriptor:
    """The wakeup descriptor of somebody else, -1 for none. Its copy stays usable whatever becomes of it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._copy = os.dup(number) if number >= 0 else -1

    def is_same(self) -> bool:
        """Whether the number is still that of the same file."""
        if self._copy < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self.number), os.fstat(self._copy))
        except OSError:
            return False

    def pass_on(self, number: int) -> None:
        if self._copy >= 0:
            _write(self._copy, bytes([number]))

    def close(self) -> None:
        if self._copy >= 0:
            os.close(self._copy)
            self._copy = -1


def _write(descriptor: int, data: bytes) -> None:
    # Full, or nobody reads any more: then nobody waits for it either.
    with contextlib.suppress(BlockingIOError, ConnectionError):
        os.write(descriptor, data)
