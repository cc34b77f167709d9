"""The program that the launcher's tests launch: does what its arguments say, in their order.

    report=N            reports step N
    wait                waits for a signal, for ever
    exit=N              ends with exit code N
    usr1=N              ends with exit code N on SIGUSR1, from here on
    ignore-term         ignores SIGTERM from here on
    touch=NAME          makes a file in its ramdisk directory
    list=DIR            writes the names in its ramdisk directory to DIR/<process>.<attempt>
    env=DIR             writes its environment as JSON to DIR/<process>.<attempt>
    print=TEXT          prints a line
    child=DIR           starts a process of its own session that waits; its pid goes to DIR/<process>.<attempt>
    agent=DIR           starts the agent of its ramdisk, if none runs; its pid goes to DIR/<process>.<attempt>
    alive=FILE          ends with exit code 9 unless the process whose id is in FILE is alive
    until=FILE          waits until there is such a file
    barrier=DIR         waits until all processes of this attempt came here
    raw=TEXT            writes TEXT and a newline to the progress pipe, without our client

An argument `P:what` counts for process P only, `@A:what` for attempt A only, `P@A:what` for both.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from emergency_ckpt.agent.options import AgentOptions
from emergency_ckpt.agent.record import agent_directory, read_record
from emergency_ckpt.agent.starting import ensure_agent
from emergency_ckpt.jaxio import launch


def main() -> None:
    launched = launch.launched_process()
    assert launched is not None
    mine = f"{launched.process}.{launched.attempt}"
    for argument in sys.argv[1:]:
        where, colon, action = argument.partition(":")
        if colon:
            process, _, attempt = where.partition("@")
            if process not in ("", str(launched.process)) or attempt not in ("", str(launched.attempt)):
                continue
        else:
            action = argument
        name, _, value = action.partition("=")
        match name:
            case "report":
                launch.report_step(int(value))
            case "wait":
                while True:
                    signal.pause()
            case "exit":
                sys.exit(int(value))
            case "usr1":
                signal.signal(signal.SIGUSR1, leave_with(int(value)))
            case "ignore-term":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            case "touch":
                (launched.ramdisk / value).touch()
            case "list":
                (Path(value) / mine).write_text(" ".join(sorted(os.listdir(launched.ramdisk))))
            case "env":
                (Path(value) / mine).write_text(json.dumps(dict(os.environ)))
            case "print":
                print(value)
            case "child":
                command = [sys.executable, "-c", "import signal; signal.pause()"]
                child = subprocess.Popen(command, start_new_session=True)
                (Path(value) / mine).write_text(str(child.pid))
            case "agent":
                ensure_agent(launched.ramdisk, AgentOptions(bind="127.0.0.1", idle_seconds=120))
                record = read_record(agent_directory(launched.ramdisk))
                assert record is not None
                (Path(value) / mine).write_text(str(record.pid))
            case "alive":
                # A process that has ended and that nobody waited for has an empty command line.
                command_line = Path("/proc", Path(value).read_text(), "cmdline")
                if not command_line.exists() or not command_line.read_bytes():
                    sys.exit(9)
            case "until":
                wait_for(Path(value))
            case "barrier":
                meet(Path(value), launched)
            case "raw":
                with open(os.environ[launch.PROGRESS], "w") as pipe:
                    pipe.write(value + "\n")
            case _:
                sys.exit(f"unknown action {argument!r}")


def leave_with(code: int) -> Callable[[int, FrameType | None], None]:
    return lambda number, frame: os._exit(code)


def meet(directory: Path, launched: launch.LaunchedProcess) -> None:
    """Waits for all processes of this attempt; the test's time limit ends it when one does not come."""
    (directory / f"came.{launched.process}.{launched.attempt}").touch()
    expected = [directory / f"came.{k}.{launched.attempt}" for k in range(launched.process_count)]
    for path in expected:
        wait_for(path)


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


if __name__ == "__main__":
    main()
