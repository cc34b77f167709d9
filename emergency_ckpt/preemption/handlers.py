"""The handlers in Python of the signals that are notices: the process has one, however many managers listen.

They come with the first listener and go with the last one, in whichever order these leave. Whoever had a signal
before is called as before; where that is the default action, which ends the process, it is left out as long as
some listener has not been told of an earlier one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from emergency_ckpt.preemption.signal_owners import owner_of, set_default
from emergency_ckpt.preemption.wakeup import Wakeup

SAME_SECONDS = 1.0
"""Signals that follow within this time are one: wrappers signal a process and then its group."""
_ENDING = (signal.SIGTERM, signal.SIGINT)
"""After a second one of these the process ends as if nobody had come."""
_CLOSE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, eq=False)
class Listener:
    """One of those who hear signals.

    Attributes:
      installed: the signals that are to have our handler. left: those that are heard of where Python has them.
      arrived: called with each that comes, by a thread; whether it was told of an earlier one, so that this is
        a second one. It raises nothing.
      abandoned: called in a forked child, where nothing is heard any more.
    """

    installed: frozenset[int]
    left: frozenset[int]
    arrived: Callable[[int], bool]
    abandoned: Callable[[], None]

    def hears(self, number: int) -> bool:
        return number in self.installed or number in self.left


class Handler:
    """What Python calls. One that somebody keeps, and calls after we have gone, hands on to what was before."""

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        _process.on_signal(self.before, number, frame)


def is_ours(number: int) -> bool:
    """Whether a signal has our handler, as far as Python knows."""
    return isinstance(signal.getsignal(number), Handler)


def found_before(number: int) -> Any:
    """The handler that Python knows, or, where that is ours, the one before it."""
    known = signal.getsignal(number)
    while isinstance(known, Handler):
        known = known.before
    return known


def join(listener: Listener) -> None:
    """In the main thread: `listener` hears from now on, until it leaves."""
    _process.join(listener)


def leave(listener: Listener) -> None:
    """Nothing is heard any more. What nobody listens to any more is put back where this is the main thread;
    otherwise the handlers stay, and hand on to what was before, until another one comes or leaves.
    """
    _process.leave(listener)


class _Process:
    """The state of the process. Handlers run in the main thread in between anything, so that they take no lock;
    what they read is replaced as a whole.
    """

    def __init__(self) -> None:
        self.listeners: tuple[Listener, ...] = ()
        self._guard = threading.Lock()  # of those who join and leave
        self._wakeup: Wakeup | None = None
        self._unset: Wakeup | None = None  # closed in another thread, so that its descriptor is still there
        self._installed: set[int] = set()  # signals that got our handler, of the main thread
        self._insisted: set[int] = set()
        self._first_in_main: dict[int, float] = {}

    def join(self, listener: Listener) -> None:
        with self._guard:
            if self._unset is not None:
                self._unset.put_back()
                self._unset, unset = None, self._unset
                unset.close(0.0)
            if self._wakeup is None:
                self._wakeup = Wakeup(self._arrived)
            else:
                self._wakeup.take()
            self.listeners = (*self.listeners, listener)
            for number in listener.installed | listener.left:
                self._begin_anew(number)
            for number in listener.installed:
                self._installed.add(number)
                owner = owner_of(number)
                if is_ours(number) and owner in ("python", "unknown"):
                    continue
                known = signal.getsignal(number)
                # A library that came and went leaves the default action behind, of which Python does not know.
                signal.signal(number, Handler(signal.SIG_DFL if owner == "default" or known is None else known))
            self._put_back()

    def leave(self, listener: Listener) -> None:
        with self._guard:
            if listener not in self.listeners:
                return
            self.listeners = tuple(each for each in self.listeners if each is not listener)
            in_main = threading.current_thread() is threading.main_thread()
            if in_main:
                self._put_back()
            if self.listeners or self._wakeup is None:
                return
            wakeup, self._wakeup = self._wakeup, None
            if in_main:
                wakeup.put_back()
            else:
                self._unset = wakeup
            wakeup.close(_CLOSE_SECONDS)

    def let_go_in_child(self) -> None:
        """In a forked child: what is sent to it concerns nobody else, and ends it as before."""
        self._guard = threading.Lock()  # Another thread may have had it.
        listeners, self.listeners = self.listeners, ()
        for listener in listeners:
            listener.abandoned()
        self._put_back()
        if self._wakeup is not None:
            self._wakeup.put_back()
            self._wakeup.abandon()
            self._wakeup = None

    def _put_back(self) -> None:
        """In the main thread: of signals that nobody listens to, where the handler is still ours."""
        for number in [each for each in self._installed if not self._listened_to(each)]:
            self._installed.discard(number)
            self._begin_anew(number)
            known = signal.getsignal(number)
            if isinstance(known, Handler) and owner_of(number) in ("python", "unknown"):
                signal.signal(number, known.before)

    def _begin_anew(self, number: int) -> None:
        self._first_in_main.pop(number, None)
        self._insisted.discard(number)

    def _listened_to(self, number: int) -> bool:
        return any(number in listener.installed for listener in self.listeners)

    # In the reading thread.

    def _arrived(self, number: int) -> None:
        told = [listener.arrived(number) for listener in self.listeners if listener.hears(number)]
        if number in _ENDING and told and all(told):
            self._insist(number)

    def _insist(self, number: int) -> None:
        """A second signal: the main thread may be busy for long, so a default action is taken from here."""
        self._insisted.add(number)
        known = signal.getsignal(number)
        if not isinstance(known, Handler) or known.before != signal.SIG_DFL or not self._listened_to(number):
            return
        if set_default(number):
            os.kill(os.getpid(), number)

    # In the main thread, in between anything.

    def on_signal(self, before: Any, number: int, frame: FrameType | None) -> None:
        wakeup = self._wakeup
        if self._listened_to(number) and wakeup is not None:
            wakeup.tell_if_deaf(number)
            if before in (signal.SIG_DFL, signal.default_int_handler) and not self._is_second(number):
                return
        if callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _is_second(self, number: int) -> bool:
        now = time.monotonic()
        first = self._first_in_main.setdefault(number, now)
        return number in _ENDING and (number in self._insisted or now - first >= SAME_SECONDS)


_process = _Process()
_masks = threading.local()


def _before_fork() -> None:
    # A signal to the child must not be heard before it has let go.
    heard = {number for listener in _process.listeners for number in listener.installed | listener.left}
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, heard) if heard else None


def _after_fork() -> None:
    if getattr(_masks, "before", None) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _after_fork_in_child() -> None:
    with contextlib.suppress(ValueError):  # Not the main interpreter: it cannot have installed any.
        _process.let_go_in_child()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
