"""Signals as notices, heard at once by a thread, also while the main thread is inside a compilation.

Whoever had the signal before is called as before. Where that is the default action, which ends the process, the
first signal is a notice instead, and a second one acts as if nobody had come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from emergency_ckpt.errors import ConfigError
from emergency_ckpt.preemption.choosing import OFF
from emergency_ckpt.preemption.notice import Notice, new_id
from emergency_ckpt.preemption.signal_owners import learn, owner_of, set_default
from emergency_ckpt.preemption.wakeup import Wakeup

SIGNAL = "signal"
GRACE_SECONDS = 30.0
"""Kubernetes' `terminationGracePeriodSeconds` where nothing else is said."""
SAME_SECONDS = 1.0
"""Signals that follow within this time are one: wrappers signal a process and then its group."""
_TERMINATE = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
_SAVE = {"SIGUSR1": signal.SIGUSR1, "SIGUSR2": signal.SIGUSR2}
_NAMES = {int(number): name for name, number in (_TERMINATE | _SAVE).items()}
_CLOSE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class SignalOptions:
    """Which signals are notices. Raises ConfigError, which names the option.

    Attributes:
      names: any of SIGTERM and SIGINT (the process is to end), SIGUSR1 and SIGUSR2 (a save is asked for), or
        `off` alone.
      grace_seconds: how long after a signal to end the process is killed.
    """

    names: tuple[str, ...] = ("SIGTERM",)
    grace_seconds: float = GRACE_SECONDS

    def __post_init__(self) -> None:
        known = (*_TERMINATE, *_SAVE)
        if self.names != (OFF,) and not (self.names and set(self.names) <= set(known)):
            raise ConfigError(
                f"preemption_signals is {','.join(self.names)!r:.80}; expected any of {', '.join(known)}, "
                f"separated by commas, or {OFF} alone"
            )
        if not 0 <= self.grace_seconds < math.inf:
            raise ConfigError(f"preemption_grace_seconds is {self.grace_seconds}; expected 0 or more seconds")

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(number for number, name in _NAMES.items() if name in self.names)


@dataclasses.dataclass(frozen=True, slots=True)
class _Heard:
    """Of one signal: when the latest came that was told, and how many were."""

    at: float
    count: int


class Signals:
    """Hears signals from construction until `close`. Made and closed in the main thread; else it does nothing.

    Args:
      deliver: called with each notice, by a thread of this. It raises nothing.
      say: called with sentences for the log, from any thread.
      library_hears: a handler of SIGTERM in C belongs to somebody who tells all processes of the job.
    """

    def __init__(
        self,
        options: SignalOptions,
        deliver: Callable[[Notice], None],
        say: Callable[[str], None],
        *,
        library_hears: bool,
    ) -> None:
        self._grace_seconds = options.grace_seconds
        self._deliver = deliver
        self._say = say
        self._closed = False
        self._handler = self._on_signal  # One object, by which it is known again.
        self._before: dict[int, Any] = {}  # of the signals that have our handler
        self._left: set[int] = set()  # to a library
        self._said: set[int] = set()
        self._heard: dict[int, _Heard] = {}  # of the reading thread
        self._insisted: set[int] = set()
        self._first_in_main: dict[int, float] = {}
        self._undelivered: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()
        self._wakeup: Wakeup | None = None
        self._courier: threading.Thread | None = None
        if not options.numbers:
            return
        if threading.current_thread() is not threading.main_thread():
            say(
                f"no notice is heard from {_listed(options.numbers)} by this process: only the main thread can "
                "install handlers, and the manager was made in another one. JAX's own handler of SIGTERM is "
                "not concerned"
            )
            return
        learn()
        self._begin(options.numbers, library_hears)

    @property
    def installed(self) -> tuple[int, ...]:
        """The signals that have our handler."""
        return tuple(self._before)

    def look(self) -> None:
        """Says, once, what became of a handler. From any thread, now and then."""
        if self._closed or self._wakeup is None:
            return
        for number in (self._left | set(self._before)) - self._said:
            owner, name = owner_of(number), _NAMES[number]
            if number in self._left:
                is_well = owner == "library"
            else:
                is_well = owner == "python" and signal.getsignal(number) is self._handler
            if is_well or owner == "unknown":
                continue
            self._said.add(number)
            if owner == "python":
                self._say(
                    f"{name} got another handler in Python after the manager was made. It is a notice all the "
                    "same, unless something that calls signal.set_wakeup_fd (asyncio's add_signal_handler) "
                    "came as well; and that handler must not end the process. To be sure, install it before "
                    "the manager is made, which calls it then, or set preemption_signals=off"
                )
            else:
                self._say(
                    f"{name} {_BECAME[owner]} after the manager was made: it is no notice any more. Do so "
                    "before the manager is made, or say it by preemption_signals"
                )

    def close(self) -> None:
        """Puts back what was there, where it is still ours, and hears no more. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._wakeup is None:
            return
        _open.remove(self)
        if threading.current_thread() is threading.main_thread():
            self._put_back()
        # From another thread nothing can be put back: the handler stays, and hands on to what was before.
        self._wakeup.close(_CLOSE_SECONDS)
        self._undelivered.put(None)
        if self._courier is not None:
            self._courier.join(_CLOSE_SECONDS)

    def _begin(self, numbers: tuple[int, ...], library_hears: bool) -> None:
        to_install: list[int] = []
        for number in numbers:
            owner, name = owner_of(number), _NAMES[number]
            jaxs = library_hears and number == signal.SIGTERM and owner in ("library", "unknown")
            if jaxs:
                self._left.add(number)
                if callable(signal.getsignal(number)):
                    self._say(
                        f"the handler of {name} in Python that was installed before "
                        "jax.distributed.initialize() is never called: JAX put its own in the place. Install "
                        "it after that, and before the manager is made"
                    )
            elif owner == "ignored":
                self._say(f"{name} is ignored by this process, as whoever started it wished: it is no notice")
            elif owner == "library":
                self._say(
                    f"{name} has a handler of a library in C (faulthandler?), which is left alone: it is no "
                    "notice. Register that for another signal"
                )
            else:
                to_install.append(number)
        if not to_install and not self._left:
            return
        self._wakeup = Wakeup(self._arrived)
        self._courier = threading.Thread(target=self._carry, name="emergency_ckpt signal notices", daemon=True)
        self._courier.start()
        _open.append(self)
        for number in to_install:
            known = signal.getsignal(number)
            # A library that came and went leaves the default action behind, of which Python does not know.
            self._before[number] = signal.SIG_DFL if owner_of(number) == "default" or known is None else known
            signal.signal(number, self._handler)

    # In the reading thread.

    def _arrived(self, number: int) -> None:
        if number not in self._before and number not in self._left:
            return
        now, received, name = time.monotonic(), time.time(), _NAMES[number]
        heard = self._heard.get(number)
        if number in _SAVE.values():
            if heard is None or now - heard.at >= SAME_SECONDS:
                count = 1 if heard is None else heard.count + 1
                self._heard[number] = _Heard(now, count)
                detail = name if count == 1 else f"{name}, number {count}"
                self._undelivered.put(Notice(SIGNAL, "save", received, None, detail, new_id()))
        elif heard is None:
            self._heard[number] = _Heard(now, 1)
            notice = Notice(SIGNAL, "terminate", received, received + self._grace_seconds, name, new_id())
            self._undelivered.put(notice)
        elif now - heard.at >= SAME_SECONDS:
            self._insist(number)

    def _insist(self, number: int) -> None:
        """A second signal: the main thread may be busy for long, so a default action is taken from here."""
        self._insisted.add(number)
        is_ours = not self._closed and signal.getsignal(number) is self._handler
        if is_ours and self._before.get(number) == signal.SIG_DFL and set_default(number):
            os.kill(os.getpid(), number)

    def _carry(self) -> None:
        while (notice := self._undelivered.get()) is not None:
            self._deliver(notice)

    # In the main thread.

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if not self._closed and self._wakeup is not None:
            self._wakeup.tell_if_deaf(number)
            if before in (signal.SIG_DFL, signal.default_int_handler):
                now = time.monotonic()
                first = self._first_in_main.setdefault(number, now)
                is_second = number in self._insisted or now - first >= SAME_SECONDS
                if number in _SAVE.values() or not is_second:
                    return
        if callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _put_back(self) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) is self._handler and owner_of(number) in ("python", "unknown"):
                signal.signal(number, before)
        if self._wakeup is not None:
            self._wakeup.put_back()

    def let_go_in_child(self) -> None:
        """In a forked child: what is sent to it concerns nobody else, and ends it as before."""
        self._closed = True
        self._put_back()
        if self._wakeup is not None:
            self._wakeup.abandon()


_BECAME = {
    "default": "was given its default action back",
    "ignored": "was made to be ignored",
    "library": "got a handler of a library in C",
}
_open: list[Signals] = []  # in the order in which they came
_masks = threading.local()


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(_NAMES[number] for number in numbers)


def _before_fork() -> None:
    # A signal to the child must not be heard before it has let go.
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, _NAMES) if _open else None


def _after_fork() -> None:
    if getattr(_masks, "before", None) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _after_fork_in_child() -> None:
    with contextlib.suppress(ValueError):  # Not the main interpreter: it cannot have installed any.
        while _open:
            _open.pop().let_go_in_child()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
