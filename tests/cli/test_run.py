"""`emergency-ckpt run`: signals reach the command, its exit code comes back, and drains are waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from emergency_ckpt.agent.draining import destination_of
from emergency_ckpt.agent.order_client import OrderClient
from emergency_ckpt.agent.orders import Share
from emergency_ckpt.agent.record import agent_directory, read_record
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.store import PersistentStore
from tests.agent.jobs import make_job
from tests.agent.served import (
    RUN,
    ending_agents,
    has_ended,
    open_ramdisk,
    pid_of,
    start,
    wait_until_gone,
)

PYTHON = [sys.executable, "-c"]


def begin(root: Path, command: Sequence[str], *options: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "emergency_ckpt.cli.main", "run", "--local-directory", str(root), *options]
    return subprocess.Popen(
        [*words, "--", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def read(process: subprocess.Popen[str], stream: str, text: str) -> None:
    """Reads lines until one has the text."""
    lines = process.stdout if stream == "stdout" else process.stderr
    assert lines is not None
    for line in lines:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never said")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_the_exit_code_is_that_of_the_command(ramdisk: Path, code: str, expected: int) -> None:
    with begin(ramdisk, [*PYTHON, code]) as process:
        assert process.wait(60) == expected


def test_a_command_that_cannot_be_run_is_told_as_a_shell_does(ramdisk: Path) -> None:
    plain = ramdisk / "plain"
    plain.write_text("no program")
    for command, expected in ((["/no/such/program"], 127), ([str(plain)], 126)):
        with begin(ramdisk, command) as process:
            assert process.wait(60) == expected
            assert process.stderr is not None
            assert "cannot run" in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_command(ramdisk: Path, number: signal.Signals) -> None:
    code = f"""
import signal, sys
signal.signal({int(number)}, lambda *_: sys.exit(40 + {int(number)}))
print("ready", flush=True)
signal.pause()
"""
    with begin(ramdisk, [*PYTHON, code]) as process:
        read(process, "stdout", "ready")
        process.send_signal(number)
        assert process.wait(60) == 40 + number


def test_it_reaps_orphans_and_signals_nobody_else(ramdisk: Path) -> None:
    """As the first process of a container: the grandchild is given to it, ends, and leaves no zombie."""
    code = """
import os, sys, time
if os.fork() == 0:
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        sys.stdin.readline()
    os._exit(0)
os.wait()
os.close(0)
time.sleep(600)
"""
    subreaper = "import ctypes, sys; ctypes.CDLL(None).prctl(36, 1); from emergency_ckpt.cli.main import main; "
    words = [*PYTHON, subreaper + "sys.exit(main(sys.argv[1:]))", "run", "--local-directory", str(ramdisk)]
    with subprocess.Popen(
        [*words, "--", *PYTHON, code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        orphan = psutil.Process(int(process.stdout.readline()))
        process.stdin.write("end\n")
        process.stdin.flush()
        assert has_ended(orphan.pid, 30)
        deadline = time.monotonic() + 30
        while orphan.is_running():
            assert time.monotonic() < deadline, "it is a zombie"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 128 + signal.SIGUSR1


def test_what_is_ignored_stays_ignored(ramdisk: Path) -> None:
    code = "import signal; print(signal.getsignal(1) == signal.SIG_IGN, flush=True); signal.pause()"
    words = [sys.executable, "-m", "emergency_ckpt.cli.main", "run", "--local-directory", str(ramdisk)]
    with subprocess.Popen(
        ["nohup", *words, "--", *PYTHON, code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM


def test_an_agent_that_was_killed_with_the_command_is_started_again(ramdisk: Path, tmp_path: Path) -> None:
    with ending_agents(ramdisk), open_ramdisk(ramdisk) as disk:
        job = make_job(disk, tmp_path / "bucket")
        job.save(7)
        with job.trainer():
            pid = pid_of(ramdisk)
            os.kill(pid, signal.SIGKILL)
            wait_until_gone(pid)
        with begin(ramdisk, [*PYTHON, "raise SystemExit(3)"]) as process:
            read(process, "stderr", "ended with work left: another one is started")
            read(process, "stderr", "nothing is left to do")
            assert process.wait(60) == 3
        assert job.committed == [StepId(1, 7)]


def test_without_a_directory_or_a_command_nothing_is_run(ramdisk: Path) -> None:
    words = [sys.executable, "-m", "emergency_ckpt.cli.main", "run"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("M_")}
    for more, said in ((["--", "true"], "--local-directory"), ([], "no command")):
        done = subprocess.run([*words, *more], capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 2
        assert said in done.stderr
    environment["M_LOCAL_CHECKPOINT_DIRECTORY"] = str(ramdisk)
    assert subprocess.run([*words, "--", "true"], env=environment, timeout=60).returncode == 0


@pytest.fixture
def drain(ramdisk: Path, tmp_path: Path) -> Iterator[tuple[OrderClient, str]]:
    """An agent with a drain that waits for another process, and the id of the drain."""
    with ending_agents(ramdisk), open_ramdisk(ramdisk) as disk:
        store = PersistentStore(tmp_path / "bucket")
        generation = store.mint_generation(0, None)
        disk.save(StepId(1, 7), nonce=generation.nonce)
        start(ramdisk)
        record = read_record(agent_directory(ramdisk))
        assert record is not None
        agent = OrderClient.of_this_host(record)
        destination = destination_of(store, RUN, generation, "default", WriteOptions(), 60.0)
        began = agent.begin(destination, Share(7, 0, disk.layout.hash, 0, (0, 1), True))
        yield agent, began
        agent.give_up(began, "the test is over")


def test_it_holds_on_until_the_drain_is_over(ramdisk: Path, drain: tuple[OrderClient, str]) -> None:
    agent, began = drain
    with begin(ramdisk, [*PYTHON, "raise SystemExit(3)"]) as process:
        read(process, "stderr", "holding on: the agent")
        assert process.poll() is None
        agent.give_up(began, "enough")
        read(process, "stderr", "nothing is left to do")
        assert process.wait(60) == 3


def test_it_holds_on_no_longer_than_the_grace_period(ramdisk: Path, drain: tuple[OrderClient, str]) -> None:
    agent, began = drain
    with begin(ramdisk, [*PYTHON, "raise SystemExit(3)"], "--grace-seconds", "0.5") as process:
        read(process, "stderr", "the grace period is over: the agent")
        assert process.wait(60) == 3
    assert agent.look(began).ending is None


def test_a_second_signal_ends_the_hold(ramdisk: Path, drain: tuple[OrderClient, str]) -> None:
    agent, began = drain
    with begin(ramdisk, [*PYTHON, "print('ready', flush=True); import signal; signal.pause()"]) as process:
        read(process, "stdout", "ready")
        process.send_signal(signal.SIGTERM)
        read(process, "stderr", "holding on")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert agent.look(began).ending is None
