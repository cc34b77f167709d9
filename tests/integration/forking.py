"""Processes of jobs, forked from one that has imported JAX and Orbax: that takes longer than most lives.

A source of processes imports and does nothing else: it has no backend and no thread of ours, and its processes
have its environment. There are two of them, which process indices share: their hashes are seeded differently,
so that processes of one job do not walk through their sets in the same order by chance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).parents[2]
SOURCES = 2
LOADED = (
    "jax.experimental.multihost_utils",
    "orbax.checkpoint",
    "tests.integration.training_job",
)
SAME_VARIABLES = {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
"""What all processes of jobs have."""
OWN_VARIABLES = ("XLA_FLAGS", "EMERGENCY_CKPT_TEST_RESULT", "PYTEST_CURRENT_TEST")
"""What each process may have of its own: imports read none of them."""
SET_BY_IMPORTS = ("TF_CPP_MIN_LOG_LEVEL", "TPU_SKIP_MDS_QUERY")
"""What importing JAX sets where it is not set."""
_ENVIRONMENT = {**os.environ, **SAME_VARIABLES}  # of sources: that of the tests, before one of them changes it
_LARGEST_REQUEST = 1 << 20
_LIMIT_SECONDS = 60.0


class Forked:
    """A running process that is another one's child; what the tests use of `subprocess.Popen`."""

    def __init__(self, status: socket.socket, stdin: IO[str], stdout: IO[str]) -> None:
        status.settimeout(_LIMIT_SECONDS)
        told, (self._handle,), _, _ = socket.recv_fds(status, 64, 1)
        status.settimeout(None)
        self._status = status
        self.pid = int(told)
        self.stdin, self.stdout = stdin, stdout

    def send_signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def wait(self) -> int:
        """The return code (negative: the signal). Call it once."""
        with self._status:
            told = self._status.recv(64)
        assert told, "what the process was forked from is gone"
        return int(told)

    def close(self) -> None:
        """Call it when nobody signals any more."""
        os.close(self._handle)


class Source:
    """A process that forks others when it is asked to."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._asking, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                cwd=REPOSITORY,
                env=_ENVIRONMENT,
                pass_fds=[theirs.fileno()],
            )

    def fork(self, call: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Forked:
        """A process that calls `module:function` with the arguments, with pipes in place of its own files."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stdin, to_stdin = os.pipe()
        from_stdout, stdout = os.pipe()
        request = json.dumps([call, list(arguments), dict(environment)]).encode()
        try:
            with theirs, self._guard:
                socket.send_fds(self._asking, [request], [theirs.fileno(), stdin, stdout])
        finally:
            os.close(stdin)
            os.close(stdout)
        return Forked(ours, open(to_stdin, "w"), open(from_stdout, errors="replace"))

    def close(self) -> None:
        """The source ends; what was forked goes on."""
        self._asking.close()
        self._process.wait(_LIMIT_SECONDS)


_sources: list[Source] = []
_guard = threading.Lock()


def source_of(index: int, environment: Mapping[str, str]) -> Source | None:
    """That of a process index; None where imports would have read something else in this environment."""
    if _common(environment) != _common(_ENVIRONMENT):
        return None
    with _guard:
        while len(_sources) <= index % SOURCES:
            _sources.append(Source())
        return _sources[index % SOURCES]


def end_sources() -> None:
    """Repeating it is fine."""
    with _guard:
        while _sources:
            _sources.pop().close()


def _common(environment: Mapping[str, str]) -> dict[str, str]:
    apart = (*OWN_VARIABLES, *SET_BY_IMPORTS)
    return {name: text for name, text in environment.items() if name not in apart}


# In the source.


@dataclasses.dataclass(frozen=True)
class _Asked:
    call: str
    arguments: list[str]


def _serve(asking: socket.socket) -> _Asked | None:
    """Forks what is asked for until nobody can ask any more (None); returns in each child what it is to do."""
    running: dict[int, tuple[int, socket.socket]] = {}  # by handle: process and who wants to know of its end
    with selectors.DefaultSelector() as selector:
        selector.register(asking, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not asking:
                    selector.unregister(handle := key.fd)
                    pid, status = running.pop(handle)
                    os.close(handle)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with status, contextlib.suppress(OSError):  # Where the tests have gone, nobody asks.
                        status.send(str(code).encode())
                    continue
                request, descriptors, _, _ = socket.recv_fds(asking, _LARGEST_REQUEST, 3)
                if not request:
                    return None
                status = socket.socket(fileno=descriptors[0])
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Of threads: those of OpenBLAS begin anew after a fork.
                    pid = os.fork()
                if not pid:
                    selector.close()
                    for other, (_, wants) in running.items():
                        os.close(other)
                        wants.close()
                    status.close()
                    asking.close()
                    return _become(json.loads(request), *descriptors[1:])
                for descriptor in descriptors[1:]:
                    os.close(descriptor)
                handle = os.pidfd_open(pid)
                running[handle] = pid, status
                selector.register(handle, selectors.EVENT_READ)
                with contextlib.suppress(OSError):
                    socket.send_fds(status, [str(pid).encode()], [handle])


def _become(request: list[Any], stdin: int, stdout: int) -> _Asked:
    """What `subprocess` does between fork and exec."""
    os.setsid()
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.dup2(stdout, 2)
    os.close(stdin)
    os.close(stdout)
    call, arguments, environment = request
    environment = {**{name: os.environ[name] for name in SET_BY_IMPORTS if name in os.environ}, **environment}
    os.environ.clear()
    os.environ.update(environment)
    return _Asked(call, arguments)


def _main(descriptor: int) -> None:
    with socket.socket(fileno=descriptor) as asking:
        for name in LOADED:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # The children's collections leave these pages alone.
        asked = _serve(asking)
    if asked is not None:
        module, _, name = asked.call.partition(":")
        function: Callable[..., None] = getattr(importlib.import_module(module), name)
        function(*asked.arguments)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
