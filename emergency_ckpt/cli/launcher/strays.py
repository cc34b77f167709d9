"""What the processes of a job started and did not end: found by the variable that every process inherits.

Linux only, where the environment of one's own processes can be read; elsewhere nothing is found. A process is
signalled through a handle taken before its environment was read, so a reused process id is never hit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from emergency_ckpt.errors import EmergencyCheckpointError
from emergency_ckpt.jaxio import launch

_PROC = Path("/proc")
_POLL_SECONDS = 0.02
_KILL_LIMIT_SECONDS = 10


def end_strays(job: str, grace_seconds: float, process: int | None = None) -> None:
    """Ends what is left of a job, or of one process of it: SIGTERM, and SIGKILL when the grace is over.

    With a grace of 0 it is SIGKILL at once. Raises EmergencyCheckpointError when something does not end.
    """
    began = time.monotonic()
    terminated: set[int] = set()
    while True:
        left = set()
        waited = time.monotonic() - began
        for pid, handle in _marked(job, process):
            left.add(pid)
            if waited >= grace_seconds:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            elif pid not in terminated:
                terminated.add(pid)
                signal.pidfd_send_signal(handle, signal.SIGTERM)
        if not left:
            return
        if waited > grace_seconds + _KILL_LIMIT_SECONDS:
            raise EmergencyCheckpointError(
                f"processes {sorted(left)} of this job still run {waited:.0f} s after they were told to end, "
                "SIGKILL included; look at them with `ps -l` (state D waits for a device or a file system)"
            )
        time.sleep(_POLL_SECONDS)


def _marked(job: str, process: int | None) -> Iterator[tuple[int, int]]:
    """(process id, handle) of each living process that the job marked; a handle is valid in its turn only."""
    if not hasattr(signal, "pidfd_send_signal") or not _PROC.is_dir():
        return
    marks = {f"{launch.JOB}={job}".encode()}
    if process is not None:
        marks.add(f"{launch.PROCESS_ID}={process}".encode())
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        # It may end while it is looked at, and the processes of other users cannot be read.
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, PermissionError):
            handle = os.pidfd_open(int(entry.name))
            try:
                # A process that has ended and is not yet reaped has an empty environment.
                if marks <= set((entry / "environ").read_bytes().split(b"\0")):
                    yield int(entry.name), handle
            finally:
                os.close(handle)
