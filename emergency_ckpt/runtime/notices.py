"""What this process hears of preemption: by signals, from the agent of its host, or, without one, from sources.

A notice that asks for a save is told to all processes of the job, once, and is one log line; that a host goes
away is passed on to the agent that does not know of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from emergency_ckpt.agent.host_agent import HostAgent
from emergency_ckpt.core.trouble import Trouble
from emergency_ckpt.errors import EmergencyCheckpointError
from emergency_ckpt.jaxio.preemption import service_runs
from emergency_ckpt.preemption.choosing import SourceOptions, choose_sources
from emergency_ckpt.preemption.command_form import shell_in_the_way
from emergency_ckpt.preemption.notice import Known, Notice
from emergency_ckpt.preemption.signals import SignalOptions, Signals
from emergency_ckpt.preemption.watch import CLOSE_SECONDS as WATCH_CLOSE_SECONDS
from emergency_ckpt.preemption.watch import Watch
from emergency_ckpt.runtime.agreed_steps import LEADER, AgreedSteps, JobNotice
from emergency_ckpt.runtime.jax_signal import JaxSignal
from emergency_ckpt.telemetry.leaving_events import NoticeEvent
from emergency_ckpt.telemetry.log import CheckpointLogger

_HOLD_SECONDS = 2.0
# All processes ask process 0: so many of them once a second, and more often while a step is being agreed on.
_LOOK_SECONDS = 1.0
_SOON_SECONDS = 0.1
_PROCESSES_PER_SECOND = 1000
_PASS_ON_TRIES = 10
_CLOSE_SECONDS = 60.0


class Notices:
    """The notices of one process, from the start of its manager on. Safe to use from any thread.

    `listen` and `begin` are called once each, in this order, where notices are wanted.
    """

    def __init__(self, signals: SignalOptions | None, grace: timedelta) -> None:
        """`signals`: which are notices; None: none but those of JAX. `grace`: from these to the end."""
        self._signal_options = signals
        self._jax = JaxSignal(grace.total_seconds())
        self._guard = threading.Lock()
        self._heard: list[Notice] = []
        self._known = Known()
        self._early: list[Notice] = []
        self._unlogged: list[str] = []
        self._unpassed: list[JobNotice] = []
        self._seen: frozenset[JobNotice] = frozenset()  # of the looking thread
        self._steps: AgreedSteps | None = None
        self._log: CheckpointLogger | None = None
        self._host: HostAgent | None = None
        self._process = 0
        self._stop = threading.Event()
        self._fresh = threading.Event()  # something to look for
        self._untold = threading.Event()  # something to tell the agent
        self._signals: Signals | None = None
        self._watch: Watch | None = None
        self._threads: list[threading.Thread] = []

    @property
    def heard(self) -> tuple[Notice, ...]:
        """Of this process, oldest first, each once."""
        with self._guard:
            return tuple(self._heard)

    def hear(self, notice: Notice) -> None:
        """A notice has come from the agent of this host."""
        self._take(notice)

    def hear_alone(self, notice: Notice) -> None:
        """A notice has come that the agent does not know of."""
        if self._take(notice):
            self._to_agent(JobNotice(self._process, notice))

    def listen(self) -> None:
        """Hears signals from now on; in the main thread only."""
        if self._signal_options is not None and self._signal_options.numbers:
            if (line := shell_in_the_way()) is not None:
                self._say(line)
            self._signals = Signals(
                self._signal_options, self.hear_alone, self._say, library_hears=service_runs()
            )

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
            self._process, self._host = process, host
            self._log, self._steps = log, steps
            early, self._early = self._early, []
            if host is None:
                self._unpassed.clear()
        self._write()
        for notice in early:
            self._tell(steps, log, notice)
        self._run("looking", self._look, steps, log)
        if host is not None:
            self._run("notices", self._keep, host, alone is not None, log)
            self._run("passing on", self._pass_on, host)
        elif alone is not None:
            self._watch = Watch(choose_sources(alone), self.hear)

    def leave(self) -> None:
        """Nobody waits for this process at another step; it hears on. Raises PeerFailedError. Idempotent."""
        if self._steps is not None:
            self._steps.close()

    def close(self, limit: timedelta | None = None) -> None:
        """Hears no more, and nobody waits for this process. Idempotent. `limit`: for the threads, in all."""
        deadline = time.monotonic() + (_CLOSE_SECONDS if limit is None else limit.total_seconds())
        self._stop.set()
        self._fresh.set()
        self._untold.set()
        if self._signals is not None:
            self._signals.close()
        if self._watch is not None:
            self._watch.close(min(WATCH_CLOSE_SECONDS, max(0.0, deadline - time.monotonic())))
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.leave()

    def _take(self, notice: Notice) -> bool:
        """False for one that is known."""
        with self._guard:
            if self._stop.is_set() or not self._known.is_new(notice):
                return False
            steps, log = self._steps, self._log
            if steps is None or log is None:
                self._early.append(notice)
                return True
        self._tell(steps, log, notice)
        return True

    def _tell(self, steps: AgreedSteps, log: CheckpointLogger, notice: Notice) -> None:
        follows = "training goes on"
        if notice.asks_for_save:
            try:
                follows = steps.post(notice, self._process)
            except Exception as error:  # Whoever delivers notices must not end by one.
                follows = f"all processes are told as soon as that can be done: {_said(error)}"
        with self._guard:
            self._heard.append(notice)
        log.emit(
            NoticeEvent(
                step=None,
                source=notice.source,
                kind=notice.kind,
                deadline=notice.deadline,
                said=str(notice),
                follows=follows,
            )
        )
        self._fresh.set()

    def _to_agent(self, notice: JobNotice) -> None:
        if notice.notice.kind == "terminate":
            with self._guard:
                if self._host is not None or self._log is None:  # Before `begin` nobody knows.
                    self._unpassed.append(notice)
            self._untold.set()

    # Threads.

    def _run(self, name: str, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, name=f"emergency_ckpt {name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _keep(self, host: HostAgent, starts: bool, log: CheckpointLogger) -> None:
        """Holds on to the agent: to the next one, where the first was lost."""
        trouble = Trouble()
        while True:
            try:
                host.hold_on(starts=starts)
                trouble.is_over()
            except Exception as error:  # The next agent may do better, whatever it is.
                if trouble.is_new(_said(error)) and not self._stop.is_set():
                    log.warning("preemption", None, f"no notices are heard for now: {_said(error)}")
            if self._stop.wait(_HOLD_SECONDS):
                return

    def _look(self, steps: AgreedSteps, log: CheckpointLogger) -> None:
        """Looks for what other processes heard, and does this one's part of agreeing on a step."""
        share = steps.process_count / _PROCESSES_PER_SECOND
        trouble = Trouble()
        while not self._stop.is_set():
            pause = max(_LOOK_SECONDS, share)
            try:
                if self._look_once(steps, log):
                    pause = max(_SOON_SECONDS, share / 10)
                trouble.is_over()
            except Exception as error:  # The others wait for this process, whatever it is.
                if trouble.is_new(_said(error)) and not self._stop.is_set():
                    log.warning("preemption", None, f"what others hear of is not known for now: {_said(error)}")
            if not self._stop.is_set():
                self._fresh.wait(pause)
            self._fresh.clear()

    def _look_once(self, steps: AgreedSteps, log: CheckpointLogger) -> bool:
        """Whether the next look is to come soon."""
        if self._signals is not None:
            self._signals.look()
        if self._process == LEADER and (signal := self._jax.look()) is not None:
            steps.post(signal, None)
        soon = steps.look()
        if why := steps.take_trouble():
            log.error("preemption", None, why)
        self._note_those_of_others(steps.notices, log)
        return soon

    def _note_those_of_others(self, notices: tuple[JobNotice, ...], log: CheckpointLogger) -> None:
        before, self._seen = self._seen, frozenset(notices)
        for found in notices:
            if found not in before and found.process != self._process:
                who = "some process" if found.process is None else f"process {found.process}"
                log.warning("preemption", None, f"{who} of the job heard from {found.notice}")
                self._to_agent(found)

    def _pass_on(self, host: HostAgent) -> None:
        """Tells the agent of this host what it does not know. Others wait for a look, not for an agent."""
        failures = 0
        while not self._stop.is_set():
            self._untold.wait(_LOOK_SECONDS)
            self._untold.clear()
            failures = failures + 1 if self._pass_all_on(host, is_last=failures + 1 >= _PASS_ON_TRIES) else 0

    def _pass_all_on(self, host: HostAgent, *, is_last: bool) -> bool:
        """Whether it is to be tried again."""
        with self._guard:
            waiting = tuple(self._unpassed)
        for notice in waiting:
            try:
                host.pass_on(notice.notice, notice.process)
            except Exception as error:
                if not is_last:
                    return True
                self._say(f"the agent of this host was not told of a notice: {_said(error)}")
            with self._guard:
                self._unpassed.remove(notice)
        return False

    def _say(self, line: str) -> None:
        with self._guard:
            self._unlogged.append(line)
        self._write()

    def _write(self) -> None:
        """Without the lock: whoever gets lines of the log may ask what was heard."""
        with self._guard:
            if (log := self._log) is None:
                return
            lines, self._unlogged = self._unlogged, []
        for line in lines:
            log.warning("preemption", None, line)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, EmergencyCheckpointError) else f"{type(error).__name__}: {error}"
