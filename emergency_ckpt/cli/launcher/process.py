"""One process of a job: its environment, its log file, its progress pipe and its process group.

A process leads its own session, so that what it starts is ended with it. A program that makes a session of its
own is found by `strays`; an agent, which is to outlive its process, is not, and ends with the job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from emergency_ckpt.cli.launcher.events import shell_exit_code
from emergency_ckpt.cli.launcher.spec import JobSpec
from emergency_ckpt.jaxio import launch

_CHILD = Path(__file__).with_name("child.py")
_DEVICE_COUNT = re.compile(r"--xla_force_host_platform_device_count=\S+")
_READ_BYTES = 65536


@dataclasses.dataclass(frozen=True)
class ProcessFiles:
    """Where one process of one attempt keeps what."""

    ramdisk: Path
    log: Path
    progress_pipe: Path


class RunningProcess:
    """A process of the job, from its start until it is closed.

    All methods belong to the thread that made it: the kernel ties the life of the process to that thread.
    """

    def __init__(
        self, spec: JobSpec, process: int, attempt: int, files: ProcessFiles, variables: Mapping[str, str]
    ) -> None:
        """Starts it. `variables` is its whole environment."""
        self.process = process
        self.slice = spec.slice_of(process)
        self.log = files.log
        self.step: int | None = None
        self.exit_code: int | None = None
        self._progress = b""
        self._output = b""
        with contextlib.ExitStack() as undo:
            os.mkfifo(files.progress_pipe, 0o600)
            # Opened for reading first, so that opening for writing finds a reader. The write end of our own
            # keeps the pipe from reading as ended when the process has not opened it yet, or opens it anew.
            self.progress_fd = self._opened(undo, files.progress_pipe, os.O_RDONLY)
            self._opened(undo, files.progress_pipe, os.O_WRONLY)
            log = undo.enter_context(files.log.open("wb"))
            self._log_reader = undo.enter_context(files.log.open("rb", buffering=0))
            command = spec.command_of(process, files.ramdisk, attempt)
            # The process writes into its file by itself: it never waits for a terminal or for the launcher.
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_CHILD), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
            log.close()
            self.pid = self._popen.pid
            self.exit_fd = self._exit_handle(undo)
            self._close_files = undo.pop_all().close

    def _exit_handle(self, undo: contextlib.ExitStack) -> int | None:
        """A descriptor that becomes readable when the process ends; None where the system has none."""
        if not hasattr(os, "pidfd_open"):
            return None
        fd = os.pidfd_open(self.pid)
        undo.callback(os.close, fd)
        return fd

    @staticmethod
    def _opened(undo: contextlib.ExitStack, pipe: Path, mode: int) -> int:
        fd = os.open(pipe, mode | os.O_NONBLOCK | os.O_CLOEXEC)
        undo.callback(os.close, fd)
        return fd

    def poll(self) -> bool:
        """Whether it has ended; `exit_code` is set then, and what was left of its process group is gone."""
        if self.exit_code is None:
            returncode = self._popen.poll()
            if returncode is not None:
                self._signal_group(signal.SIGKILL)
                self.exit_code = shell_exit_code(returncode)
        return self.exit_code is not None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to its whole process group, unless it has ended."""
        if not self.poll():
            self._signal_group(number)

    def tell(self, number: int) -> None:
        """Sends a signal to the process and not to what it has started, unless it has ended."""
        if not self.poll():
            self._popen.send_signal(number)

    def _signal_group(self, number: signal.Signals) -> None:
        # PermissionError is how macOS says that only zombies are left in the group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, number)

    def read_progress(self) -> tuple[bool, list[str]]:
        """Takes new reports in: (whether `step` changed, lines that are no steps)."""
        before, wrong = self.step, []
        while chunk := self._read_pipe():
            self._progress += chunk
        *lines, self._progress = self._progress.split(b"\n")
        for line in lines:
            try:
                self.step = int(line)
            except ValueError:
                wrong.append(line.decode(errors="replace"))
        return self.step != before, wrong

    def _read_pipe(self) -> bytes:
        try:
            return os.read(self.progress_fd, _READ_BYTES)
        except BlockingIOError:
            return b""

    def read_output(self) -> list[str]:
        """New whole lines of its output; after its end the last one too, whether it was finished or not."""
        while chunk := self._log_reader.read(_READ_BYTES):
            self._output += chunk
        *lines, self._output = self._output.split(b"\n")
        if self.exit_code is not None and self._output:
            lines.append(self._output)
            self._output = b""
        return [line.decode(errors="replace").rstrip("\r") for line in lines]

    def close(self) -> None:
        """Kills it if it still runs, and gives its files back."""
        self.send(signal.SIGKILL)
        try:
            self._popen.wait(timeout=10)
            self.poll()
        finally:
            self._close_files()


def variables_for(
    spec: JobSpec, process: int, attempt: int, job: str, coordinator: str, files: ProcessFiles
) -> dict[str, str]:
    """The environment of one process: the launcher's own, the job's, and what joins it to the other ones."""
    variables = {**os.environ, **spec.environment}
    other_flags = _DEVICE_COUNT.sub("", variables.get("XLA_FLAGS", "")).split()
    device_count = f"--xla_force_host_platform_device_count={spec.devices_per_process}"
    on_cpu = {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": " ".join([*other_flags, device_count]),
    }
    return (variables if spec.machine_devices else variables | on_cpu) | {
        # Lines of Python programs reach the log when they are printed, not when a buffer is full.
        "PYTHONUNBUFFERED": "1",
        launch.JOB: job,
        launch.COORDINATOR: coordinator,
        launch.PROCESS_ID: str(process),
        launch.PROCESS_COUNT: str(spec.process_count),
        launch.SLICE: str(spec.slice_of(process)),
        launch.SLICES: str(spec.slices),
        launch.RAMDISK: str(files.ramdisk),
        launch.ATTEMPT: str(attempt),
        launch.PROGRESS: str(files.progress_pipe),
    }
