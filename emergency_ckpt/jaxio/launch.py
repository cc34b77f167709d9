"""What a program needs when `emergency-ckpt launch` started it: join the job, and say how far it is.

Without the launcher both functions do nothing, so that the same program also runs alone. Imports jax only when
the job is joined.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
from pathlib import Path

COORDINATOR = "EMERGENCY_CKPT_LAUNCH_COORDINATOR"
PROCESS_ID = "EMERGENCY_CKPT_LAUNCH_PROCESS_ID"
PROCESS_COUNT = "EMERGENCY_CKPT_LAUNCH_PROCESS_COUNT"
SLICE = "EMERGENCY_CKPT_LAUNCH_SLICE"
SLICES = "EMERGENCY_CKPT_LAUNCH_SLICES"
RAMDISK = "EMERGENCY_CKPT_LAUNCH_RAMDISK"
ATTEMPT = "EMERGENCY_CKPT_LAUNCH_ATTEMPT"
PROGRESS = "EMERGENCY_CKPT_LAUNCH_PROGRESS"
JOB = "EMERGENCY_CKPT_LAUNCH_JOB"

VARIABLES = {
    COORDINATOR: "address of JAX's coordination service: 127.0.0.1:PORT, another port at each attempt",
    PROCESS_ID: "index of this process, from 0",
    PROCESS_COUNT: "number of processes of the job",
    SLICE: "index of this process's slice, from 0",
    SLICES: "number of slices",
    RAMDISK: "the ramdisk directory of this process, the same at each attempt",
    ATTEMPT: "0 at first, one more at each restart",
    PROGRESS: "a named pipe: write each finished step to it, as a decimal number and a newline",
    JOB: "id of the job; what the program starts is found, and ended with the job, by this variable (not so "
    "agents: they stay until the job ends)",
}
"""The variables that the launcher sets for every process, and what they mean."""


@dataclasses.dataclass(frozen=True)
class LaunchedProcess:
    """Which process of the job this is."""

    coordinator: str
    process: int
    process_count: int
    slice: int
    slices: int
    ramdisk: Path
    attempt: int


def launched_process() -> LaunchedProcess | None:
    """Which process of the job this is; None when no launcher started it."""
    if COORDINATOR not in os.environ:
        return None
    return LaunchedProcess(
        coordinator=os.environ[COORDINATOR],
        process=int(os.environ[PROCESS_ID]),
        process_count=int(os.environ[PROCESS_COUNT]),
        slice=int(os.environ[SLICE]),
        slices=int(os.environ[SLICES]),
        ramdisk=Path(os.environ[RAMDISK]),
        attempt=int(os.environ[ATTEMPT]),
    )


def initialize_from_launcher(initialization_timeout_seconds: int = 60) -> LaunchedProcess | None:
    """Joins the job: takes the place of `jax.distributed.initialize(...)`. All processes must call it.

    Call it before anything asks jax for devices. The coordination service listens on the loopback interface
    only. Returns None, having done nothing, when no launcher started this process. Raises jax's error when the
    other processes did not come within the time limit.
    """
    launched = launched_process()
    if launched is None:
        return None
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=launched.coordinator,
        num_processes=launched.process_count,
        process_id=launched.process,
        coordinator_bind_address=launched.coordinator,
        initialization_timeout=initialization_timeout_seconds,
    )
    return launched


def report_step(step: int) -> None:
    """Tells the launcher that this process has finished `step`. Costs one small write, and never waits.

    A report that finds the pipe full is dropped: the launcher wants the newest step, and the next report
    brings a newer one. Does nothing when no launcher started this process, or when it is gone.
    """
    path = os.environ.get(PROGRESS)
    pipe = _open_pipe(path) if path else None
    if pipe is None:
        return
    try:
        os.write(pipe, b"%d\n" % step)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EPIPE):
            raise


@functools.lru_cache(maxsize=1)
def _open_pipe(path: str) -> int | None:
    """The write end, opened once per process; None when nobody reads (the launcher is gone)."""
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT):
            return None
        raise
