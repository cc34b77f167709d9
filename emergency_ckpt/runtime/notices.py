"""What this process hears of preemption: by signals, from the agent of its host, or, without one, from sources.

A notice that asks for a save is told to all processes of the job, once; one that a host goes away is passed on
to the agents. Each is one log line.
"""

from __future__ import annotations

import threading

from emergency_ckpt.agent.host_agent import HostAgent
from emergency_ckpt.errors import EmergencyCheckpointError
from emergency_ckpt.preemption.choosing import SourceOptions, choose_sources
from emergency_ckpt.preemption.command_form import shell_in_the_way
from emergency_ckpt.preemption.notice import Notice
from emergency_ckpt.preemption.signals import GRACE_SECONDS, SignalOptions, Signals
from emergency_ckpt.preemption.watch import Watch
from emergency_ckpt.runtime.job_notices import Channel, JobNotice, JobNotices
from emergency_ckpt.telemetry.log import CheckpointLogger

_LOOK_SECONDS = 2.0
_JOB_LOOK_SECONDS = 1.0
# All processes ask process 0: so many of them once a second.
_PROCESSES_PER_SECOND = 1000
_PASS_ON_TRIES = 10
_CLOSE_SECONDS = 60.0


class Notices:
    """The notices of one process, from the start of its manager on. Safe to use from any thread.

    `listen` and `begin` are called once each, in this order, where notices are wanted.
    """

    def __init__(self, channel: Channel, signals: SignalOptions | None) -> None:
        """`channel`: to the other processes. `signals`: which are notices; None: none but those of JAX."""
        self._channel = channel
        self._signal_options = signals
        self._job = JobNotices(channel, GRACE_SECONDS if signals is None else signals.grace_seconds)
        self._guard = threading.Lock()
        self._heard: list[Notice] = []
        self._unlogged: list[str] = []
        self._unpassed: list[JobNotice] = []
        self._log: CheckpointLogger | None = None
        self._host: HostAgent | None = None
        self._stop = threading.Event()
        self._fresh = threading.Event()
        self._signals: Signals | None = None
        self._watch: Watch | None = None
        self._keeper: threading.Thread | None = None
        self._looker: threading.Thread | None = None
        self._is_deaf = False  # to the other processes

    @property
    def heard(self) -> tuple[Notice, ...]:
        """Of this process, oldest first, each once."""
        with self._guard:
            return tuple(self._heard)

    @property
    def of_job(self) -> tuple[JobNotice, ...]:
        """Those of all processes that ask for a save, this one included, as far as they are known here.

        Others' are known a second later, or after `refresh`.
        """
        return self._job.known

    def refresh(self) -> None:
        """Learns what other processes heard until now: at a step that was agreed on, all that led to it.

        A request or two to process 0. What fails is a line in the log.
        """
        try:
            found = self._job.look()
        except EmergencyCheckpointError as error:
            if not self._is_deaf and not self._stop.is_set():
                self._say(f"notices of other processes are not heard for now: {error}")
            self._is_deaf = True
            return
        self._is_deaf = False
        for notice in found:
            who = "some process" if notice.process is None else f"process {notice.process}"
            self._say(f"{who} of the job heard from {notice.notice}")
            self._to_agent(notice)

    def hear(self, notice: Notice) -> None:
        """A notice has come from the agent of this host."""
        self._take(notice)

    def hear_alone(self, notice: Notice) -> None:
        """A notice has come that the agent does not know of."""
        if self._take(notice):
            self._to_agent(JobNotice(self._channel.process_index, notice))

    def listen(self) -> None:
        """Hears signals, and what other processes hear, from now on. Signals in the main thread only."""
        if self._signal_options is not None and self._signal_options.numbers:
            if (line := shell_in_the_way()) is not None:
                self._say(line)
            self._signals = Signals(
                self._signal_options,
                self.hear_alone,
                self._say,
                library_hears=self._channel.service_runs,
            )
        self._looker = threading.Thread(target=self._look, name="emergency_ckpt job notices", daemon=True)
        self._looker.start()

    def begin(self, host: HostAgent | None, alone: SourceOptions | None, log: CheckpointLogger) -> None:
        """From now on lines are logged, and the agent is held.

        Args:
          host: the agent of this host. alone: the sources to watch here where there is none, and a sign that an
            agent is started for notices alone; None: neither.
        """
        with self._guard:
            self._log = log
            self._host = host
            self._write()
        self._fresh.set()
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
        self._fresh.set()
        if self._signals is not None:
            self._signals.close()
        if self._watch is not None:
            self._watch.close()
        for thread in (self._keeper, self._looker):
            if thread is not None:
                thread.join(_CLOSE_SECONDS)

    def _take(self, notice: Notice) -> bool:
        """False for one that is known."""
        with self._guard:
            if self._stop.is_set() or any(notice.key == known.key for known in self._heard):
                return False
            self._heard.append(notice)
        what = self._job.announce(notice) if notice.asks_for_save else "training goes on"
        self._say(f"notice from {notice}; {what}")
        return True

    def _to_agent(self, notice: JobNotice) -> None:
        if notice.notice.kind == "terminate":
            with self._guard:
                self._unpassed.append(notice)
            self._fresh.set()

    # Threads.

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

    def _look(self) -> None:
        """Looks for what other processes heard, and tells the agent."""
        period = max(_JOB_LOOK_SECONDS, self._channel.process_count / _PROCESSES_PER_SECOND)
        failures = 0
        while not self._stop.is_set():
            if self._signals is not None:
                self._signals.look()
            self.refresh()
            self._fresh.clear()
            failures = failures + 1 if self._pass_on(is_last=failures + 1 >= _PASS_ON_TRIES) else 0
            if not self._stop.is_set():
                self._fresh.wait(period)

    def _pass_on(self, is_last: bool) -> bool:
        """Tells the agent of this host what it does not know; whether it could not be told."""
        with self._guard:
            host, waiting = self._host, tuple(self._unpassed)
        if self._log is None:
            return False
        for notice in waiting:
            try:
                if host is not None:
                    host.pass_on(notice.notice, notice.process)
            except EmergencyCheckpointError as error:
                if not is_last:
                    return True
                self._say(f"the agent of this host was not told of a notice: {error}")
            with self._guard:
                self._unpassed.remove(notice)
        return False

    def _say(self, line: str) -> None:
        with self._guard:
            self._unlogged.append(line)
            self._write()

    def _write(self) -> None:
        if self._log is not None:
            for line in self._unlogged:
                self._log.warning("preemption", None, line)
            self._unlogged.clear()
