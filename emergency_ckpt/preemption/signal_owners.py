"""Whose handler a signal has: Python's, a library's in C, or none.

Python itself knows only what was installed through it: the answer is asked of the C library.
"""

from __future__ import annotations

import ctypes
import functools
import signal
import threading
from typing import Literal

Owner = Literal["python", "default", "ignored", "library", "unknown"]
"""Who gets a signal; `unknown` where the C library cannot be asked."""

_DEFAULT, _IGNORED = 0, 1
# Larger than `struct sigaction` anywhere; its first member is the handler on Linux (glibc, musl) and macOS.
_STRUCT_BYTES = 512
# Nobody is disturbed while one of these has another handler for a moment.
_HARMLESS = (signal.SIGURG, signal.SIGWINCH, signal.SIGCONT)
_known: dict[str, int] = {}


def owner_of(number: int) -> Owner:
    """From any thread, once `learn` was called in the main thread."""
    address = _handler_in_c(number)
    if address is None:
        return "unknown"
    if address == _DEFAULT:
        return "default"
    if address == _IGNORED:
        return "ignored"
    pythons = _known.get("python")
    if pythons is None:
        return "unknown"
    return "python" if address == pythons else "library"


def learn() -> None:
    """Finds out which C function Python installs for every handler in Python. In the main thread."""
    assert threading.current_thread() is threading.main_thread()
    if "python" in _known:
        return
    for number in _HARMLESS:
        if _handler_in_c(number) != _DEFAULT:
            continue
        signal.signal(number, lambda *_: None)
        address = _handler_in_c(number)
        signal.signal(number, signal.SIG_DFL)
        if address is not None:
            _known["python"] = address
        return


def set_default(number: int) -> bool:
    """Gives a signal its default action, from any thread; False where that cannot be done."""
    libc = _libc()
    if libc is None:
        return False
    install = libc.signal
    install.argtypes, install.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    return install(number, None) != ctypes.c_void_p(-1).value


def _handler_in_c(number: int) -> int | None:
    libc = _libc()
    if libc is None:
        return None
    found = ctypes.create_string_buffer(_STRUCT_BYTES)
    if libc.sigaction(ctypes.c_int(number), None, found) != 0:
        return None
    return ctypes.c_void_p.from_buffer(found).value or _DEFAULT


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.sigaction and libc.signal else None
    except (OSError, AttributeError):
        return None
