"""What this process hears of preemption: from the agent of its host, or, without one, from the sources.

A notice that asks for a save is told to all processes of the job, once; each is one log line. The thread that
holds the agent looks for what other processes tell.
"""

from __future__ import annotations

import threading
import time

from emergency_ckpt.agent.host_agent import HostAgent
from emergency_ckpt.errors import EmergencyCheckpointError
from emergency_ckpt.jaxio.preemption import signalled
from emergency_ckpt.preemption.choosing import SourceOptions, choose_sources
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.preemption.watch import Watch
from emergency_ckpt.runtime.agreed_steps import LEADER, AgreedSteps
from emergency_ckpt.telemetry.leaving_events import NoticeEvent
from emergency_ckpt.telemetry.log import CheckpointLogger

_LOOK_SECONDS = 1.0
_SOON_SECONDS = 0.1
_HOLD_SECONDS = 2.0
_CLOSE_SECONDS = 60.0


class Notices:
    """The notices of one process, from the start of its manager on. Safe to use from any thread."""

    def __init__(self) -> None:
        self._steps: AgreedSteps | None = None
        self._process = 0
        self._early: list[Notice] = []
        self._signalled = False
        self._guard = threading.Lock()
        self._heard: list[Notice] = []
        self._keys: set[tuple[str, str, float | None, str]] = set()
        self._log: CheckpointLogger | None = None
        self._stop = threading.Event()
        self._watch: Watch | None = None
        self._keeper: threading.Thread | None = None

    @property
    def heard(self) -> tuple[Notice, ...]:
        """Oldest first, each once."""
        with self._guard:
            return tuple(self._heard)

    def hear(self, notice: Notice) -> None:
        """A notice has come."""
        with self._guard:
            if self._stop.is_set() or notice.key in self._keys:
                return
            self._keys.add(notice.key)
            if self._steps is None:
                self._early.append(notice)
                return
        self._tell(self._steps, notice)

    def begin(
        self,
        steps: AgreedSteps,
        process: int,
        host: HostAgent | None,
        alone: SourceOptions | None,
        log: CheckpointLogger,
    ) -> None:
        """From now on all processes are told, lines are logged, and the agent is held.

        Args:
          steps: where all agree on the step to react at. process: the index of this one.
          host: the agent of this host. alone: the sources to watch here where there is none, and a sign that an
            agent is started for notices alone; None: neither.
        """
        with self._guard:
            self._log, self._steps, self._process = log, steps, process
            early, self._early = self._early, []
        for notice in early:
            self._tell(steps, notice)
        self._keeper = threading.Thread(
            target=self._keep,
            args=(steps, host, alone is not None, log),
            name="emergency_ckpt notices",
            daemon=True,
        )
        self._keeper.start()
        if host is None and alone is not None:
            self._watch = Watch(choose_sources(alone), self.hear)

    def close(self) -> None:
        """Hears no more. Idempotent."""
        self._stop.set()
        if self._watch is not None:
            self._watch.close()
        if self._keeper is not None:
            self._keeper.join(_CLOSE_SECONDS)
        if self._steps is not None:
            self._steps.close()

    def _tell(self, steps: AgreedSteps, notice: Notice) -> None:
        what = "training goes on"
        if notice.asks_for_save:
            try:
                what = steps.post(notice, self._process)
            except EmergencyCheckpointError as error:
                what = f"no step is agreed on: {error}"
        with self._guard:
            self._heard.append(notice)
        assert self._log is not None
        self._log.emit(
            NoticeEvent(
                step=None,
                source=notice.source,
                kind=notice.kind,
                deadline=notice.deadline,
                said=str(notice),
                follows=what,
            )
        )

    def _keep(self, steps: AgreedSteps, host: HostAgent | None, starts: bool, log: CheckpointLogger) -> None:
        """Looks at what all tell, and holds on to the agent: to the next one, where the first was lost."""
        said = unread = ""
        held = 0.0
        while True:
            pause = _LOOK_SECONDS
            try:
                if self._process == LEADER and not self._signalled and signalled():
                    self._signalled = True
                    steps.post(Notice("signal", "terminate", time.time(), None, "SIGTERM"), None)
                pause = _SOON_SECONDS if steps.look() else _LOOK_SECONDS
                unread = ""
                if trouble := steps.take_trouble():
                    log.error("preemption", None, trouble)
            except EmergencyCheckpointError as error:
                if str(error) != unread and not self._stop.is_set():
                    log.warning("preemption", None, f"what others hear of is not known for now: {error}")
                unread = str(error)
            if host is not None and time.monotonic() >= held + _HOLD_SECONDS:
                held = time.monotonic()
                said = self._hold(host, starts, said, log)
            if self._stop.wait(pause):
                return

    def _hold(self, host: HostAgent, starts: bool, said: str, log: CheckpointLogger) -> str:
        """Holds on to the agent; returns the trouble with it that has been logged."""
        try:
            host.hold_on(starts=starts)
            return ""
        except EmergencyCheckpointError as error:
            if str(error) != said and not self._stop.is_set():
                log.warning("preemption", None, f"no notices are heard for now: {error}")
            return str(error)
