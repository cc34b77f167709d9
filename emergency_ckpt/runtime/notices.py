"""What this process hears of preemption: from the agent of its host, or, without one, from the sources.

A notice that asks for a save is told to all processes of the job, once; each is one log line.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from emergency_ckpt.agent.host_agent import HostAgent
from emergency_ckpt.errors import EmergencyCheckpointError
from emergency_ckpt.preemption.choosing import SourceOptions, choose_sources
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.preemption.watch import Watch
from emergency_ckpt.telemetry.log import CheckpointLogger

_LOOK_SECONDS = 2.0
_CLOSE_SECONDS = 60.0


class Notices:
    """The notices of one process, from the start of its manager on. Safe to use from any thread.

    `announce` tells all processes of a notice, and returns what comes of it.
    """

    def __init__(self, announce: Callable[[], str]) -> None:
        self._announce = announce
        self._guard = threading.Lock()
        self._heard: list[Notice] = []
        self._unlogged: list[str] = []
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
            if self._stop.is_set() or any(notice.key == known.key for known in self._heard):
                return
            self._heard.append(notice)
        what = self._announce() if notice.asks_for_save else "training goes on"
        with self._guard:
            self._unlogged.append(f"notice from {notice}; {what}")
            self._write()

    def begin(self, host: HostAgent | None, alone: SourceOptions | None, log: CheckpointLogger) -> None:
        """From now on lines are logged, and the agent is held.

        Args:
          host: the agent of this host. alone: the sources to watch here where there is none, and a sign that an
            agent is started for notices alone; None: neither.
        """
        with self._guard:
            self._log = log
            self._write()
        if host is not None:
            self._keeper = threading.Thread(
                target=self._keep,
                args=(host, alone is not None, log),
                name="emergency_ckpt notices",
                daemon=True,
            )
            self._keeper.start()
        elif alone is not None:
            self._watch = Watch(choose_sources(alone), self.hear)

    def close(self) -> None:
        """Hears no more. Idempotent."""
        self._stop.set()
        if self._watch is not None:
            self._watch.close()
        if self._keeper is not None:
            self._keeper.join(_CLOSE_SECONDS)

    def _keep(self, host: HostAgent, starts: bool, log: CheckpointLogger) -> None:
        """Holds on to the agent: to the next one, where the first was lost."""
        said = ""
        while True:
            try:
                host.hold_on(starts=starts)
                said = ""
            except EmergencyCheckpointError as error:
                if str(error) != said and not self._stop.is_set():
                    log.warning("preemption", None, f"no notices are heard for now: {error}")
                said = str(error)
            if self._stop.wait(_LOOK_SECONDS):
                return

    def _write(self) -> None:
        if self._log is not None:
            for line in self._unlogged:
                self._log.warning("preemption", None, line)
            self._unlogged.clear()
