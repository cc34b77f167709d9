"""Programs that hear signals, for tests that send them: `python -m tests.preemption.signal_programs NAME`.

Each prints what it hears, and `ready` when signals may come.
"""

from __future__ import annotations

import asyncio
import faulthandler
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.preemption.signal_owners import owner_of
from emergency_ckpt.preemption.signals import SignalOptions, Signals

LIMIT_SECONDS = 60.0


class Heard:
    def __init__(self, *names: str, library_hears: bool = False) -> None:
        self.count = 0
        self.signals = Signals(
            SignalOptions(names or ("SIGTERM",), 25.0),
            self.hear,
            lambda line: say(f"said: {line}"),
            library_hears=library_hears,
        )

    def hear(self, notice: Notice) -> None:
        assert (notice.deadline == notice.received + 25.0) == (notice.kind == "terminate")
        say(f"heard {notice.source} {notice.kind} {notice.detail}")
        self.count += 1

    def wait(self, count: int = 1) -> None:
        until(lambda: self.count >= count)


def say(line: str) -> None:
    # One write: threads and signals come in between.
    os.write(1, f"{line}\n".encode())


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


called: list[int] = []


def on_signal(number: int, frame: FrameType | None) -> None:
    say(f"handler {signal.Signals(number).name}")
    called.append(number)


def busy() -> None:
    """The main thread runs no bytecode: a stand-in for a compilation."""
    Heard()
    say("ready")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)


def before() -> None:
    signal.signal(signal.SIGTERM, on_signal)
    heard = Heard("SIGTERM", "SIGUSR1")
    say("ready")
    heard.wait(1)
    say("one")
    heard.wait(2)
    heard.signals.close()
    assert signal.getsignal(signal.SIGTERM) is on_signal
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1
    say("closed")
    until(lambda: len(called) == 2)


def interrupted() -> None:
    heard = Heard("SIGINT")
    say("ready")
    try:
        heard.wait()
        until(lambda: False)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        say("KeyboardInterrupt")


async def until_async(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not done():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def asyncio_before() -> None:
    async def run() -> None:
        called: list[int] = []

        def on_loop() -> None:
            say("loop SIGUSR2")
            called.append(signal.SIGUSR2)

        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, on_loop)
        heard = Heard("SIGTERM", "SIGUSR2")
        say("ready")
        await until_async(lambda: heard.count == len(called) == 1)
        heard.signals.close()
        os.kill(os.getpid(), signal.SIGUSR2)
        await until_async(lambda: len(called) == 2)

    asyncio.run(run())


def asyncio_later() -> None:
    async def run() -> None:
        called: list[int] = []
        heard = Heard("SIGTERM")
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, called.append, signal.SIGUSR1)
        say("ready")
        await until_async(lambda: heard.count == 1)
        heard.signals.close()
        os.kill(os.getpid(), signal.SIGUSR1)
        await until_async(lambda: len(called) == 1)

    asyncio.run(run())


def forking() -> None:
    heard = Heard("SIGTERM")
    context = multiprocessing.get_context("fork")

    def fork() -> None:
        child = context.Process(target=time.sleep, args=(LIMIT_SECONDS,))
        child.start()
        child.terminate()
        child.join(LIMIT_SECONDS)
        say(f"child ended by {child.exitcode}")

    fork()
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join(LIMIT_SECONDS)
    assert heard.count == 0
    say("ready")
    heard.wait()


def elsewhere() -> None:
    thread = threading.Thread(target=Heard)
    thread.start()
    thread.join(LIMIT_SECONDS)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def closed_elsewhere() -> None:
    heard = Heard()
    thread = threading.Thread(target=heard.signals.close)
    thread.start()
    thread.join(LIMIT_SECONDS)
    say("ready")
    until(lambda: False)


def owned() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr)
    assert (owner_of(signal.SIGUSR2), owner_of(signal.SIGINT)) == ("ignored", "unknown")
    heard = Heard("SIGUSR1", "SIGUSR2", "SIGINT")
    assert [owner_of(number) for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)] == [
        "library",
        "python",
        "default",
    ]
    assert heard.signals.installed == (signal.SIGINT,)
    heard.signals.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def taken_later() -> None:
    """JAX's handler is played by faulthandler's: one in C of which Python knows nothing."""
    faulthandler.register(signal.SIGTERM, file=sys.stderr)
    heard = Heard("SIGTERM", "SIGUSR1", library_hears=True)
    assert heard.signals.installed == (signal.SIGUSR1,)
    heard.signals.look()
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    for _ in range(2):
        heard.signals.look()
    say("ready")
    heard.wait()
    heard.signals.close()
    assert signal.getsignal(signal.SIGTERM) is on_signal
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


def replaced() -> None:
    signal.signal(signal.SIGTERM, on_signal)
    faulthandler.register(signal.SIGTERM, file=sys.stderr)
    Heard(library_hears=True).signals.close()


def two_managers() -> None:
    first, second = Heard("SIGTERM", "SIGUSR1"), Heard("SIGTERM", "SIGUSR1")
    say("ready")
    first.wait(1)
    second.wait(1)
    second.signals.close()
    say("second closed")
    first.wait(2)
    first.signals.close()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert second.count == 1


def older_closed() -> None:
    first, second = Heard("SIGTERM", "SIGUSR2"), Heard("SIGTERM", "SIGUSR1")
    first.signals.close()
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL, "nobody listens to it any more"
    say("ready")
    second.wait(2)
    third = Heard("SIGTERM")  # Of a manager that is made later a SIGTERM is the first one.
    say("third")
    third.wait(1)
    second.signals.close()
    third.signals.close()
    assert (first.count, second.count) == (0, 2)
    assert {signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)} == {signal.SIG_DFL}
    assert signal.set_wakeup_fd(-1) == -1


def two_busy() -> None:
    kept = [Heard(), Heard()]
    say("ready")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)
    assert kept


def one_in_between() -> None:
    """Somebody takes the handler between two managers, and calls the one that was there before."""
    signal.signal(signal.SIGTERM, on_signal)
    first = Heard()

    def stranger(number: int, frame: FrameType | None) -> None:
        say("stranger")
        assert callable(before)
        before(number, frame)

    before = signal.signal(signal.SIGTERM, stranger)
    second = Heard()
    for _ in range(2):
        second.signals.look()
    say("ready")
    until(lambda: first.count == second.count == len(called) == 1)
    first.signals.close()
    second.signals.close()
    assert signal.getsignal(signal.SIGTERM) is stranger
    say("closed")
    until(lambda: len(called) == 2)
    signal.signal(signal.SIGTERM, before)
    third = Heard()
    third.signals.close()
    assert signal.getsignal(signal.SIGTERM) is on_signal


def left_elsewhere() -> None:
    """What could not be put back away from the main thread is with the next one that comes and goes there."""
    first = Heard("SIGTERM", "SIGUSR1")
    thread = threading.Thread(target=first.signals.close)
    thread.start()
    thread.join(LIMIT_SECONDS)
    second = Heard()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    say("ready")
    second.wait()
    second.signals.close()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1
    assert first.count == 0


def library_in_between() -> None:
    """JAX's handler, played by faulthandler's, comes after the first manager, and belongs to nobody of ours."""
    first = Heard("SIGTERM")
    faulthandler.register(signal.SIGTERM, file=sys.stderr)
    second = Heard("SIGTERM", library_hears=True)
    assert second.signals.installed == ()
    second.signals.look()
    first.signals.close()
    assert owner_of(signal.SIGTERM) == "library"
    second.signals.close()
    assert owner_of(signal.SIGTERM) == "library"


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    say("end")
