"""Signals as notices, heard at once by a thread, also while the main thread is inside a compilation.

Whoever had the signal before is called as before. Where that is the default action, which ends the process, the
first signal is a notice instead, and a second one acts as if nobody had come.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import signal
import threading
import time
from collections.abc import Callable

from emergency_ckpt.errors import ConfigError
from emergency_ckpt.preemption.choosing import OFF
from emergency_ckpt.preemption.handlers import SAME_SECONDS, Listener, found_before, is_ours, join, leave
from emergency_ckpt.preemption.notice import Notice, new_id
from emergency_ckpt.preemption.signal_owners import learn, owner_of

SIGNAL = "signal"
GRACE_SECONDS = 30.0
"""Kubernetes' `terminationGracePeriodSeconds` where nothing else is said."""
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
    """Hears signals from construction until `close`, beside others of its kind; they may go in any order.

    Made and closed in the main thread; else it does nothing.

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
        self._said: set[int] = set()
        self._heard: dict[int, _Heard] = {}  # of the reading thread
        self._undelivered: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()
        self._listener: Listener | None = None
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
        """The signals that have our handler for this."""
        return () if self._listener is None else tuple(sorted(self._listener.installed))

    def look(self) -> None:
        """Says, once, what became of a handler. From any thread, now and then."""
        listener = self._listener
        if self._closed or listener is None:
            return
        for number in (listener.left | listener.installed) - self._said:
            owner, name = owner_of(number), _NAMES[number]
            is_well = owner == "library" if number in listener.left else owner == "python" and is_ours(number)
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
        """Hears no more; what nobody else listens to is put back, where it is still ours. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._listener is not None:
            leave(self._listener)
        self._undelivered.put(None)
        if self._courier is not None:
            self._courier.join(_CLOSE_SECONDS)

    def _begin(self, numbers: tuple[int, ...], library_hears: bool) -> None:
        to_install: list[int] = []
        left: list[int] = []
        for number in numbers:
            owner, name = owner_of(number), _NAMES[number]
            jaxs = library_hears and number == signal.SIGTERM and owner in ("library", "unknown")
            if jaxs:
                left.append(number)
                if callable(found_before(number)):
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
        if not to_install and not left:
            return
        self._courier = threading.Thread(target=self._carry, name="emergency_ckpt signal notices", daemon=True)
        self._courier.start()
        self._listener = Listener(frozenset(to_install), frozenset(left), self._arrived, self._abandoned)
        join(self._listener)

    # In the reading thread.

    def _arrived(self, number: int) -> bool:
        now, received, name = time.monotonic(), time.time(), _NAMES[number]
        heard = self._heard.get(number)
        if heard is not None and now - heard.at < SAME_SECONDS:
            return False
        if number not in _SAVE.values():
            if heard is not None:
                return True
            self._heard[number] = _Heard(now, 1)
            ends = received + self._grace_seconds
            self._undelivered.put(Notice(SIGNAL, "terminate", received, ends, name, new_id()))
            return False
        count = 1 if heard is None else heard.count + 1
        self._heard[number] = _Heard(now, count)
        detail = name if count == 1 else f"{name}, number {count}"
        self._undelivered.put(Notice(SIGNAL, "save", received, None, detail, new_id()))
        return False

    def _carry(self) -> None:
        while (notice := self._undelivered.get()) is not None:
            self._deliver(notice)

    def _abandoned(self) -> None:
        self._closed = True


_BECAME = {
    "default": "was given its default action back",
    "ignored": "was made to be ignored",
    "library": "got a handler of a library in C",
}


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(_NAMES[number] for number in numbers)
