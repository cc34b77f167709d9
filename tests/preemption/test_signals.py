"""Signals as notices, in real programs: they are heard at once, and what was there before stays in charge."""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from emergency_ckpt.errors import ConfigError
from emergency_ckpt.preemption.choosing import names_of
from emergency_ckpt.preemption.signals import SignalOptions

LIMIT_SECONDS = 90


@contextlib.contextmanager
def program(name: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.preemption.signal_programs", name], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read(process: subprocess.Popen[str], last: str) -> list[str]:
    """The lines up to one that begins with `last`, that one included."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith(last):
            return lines
    raise AssertionError(f"{last!r} was never printed, but {lines}")


def end(process: subprocess.Popen[str]) -> list[str]:
    """The other lines of a program that ends well."""
    lines = read(process, "end")
    assert process.wait(LIMIT_SECONDS) == 0
    return lines[:-1]


@pytest.mark.parametrize(("name", "managers"), [("busy", 1), ("two_busy", 2)])
def test_a_signal_is_heard_while_no_bytecode_runs_and_a_later_one_ends_the_process(
    name: str, managers: int
) -> None:
    with program(name) as process:
        read(process, "ready")
        for _ in range(3):  # A wrapper that signals the process, and its group.
            process.send_signal(signal.SIGTERM)
        for _ in range(managers):
            assert read(process, "heard") == ["heard signal terminate SIGTERM"]
        for _ in range(LIMIT_SECONDS * 5):
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
                break
        assert process.returncode == -signal.SIGTERM
        assert process.stdout is not None
        assert process.stdout.read() == "", "one notice for one signal"


def test_the_handlers_that_were_there_are_called_and_come_back() -> None:
    with program("before") as process:
        read(process, "ready")
        process.send_signal(signal.SIGTERM)
        assert sorted(read(process, "one")) == ["handler SIGTERM", "heard signal terminate SIGTERM", "one"]
        process.send_signal(signal.SIGUSR1)
        assert read(process, "closed") == ["heard signal save SIGUSR1", "closed"]
        process.send_signal(signal.SIGTERM)
        assert end(process) == ["handler SIGTERM"]


def test_the_first_interrupt_is_a_notice_and_a_later_one_interrupts() -> None:
    with program("interrupted") as process:
        read(process, "ready")
        process.send_signal(signal.SIGINT)
        assert read(process, "heard") == ["heard signal terminate SIGINT"]
        assert process.stdout is not None
        for _ in range(LIMIT_SECONDS * 5):
            process.send_signal(signal.SIGINT)
            if select.select([process.stdout], [], [], 0.2)[0]:
                break
        assert end(process) == ["KeyboardInterrupt"]


def test_asyncio_hears_what_it_heard_before_and_may_come_later() -> None:
    with program("asyncio_before") as process:
        read(process, "ready")
        process.send_signal(signal.SIGUSR2)
        lines = end(process)
        assert sorted(lines) == ["heard signal save SIGUSR2", "loop SIGUSR2", "loop SIGUSR2"]
        assert lines[-1] == "loop SIGUSR2", "also when we have gone"
    with program("asyncio_later") as process:
        read(process, "ready")
        process.send_signal(signal.SIGTERM)
        assert end(process) == ["heard signal terminate SIGTERM"]


def test_a_forked_child_ends_by_its_signals_and_the_parent_hears_nothing_of_them() -> None:
    with program("forking") as process:
        assert read(process, "ready") == ["child ended by -15"] * 2 + ["ready"]
        process.send_signal(signal.SIGTERM)
        assert end(process) == ["heard signal terminate SIGTERM"]


def test_away_from_the_main_thread_one_line_is_said_and_a_close_from_there_lets_go() -> None:
    with program("elsewhere") as process:
        (line,) = end(process)
        assert line.startswith("said: no notice is heard from SIGTERM by this process: only the main thread")
    with program("closed_elsewhere") as process:
        read(process, "ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == -signal.SIGTERM


def test_what_is_ignored_or_belongs_to_a_library_is_left_alone_and_said() -> None:
    with program("owned") as process:
        lines = end(process)
    said = {line.split()[1]: line for line in lines}
    assert sorted(said) == ["SIGUSR1", "SIGUSR2"]
    assert "a library in C" in said["SIGUSR1"]
    assert "is ignored by this process" in said["SIGUSR2"]


def test_a_handler_that_takes_the_place_later_is_said_once_and_heard_all_the_same() -> None:
    with program("taken_later") as process:
        said = sorted(read(process, "ready")[:-1])
        assert len(said) == 2
        assert said[0].startswith("said: SIGTERM got another handler in Python after the manager was made")
        assert said[1].startswith("said: SIGUSR1 was made to be ignored")
        process.send_signal(signal.SIGTERM)
        assert sorted(end(process)) == ["handler SIGTERM", "heard signal terminate SIGTERM"]


def test_a_handler_that_jax_replaced_is_said() -> None:
    with program("replaced") as process:
        (line,) = end(process)
        assert line.startswith(
            "said: the handler of SIGTERM in Python that was installed before jax.distributed"
        )


def test_two_managers_hear_the_same_signal_and_the_first_goes_on_without_the_second() -> None:
    with program("two_managers") as process:
        read(process, "ready")
        process.send_signal(signal.SIGTERM)
        assert read(process, "second closed")[:-1] == ["heard signal terminate SIGTERM"] * 2
        process.send_signal(signal.SIGUSR1)
        assert end(process) == ["heard signal save SIGUSR1"]


def test_of_two_managers_the_older_one_may_close_first_and_each_hears_a_first_signal() -> None:
    with program("older_closed") as process:
        read(process, "ready")
        process.send_signal(signal.SIGTERM)
        assert read(process, "heard") == ["heard signal terminate SIGTERM"]
        process.send_signal(signal.SIGUSR1)
        assert read(process, "third") == ["heard signal save SIGUSR1", "third"]
        process.send_signal(signal.SIGTERM)
        assert end(process) == ["heard signal terminate SIGTERM"]


def test_with_a_strangers_handler_between_those_of_two_managers_each_is_called_once_and_all_come_back() -> None:
    with program("one_in_between") as process:
        assert read(process, "ready") == ["ready"]
        process.send_signal(signal.SIGTERM)
        lines = sorted(read(process, "closed")[:-1])
        assert lines == ["handler SIGTERM", *["heard signal terminate SIGTERM"] * 2, "stranger"]
        process.send_signal(signal.SIGTERM)
        assert end(process) == ["stranger", "handler SIGTERM"]
    with program("library_in_between") as process:
        assert end(process) == []


def test_what_a_close_elsewhere_left_behind_the_next_manager_of_the_main_thread_takes_over() -> None:
    with program("left_elsewhere") as process:
        read(process, "ready")
        process.send_signal(signal.SIGTERM)
        assert end(process) == ["heard signal terminate SIGTERM"]


def test_signals_are_chosen_by_name() -> None:
    assert SignalOptions(names_of("SIGUSR1, SIGTERM")).numbers == (signal.SIGTERM, signal.SIGUSR1)
    assert SignalOptions(names_of("off")).numbers == ()
    for wrong in ("", "off,SIGTERM", "SIGKILL", "15"):
        with pytest.raises(ConfigError, match="preemption_signals"):
            SignalOptions(names_of(wrong))
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="preemption_grace_seconds"):
            SignalOptions(grace_seconds=seconds)
