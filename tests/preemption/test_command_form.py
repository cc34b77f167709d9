"""Shells between a program and whoever signals it: said where the signal is lost, and only there."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from emergency_ckpt.preemption.command_form import shell_in_the_way

PROGRAM = f"{shlex.quote(sys.executable)} -m tests.preemption.shell_program"
RUN = f"{shlex.quote(sys.executable)} -m emergency_ckpt.cli.main run"
# In the manner of cluster tools: the command in a subshell, a trap that passes the signal on, and naps.
WRAPPER = """\
stopped() {{ kill -TERM "$running"; }}
trap stopped TERM
({command}) & running=$!
while kill -0 "$running" 2>/dev/null; do sleep 0.1; done
wait "$running"
"""


def lines_of(words: list[str]) -> tuple[bool, str, list[str]]:
    """Whether it was clear, what was said, and which signals came after a SIGTERM to the first process."""
    shell = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert shell.stdout is not None
    pid, _, said = shell.stdout.readline().strip().partition(" ")
    try:
        shell.send_signal(signal.SIGTERM)
        if said != "clear":
            # Had it passed the signal on, that would be there when it has ended.
            shell.wait(60)
            os.kill(int(pid), signal.SIGUSR1)
        rest = shell.stdout.read().split("\n")
        return said == "clear", said, [line for line in rest if line.startswith("got")]
    finally:
        if shell.poll() is None:
            shell.kill()
        shell.wait(60)
        shell.stdout.close()


def lost(words: list[str]) -> None:
    is_clear, said, got = lines_of(words)
    assert not is_clear
    assert said.startswith("a SIGTERM to ")
    assert "exec python" in said
    assert got == ["got SIGUSR1"]


def arrives(words: list[str]) -> None:
    is_clear, said, got = lines_of(words)
    assert is_clear, said
    assert got == ["got SIGTERM"]


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_a_signal_to_a_shell_that_waits_is_lost(shell: str) -> None:
    lost([shell, "-c", f"{PROGRAM}; true"])
    lost([shell, "-c", f"{PROGRAM} | cat"])
    # Some shells give way to their last command.
    is_clear, _, got = lines_of([shell, "-c", PROGRAM])
    assert got == ["got SIGTERM" if is_clear else "got SIGUSR1"]
    arrives([shell, "-c", f"true; exec {PROGRAM}"])


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_under_a_wrapper_that_passes_on_a_plain_command_is_reached_and_one_with_more_is_not(shell: str) -> None:
    for command in (f"{PROGRAM} | cat", f"{PROGRAM}; true"):
        lost([shell, "-c", WRAPPER.format(command=command)])
    for command in (PROGRAM, f"true; exec {PROGRAM}"):
        arrives([shell, "-c", WRAPPER.format(command=command)])
    lost([shell, "-c", f"{shell} -c {shlex.quote(WRAPPER.format(command=PROGRAM))}; true"])


def test_a_log_by_process_substitution_and_a_command_that_passes_on_let_it_through(tmp_path: Path) -> None:
    log, script = tmp_path / "log", tmp_path / "train.job"
    arrives(["bash", "-c", WRAPPER.format(command=f"{PROGRAM} > >(tee {log})")])
    assert log.read_text().endswith("got SIGTERM\n")
    hold = f"{RUN} --local-directory {tmp_path} -- {PROGRAM}"
    arrives(["bash", "-c", f"exec {hold}"])
    arrives(["bash", "-c", WRAPPER.format(command=hold)])
    # A script that is called by its name goes by that name, and does not give way to its last command.
    script.write_text(f"#!{shutil.which('bash')}\n{PROGRAM}\n")
    script.chmod(0o755)
    lost([str(script)])


def test_of_a_shell_with_a_terminal_nothing_is_said() -> None:
    command = ["bash", "-c", f"{PROGRAM}; true"]
    shell = subprocess.Popen(
        [sys.executable, "-c", f"import pty; pty.spawn({command!r})"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert shell.stdout is not None
    pid, _, said = shell.stdout.readline().strip().partition(" ")
    os.kill(int(pid), signal.SIGUSR1)
    shell.communicate(timeout=60)
    assert said == "clear"


def test_process_1_ignores_it_and_nothing_is_said_of_what_cannot_be_seen(tmp_path: Path) -> None:
    def process(pid: int, name: str, parent: int, caught: str = "0000000000010002") -> None:
        directory = tmp_path / str(pid)
        directory.mkdir(exist_ok=True)
        (directory / "stat").write_text(f"{pid} ({name}) S {parent} 1 1 0 -1 4194560 1 2 3")
        (directory / "status").write_text(f"Name:\t{name}\nSigCgt:\t{caught}\n")

    assert shell_in_the_way(proc=tmp_path) is None
    process(os.getppid(), "bash", 1, caught="0000000000014002")
    assert shell_in_the_way(proc=tmp_path) is None
    process(1, "sh", 0)
    line = shell_in_the_way(proc=tmp_path)
    assert line is not None
    assert line.startswith("a SIGTERM to sh (process 1)")
    assert "ignores it" in line
    process(1, "tini) sh (", 0)
    assert shell_in_the_way(proc=tmp_path) is None
    (tmp_path / "1" / "stat").write_text("nonsense")
    assert shell_in_the_way(proc=tmp_path) is None
