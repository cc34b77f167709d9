"""Runs a job: starts all processes, watches them, injects failures, ends all when one fails, starts all again.

Whatever happens (an exception, a signal, the time limit), no process of the job is left when `run_job` returns;
when the launcher itself is killed, the kernel kills them (Linux).
"""

from __future__ import annotations

import collections
import contextlib
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from emergency_ckpt.agent.ending import end_agent, wait_until_idle
from emergency_ckpt.cli.launcher import events
from emergency_ckpt.cli.launcher.process import ProcessFiles, RunningProcess, variables_for
from emergency_ckpt.cli.launcher.ramdisk import remove_tree, temporary_ramdisk
from emergency_ckpt.cli.launcher.spec import JobSpec, KillSpec
from emergency_ckpt.cli.launcher.strays import end_strays
from emergency_ckpt.errors import EmergencyCheckpointError

OnEvent = Callable[[events.JobEvent], None]
OnOutput = Callable[[int, str], None]

# How late output, a signal to the launcher, or a step that no kill waits for may be noticed.
_TICK_SECONDS = 0.05
_KILL_LIMIT_SECONDS = 10
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Ends a job from outside: from another thread or a signal handler. A second request ends it at once.

    `to_pass_on`: signals that the processes are to get; what comes between two attempts goes to the next.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.hurry = False
        self.to_pass_on: collections.deque[int] = collections.deque()

    def request(self, exit_code: int = 128 + signal.SIGTERM) -> None:
        """Asks for the end; `exit_code` becomes the job's. Takes no lock, so it is safe in a signal handler."""
        if self.exit_code is None:
            self.exit_code = exit_code
        else:
            self.hurry = True


def run_job(
    spec: JobSpec,
    on_event: OnEvent | None = None,
    on_output: OnOutput | None = None,
    stop: StopRequest | None = None,
) -> events.JobResult:
    """Runs the job to its end and returns what became of it; blocks until then.

    `on_event` gets each event and `on_output` each line of output with its process, both in the calling thread
    between two looks at the job, so they should return soon. When this is the main thread, SIGTERM, SIGINT and
    SIGHUP end the job while it runs. An exception in a callback ends the job and is raised. Raises OSError
    when a directory cannot be made, EmergencyCheckpointError when a process cannot be ended.
    """
    stop = stop or StopRequest()
    with _stopped_by_signals(stop), contextlib.ExitStack() as cleanup:
        return _Job(spec, on_event, on_output, stop, cleanup).run()


class _Job:
    """The state of one call of `run_job`."""

    def __init__(
        self,
        spec: JobSpec,
        on_event: OnEvent | None,
        on_output: OnOutput | None,
        stop: StopRequest,
        cleanup: contextlib.ExitStack,
    ) -> None:
        self._spec, self._on_event, self._on_output, self._stop = spec, on_event, on_output, stop
        self._began = time.monotonic()
        self._id = uuid.uuid4().hex
        self._attempt = 0
        self._kills_left = list(spec.kills)
        self._log_dir = spec.log_dir or Path(tempfile.mkdtemp(prefix="emergency-ckpt-launch-"))
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._pipes = Path(tempfile.mkdtemp(prefix="emergency-ckpt-pipes-"))
        cleanup.callback(shutil.rmtree, self._pipes)
        self._ramdisk_root = spec.ramdisk_root or cleanup.enter_context(temporary_ramdisk())
        # Last in, first out: everything has ended before the directories go.
        cleanup.callback(self._end_strays)
        cleanup.callback(self._end_agents)

        # Of the attempt that runs:
        self._running: list[RunningProcess] = []
        self._ended: list[events.ProcessEnded] = []
        self._injected: dict[int, KillSpec] = {}
        self._ending = False

    # -- the whole job

    def run(self) -> events.JobResult:
        attempts = [self._run_attempt()]
        short_lives = 0
        while attempts[-1].exit_code != 0 and self._attempt < self._spec.restarts and self._over() is None:
            last = attempts[-1]
            if not self._spec.restarts_after(last.exit_code):
                self._emit(events.NotRestarting(exit_code=last.exit_code, **self._when()))
                break
            lived = last.ended_seconds - last.began_seconds
            short_lives = 1 if lived > self._spec.max_restart_delay_seconds else short_lives + 1
            self._attempt += 1
            delay = self._spec.restart_delay(short_lives)
            self._emit(
                events.Restarting(
                    reason=last.failure,
                    delay_seconds=delay,
                    restarts_left=self._spec.restarts - self._attempt,
                    **self._when(),
                )
            )
            if not self._pause(delay):
                break
            attempts.append(self._run_attempt())
        over = self._over()
        exit_code = over[0] if over and attempts[-1].exit_code != 0 else attempts[-1].exit_code
        self._emit(events.Finished(exit_code=exit_code, **self._when()))
        return events.JobResult(
            exit_code=exit_code,
            seconds=self._seconds(),
            attempts=tuple(attempts),
            kills_left=tuple(self._kills_left),
            log_dir=self._log_dir,
        )

    def _over(self) -> tuple[int, str] | None:
        """The exit code and the reason, when the job must end whatever its processes do."""
        limit = self._spec.time_limit_seconds
        if self._stop.exit_code is not None:
            return self._stop.exit_code, "the launcher was told to stop"
        if limit is not None and self._seconds() >= limit:
            return events.EXIT_TIME_LIMIT, f"the time limit of {limit:g} s is over"
        return None

    def _pause(self, seconds: float) -> bool:
        """Waits; False when the job is over before the time is."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and self._over() is None:
            time.sleep(min(left, _TICK_SECONDS))
        return self._over() is None

    def _end_strays(self) -> None:
        end_strays(self._id, 0 if self._stop.hurry else self._spec.grace_seconds)

    def _end_agents(self) -> None:
        """They outlive attempts, and may finish what the last one left within the grace."""
        roots = [self._ramdisk_of(process) for process in range(self._spec.process_count)]
        grace = 0 if self._stop.hurry else self._spec.grace_seconds
        wait_until_idle(roots, grace, lambda: self._stop.hurry)
        for root in roots:
            end_agent(root, 0 if self._stop.hurry else grace)

    # -- one attempt

    def _run_attempt(self) -> events.AttemptResult:
        began = self._seconds()
        self._running, self._ended, self._injected, self._ending = [], [], {}, False
        with contextlib.ExitStack() as cleanup, _reserved_address() as coordinator:
            for process in range(self._spec.process_count):
                self._running.append(self._start(process, coordinator, cleanup))
            failure = self._watch()
            if failure is not None:
                self._end_all(failure[1])
        if self._spec.wipe_ramdisk and self._injected:
            self._wipe(sorted(self._injected))
        exit_code, reason = failure or (0, "")
        return events.AttemptResult(
            attempt=self._attempt,
            began_seconds=began,
            ended_seconds=self._seconds(),
            ended=tuple(self._ended),
            failure=reason,
            exit_code=exit_code,
        )

    def _start(self, process: int, coordinator: str, cleanup: contextlib.ExitStack) -> RunningProcess:
        files = ProcessFiles(
            ramdisk=self._ramdisk_of(process),
            log=self._log_dir / f"process_{process}.attempt_{self._attempt}.log",
            progress_pipe=self._pipes / f"process_{process}.attempt_{self._attempt}",
        )
        files.ramdisk.mkdir(parents=True, exist_ok=True)
        variables = variables_for(self._spec, process, self._attempt, self._id, coordinator, files)
        started = RunningProcess(self._spec, process, self._attempt, files, variables)
        cleanup.callback(started.close)
        self._emit(
            events.ProcessStarted(
                process=process, slice=started.slice, pid=started.pid, log=started.log, **self._when()
            )
        )
        return started

    def _watch(self) -> tuple[int, str] | None:
        """Returns None when all processes ended well; else the exit code and what went wrong, at once."""
        while len(self._ended) < len(self._running):
            self._wait()
            self._look()
            while self._stop.to_pass_on:
                self._pass_on(self._stop.to_pass_on.popleft())
            failed = next((ended for ended in self._ended if ended.exit_code != 0), None)
            if failed is not None:
                return failed.exit_code, self._describe_failure(failed)
            if over := self._over():
                return over
            self._inject_kills()
        return None

    def _end_all(self, reason: str) -> None:
        """Ends what still runs: SIGTERM, and SIGKILL after the grace."""
        self._ending = True
        if len(self._ended) == len(self._running):
            return
        self._emit(events.Stopping(reason=reason, **self._when()))
        began, hard = time.monotonic(), False
        self._send_to_all(signal.SIGTERM)
        while len(self._ended) < len(self._running):
            self._wait()
            self._look()
            waited = time.monotonic() - began
            if not hard and (waited >= self._spec.grace_seconds or self._stop.hurry):
                hard, began, waited = True, time.monotonic(), 0
                self._send_to_all(signal.SIGKILL)
            if hard and waited > _KILL_LIMIT_SECONDS:
                left = [process.pid for process in self._running if process.exit_code is None]
                raise EmergencyCheckpointError(
                    f"processes {left} did not end within {_KILL_LIMIT_SECONDS} s of SIGKILL; look at them "
                    "with `ps -l` (state D waits for a device or a file system)"
                )

    def _send_to_all(self, number: signal.Signals) -> None:
        for process in self._running:
            process.send(number)

    def _pass_on(self, number: int) -> None:
        """To the processes themselves: what they have started does not know of it."""
        for process in self._running:
            process.tell(number)

    def _wait(self) -> None:
        """Sleeps until a process ends, or reports a step that a kill may wait for, or for one tick."""
        poller = select.poll()
        for process in self._running:
            if process.exit_code is None:
                if process.exit_fd is not None:
                    poller.register(process.exit_fd, select.POLLIN)
                if self._kills_left:
                    poller.register(process.progress_fd, select.POLLIN)
        poller.poll(_TICK_SECONDS * 1000)

    def _look(self) -> None:
        """Takes in what happened since the last look: reports, output, ends, in this order for each process."""
        noted = {ended.process for ended in self._ended}
        for process in self._running:
            # Not by its exit code: sending it a signal may have found out already that it has ended.
            if process.process in noted:
                continue
            has_ended = process.poll()
            changed, wrong_reports = process.read_progress()
            if changed and process.step is not None:
                self._emit(events.StepReported(process=process.process, step=process.step, **self._when()))
            if self._on_output is not None:
                for line in process.read_output():
                    self._on_output(process.process, line)
                for report in wrong_reports:
                    self._on_output(process.process, f"(reported {report!r}, which is no step)")
            if has_ended:
                self._note_end(process)

    def _note_end(self, process: RunningProcess) -> None:
        assert process.exit_code is not None
        injected = process.process in self._injected
        ended = events.ProcessEnded(
            process=process.process,
            slice=process.slice,
            exit_code=process.exit_code,
            cause="injected" if injected else "ended" if self._ending else "own",
            step=process.step,
            **self._when(),
        )
        self._ended.append(ended)
        self._emit(ended)

    def _describe_failure(self, ended: events.ProcessEnded) -> str:
        """Why the attempt failed, from the first process that did."""
        step = "before its first step" if ended.step is None else f"after step {ended.step}"
        kill = self._injected.get(ended.process)
        if kill is not None:
            killed = [process for process, of in sorted(self._injected.items()) if of is kill]
            return f"{list_processes(killed)} killed as asked for ({kill}), {step}"
        how = describe_exit(ended.exit_code)
        return f"process {ended.process} (slice {ended.slice}) ended with {how} {step}"

    # -- failures on demand

    def _inject_kills(self) -> None:
        for kill in list(self._kills_left):
            targets = [self._running[k] for k in kill.processes(self._spec.processes_per_slice)]
            if all(p.exit_code is None and p.step is not None and p.step >= kill.step for p in targets):
                self._kills_left.remove(kill)
                self._kill(kill, targets)

    def _kill(self, kill: KillSpec, targets: Sequence[RunningProcess]) -> None:
        """All at one moment, then what they started in sessions of its own: the host is gone."""
        processes = tuple(process.process for process in targets)
        self._injected.update(dict.fromkeys(processes, kill))
        for process in targets:
            process.send(signal.SIGKILL)
        self._emit(events.Killed(kill=kill, processes=processes, **self._when()))
        for process in processes:
            end_strays(self._id, 0, process)
            if self._spec.wipe_ramdisk:
                end_agent(self._ramdisk_of(process), 0)

    def _wipe(self, processes: Sequence[int]) -> None:
        for process in processes:
            remove_tree(self._ramdisk_of(process))
        self._emit(events.RamdiskWiped(processes=tuple(processes), **self._when()))

    # -- small things

    def _ramdisk_of(self, process: int) -> Path:
        return self._ramdisk_root / f"process_{process}"

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _when(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "attempt": self._attempt}

    def _emit(self, event: events.JobEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)


def describe_exit(exit_code: int) -> str:
    """`137` → `'SIGKILL'`, `7` → `'exit code 7'`."""
    with contextlib.suppress(ValueError):
        return signal.Signals(exit_code - 128).name
    return f"exit code {exit_code}"


def list_processes(processes: Sequence[int]) -> str:
    """`(2, 3)` → `'processes 2, 3'`."""
    return f"process{'es' * (len(processes) > 1)} {', '.join(map(str, processes))}"


@contextlib.contextmanager
def _reserved_address() -> Iterator[str]:
    """A loopback address that nobody else gets while it is held, and that a gRPC server can listen on.

    The socket is bound and does not listen; with SO_REUSEPORT, which gRPC sets too, both may hold the port.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@contextlib.contextmanager
def _stopped_by_signals(stop: StopRequest) -> Iterator[None]:
    """Lets signals request the stop, in the main thread; signals that were ignored stay ignored (nohup)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if number in _PASSED_ON:
            stop.to_pass_on.append(number)
        else:
            stop.request(128 + number)

    previous = {}
    try:
        for number in (*_STOP_SIGNALS, *_PASSED_ON):
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handle)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
