"""How far this process is in its training, and a thread that tells the agent of this host every two seconds.

Noting a step costs well under a microsecond. No step is expected while something is saved, restored or
closed, and none of a manager of which nothing tells that it trains: one that evaluates, or that nobody uses.
"""

from __future__ import annotations

import collections
import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from emergency_ckpt.agent.host_agent import HostAgent
from emergency_ckpt.agent.progress import Progress
from emergency_ckpt.core.stalls import StallLimits
from emergency_ckpt.core.trouble import Trouble
from emergency_ckpt.errors import EmergencyCheckpointError
from emergency_ckpt.telemetry.log import CheckpointLogger

TELL_SECONDS = 2.0
_CLOSE_SECONDS = 60.0
_MOST_RECENT = 50


class TrainingProgress:
    """Of one process: the step that was asked about last, and how long recent ones took.

    `note` and `paused` are for the thread that trains, `said` is for any.
    """

    def __init__(
        self, limits: StallLimits, *, last_call: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`last_call`: whether agents drain without this process when its host goes away."""
        self._clock = clock
        self._limits = limits
        self._last_call = last_call
        self._recent: collections.deque[float] = collections.deque(maxlen=_MOST_RECENT)
        self._step: int | None = None
        self._since = self._clock()
        self._pauses = 0
        self._counts = False  # whether the step that is running began with a note
        self._ended = False
        self._trains = False

    def note(self, step: int) -> None:
        """This step was asked about; a second time says nothing."""
        if step == self._step:
            return
        now = self._clock()
        if self._counts:
            self._recent.append(now - self._since)
        self._step, self._since, self._counts, self._ended = step, now, True, False
        self._trains = True

    @property
    def matters(self) -> bool:
        """Whether the agent makes anything of it."""
        return self._last_call or self._limits.floor_seconds > 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While something takes its time that is no step; it is not counted as part of one."""
        began = self._clock()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                # A step that was noted meanwhile begins now.
                now = self._clock()
                self._since = min(now, self._since + now - began)

    def begin_anew(self) -> None:
        """What is there is another step, and its program is another one, maybe: the next step is a first one.

        It is expected of a manager that has noted a step before, and not after the last one: to restore is what
        programs do as well that only evaluate.
        """
        self._recent.clear()
        self._step, self._since, self._counts = None, self._clock(), False

    def expect(self) -> None:
        """Training begins: a first step is to come."""
        self.begin_anew()
        self._trains, self._ended = True, False

    def end(self) -> None:
        """The last step is over; another one may begin all the same, once it is noted."""
        self._ended = True

    def said(self) -> Progress:
        """What the agent is told."""
        step, since = self._step, self._since
        recent = list(self._recent)
        return Progress(
            step,
            "training" if self._trains and not self._pauses and not self._ended else "paused",
            max(0.0, self._clock() - since),
            statistics.median(recent) if recent else None,
            os.getpid(),
            os.stat("/proc/self/ns/pid").st_ino,
            self._limits,
            self._last_call,
        )


class ProgressTeller:
    """Tells the agent, from `begin` to `close`; one that is not there is not started for it."""

    def __init__(self, progress: TrainingProgress) -> None:
        self._progress = progress
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, host: HostAgent | None, log: CheckpointLogger) -> None:
        """`host`: the agent of this host; None: nobody is told."""
        if host is not None and self._thread is None and self._progress.matters:
            self._thread = threading.Thread(
                target=self._tell, args=(host, log), name="emergency_ckpt progress", daemon=True
            )
            self._thread.start()

    def close(self, limit: timedelta | None = None) -> None:
        """Tells nothing more. Idempotent. `limit`: for the thread that is still telling."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS if limit is None else min(limit.total_seconds(), _CLOSE_SECONDS))

    def _tell(self, host: HostAgent, log: CheckpointLogger) -> None:
        trouble = Trouble()
        while not self._stop.is_set():
            try:
                host.tell_progress(self._progress.said())
                trouble.is_over()
            except (EmergencyCheckpointError, OSError) as error:
                if trouble.is_new(str(error)) and not self._stop.is_set():
                    log.info(
                        "progress", None, f"the agent does not know for now how far this process is: {error}"
                    )
            self._stop.wait(TELL_SECONDS)
