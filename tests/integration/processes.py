"""Real JAX jobs for tests: a function runs in N processes that are joined by `jax.distributed`.

    def report(greeting):                       # at the top level of a test module; runs in each process
        return f"{greeting} from {jax.process_index()}"

    assert run_job(report, 2, "hello") == ["hello from 0", "hello from 1"]

Tests that kill and signal use `Job` itself. No process outlives the `with` block, nor the test run if that is
killed: each child ends when its standard input, a pipe from here, does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.integration.forking import REPOSITORY, SAME_VARIABLES, Forked, source_of

__all__ = ["REPOSITORY", "Job", "run_job"]

Process = subprocess.Popen[str] | Forked
DEFAULT_LIMIT = timedelta(seconds=90)
_START = timedelta(seconds=60)
_LAST_OUTPUT = timedelta(seconds=1)
_TAIL_LINES = 40
_RESULT = "EMERGENCY_CKPT_TEST_RESULT"


def run_job(
    function: Callable[..., Any],
    process_count: int,
    *arguments: Any,
    devices_per_process: int = 1,
    limit: timedelta = DEFAULT_LIMIT,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """What `function(*arguments)` returned in each process; both go through JSON.

    Fails with the output of all processes as soon as one of them fails, or at the time limit.
    """
    job = Job(
        function, process_count, *arguments, devices_per_process=devices_per_process, environment=environment
    )
    with job:
        job.wait_until(lambda: job.all_ended or job.failed, limit)
        assert not job.failed, job.describe()
        return [job.result(process) for process in range(process_count)]


class Job:
    """N running processes of one function; a context manager that leaves none behind.

    Attributes:
      processes: the process handles, by process index.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        process_count: int,
        *arguments: Any,
        devices_per_process: int = 1,
        environment: Mapping[str, str] | None = None,
        heartbeat_seconds: int = 30,
    ) -> None:
        self._plan = _Plan(
            f"{function.__module__}:{function.__qualname__}", process_count, arguments, heartbeat_seconds
        )
        self._environment = {
            **os.environ,
            **SAME_VARIABLES,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices_per_process}",
            **(environment or {}),
        }
        self._changed = threading.Condition()
        self._lines: list[list[str]] = [[] for _ in range(process_count)]
        self._returncodes: list[int | None] = [None] * process_count
        self._threads: list[threading.Thread] = []
        self._cleanup = contextlib.ExitStack()
        self.processes: list[Process] = []

    def __enter__(self) -> Job:
        with contextlib.ExitStack() as stack:
            self._results = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            address = stack.enter_context(_reserved_address())
            stack.callback(self._end_all)
            for index in range(self._plan.process_count):
                self._start(index, address)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def lines(self, process: int) -> list[str]:
        """What the process has printed so far, standard error included."""
        with self._changed:
            return list(self._lines[process])

    def wait_for_line(self, process: int, text: str, limit: timedelta = DEFAULT_LIMIT) -> str:
        """The first line of the process that contains `text`; fails at the limit or when the process ends."""

        def find() -> str | None:
            return next((line for line in self._lines[process] if text in line), None)

        self.wait_until(lambda: find() is not None or self._returncodes[process] is not None, limit)
        line = find()
        assert line is not None, f"process {process} ended without printing {text!r}\n{self.describe()}"
        return line

    def signal(self, process: int, number: signal.Signals) -> None:
        """Sends a signal to one process."""
        self.processes[process].send_signal(number)

    def kill(self, process: int, limit: timedelta = DEFAULT_LIMIT) -> None:
        """Ends one process with SIGKILL and waits until it is gone."""
        self.signal(process, signal.SIGKILL)
        self.wait_until(lambda: self._returncodes[process] is not None, limit)

    def wait(self, limit: timedelta = DEFAULT_LIMIT) -> list[int]:
        """The return codes (negative: the signal) once all processes have ended; fails at the limit."""
        self.wait_until(lambda: self.all_ended, limit)
        return [code for code in self._returncodes if code is not None]

    def wait_until(self, condition: Callable[[], bool], limit: timedelta) -> None:
        """Waits for something that output or the end of a process brings about; fails at the limit."""
        with self._changed:
            met = self._changed.wait_for(condition, limit.total_seconds())
        assert met, f"nothing came of it within {limit.total_seconds():.0f} s\n{self.describe()}"

    @property
    def all_ended(self) -> bool:
        return None not in self._returncodes

    @property
    def failed(self) -> bool:
        """Whether any process ended with an error or by a signal."""
        return any(self._returncodes)

    def result(self, process: int) -> Any:
        """What the function returned in this process, which must have ended well."""
        path = self._results / str(process)
        assert path.exists(), f"process {process} returned nothing\n{self.describe()}"
        return json.loads(path.read_text())

    def describe(self) -> str:
        """State and last output of every process, for failure messages."""
        with self._changed:
            parts = [
                f"--- process {index}: {'running' if code is None else f'return code {code}'}\n"
                + "\n".join(lines[-_TAIL_LINES:])
                for index, (code, lines) in enumerate(zip(self._returncodes, self._lines, strict=True))
            ]
        return f"{self._plan.target} in {self._plan.process_count} processes\n" + "\n".join(parts)

    def _start(self, index: int, address: str) -> None:
        arguments = [self._plan.to_json(), str(index), address]
        environment = {**self._environment, _RESULT: str(self._results / str(index))}
        source = source_of(index, environment)
        process: Process = (
            _started(arguments, environment)
            if source is None
            else source.fork(f"{__name__}:run_one", arguments, environment)
        )
        self.processes.append(process)
        reader = threading.Thread(target=self._read, args=(index, process), name=f"output of process {index}")
        waiter = threading.Thread(
            target=self._wait, args=(index, process, reader), name=f"end of process {index}"
        )
        self._threads += [reader, waiter]
        reader.start()
        waiter.start()

    def _read(self, index: int, process: Process) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with self._changed:
                self._lines[index].append(line.rstrip("\n"))
                self._changed.notify_all()

    def _wait(self, index: int, process: Process, reader: threading.Thread) -> None:
        code = process.wait()
        # All output comes before the end; but what the process started may hold its end of the pipe open.
        reader.join(_LAST_OUTPUT.total_seconds())
        with self._changed:
            self._returncodes[index] = code
            self._changed.notify_all()

    def _end_all(self) -> None:
        for process in self.processes:
            # The process leads a session of its own, so that whatever it started goes with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for thread in self._threads:
            thread.join()
        for process in self.processes:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            if isinstance(process, Forked):
                process.close()


def _started(arguments: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=REPOSITORY,
        env=dict(environment),
        start_new_session=True,
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a child must know, beside its index and the address of the coordination service."""

    target: str
    process_count: int
    arguments: tuple[Any, ...]
    heartbeat_seconds: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> _Plan:
        return cls(**json.loads(text))


@contextlib.contextmanager
def _reserved_address() -> Iterator[str]:
    """A loopback address that nobody else gets while it is held: gRPC shares the port by SO_REUSEPORT."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def run_one(plan: str, index: str, address: str) -> None:
    """The main program of a process of a job."""
    _main(_Plan.from_json(plan), int(index), address)


def _main(plan: _Plan, index: int, address: str) -> None:
    """One process of the job: joins, runs the function, leaves its result behind."""
    threading.Thread(target=_end_with_parent, daemon=True, name="end with parent").start()
    import jax

    if index:
        _wait_for_listener(address)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=address,
        coordinator_bind_address=address,
        num_processes=plan.process_count,
        process_id=index,
        initialization_timeout=round(_START.total_seconds()),
        heartbeat_timeout_seconds=plan.heartbeat_seconds,
    )
    module, _, name = plan.target.partition(":")
    try:
        result = getattr(importlib.import_module(module), name)(*plan.arguments)
        Path(os.environ[_RESULT]).write_text(json.dumps(result))
    except Exception:
        # Leaving in the ordinary way would first wait for the other processes.
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    jax.distributed.shutdown()


def _wait_for_listener(address: str) -> None:
    """Who asks for the coordination service before it is there asks again a second later only."""
    host, _, port = address.partition(":")
    deadline = time.monotonic() + _START.total_seconds()
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.01)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    run_one(*sys.argv[1:])
