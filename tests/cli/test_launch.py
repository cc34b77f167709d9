"""Real processes are started, killed, restarted and ended, and none is ever left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from emergency_ckpt.agent.starting import LAUNCH_MARKS
from emergency_ckpt.cli.launch import JobResult, JobSpec, KillSpec, StopRequest, run_job
from emergency_ckpt.cli.launcher import events
from emergency_ckpt.cli.launcher.spec import parse_exit_codes
from emergency_ckpt.jaxio import launch

PROGRAM = str(Path(__file__).with_name("launched_program.py"))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Where the launched program leaves its notes, one file for each process and attempt."""
    path = tmp_path / "notes"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    assert psutil.Process().children(recursive=True) == []


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs: an orphan that has ended stays listed until the system's first process waits for it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Job:
    """A job of the test program, run to its end, with everything that was said about it."""

    def __init__(
        self,
        tmp_path: Path,
        *actions: str,
        stop: StopRequest | None = None,
        before: Callable[[events.JobEvent], None] | None = None,
        **changes: Any,
    ) -> None:
        options = {"slices": 2, "processes_per_slice": 2, "log_dir": tmp_path / "logs"} | changes
        self.spec = JobSpec(command=(sys.executable, PROGRAM, *actions), **options)
        self.events: list[events.JobEvent] = []
        self.output: list[tuple[int, str]] = []

        def note(event: events.JobEvent) -> None:
            self.events.append(event)
            if before is not None:
                before(event)

        self.result: JobResult = run_job(
            self.spec, note, lambda process, line: self.output.append((process, line)), stop
        )

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def ends(self, attempt: int) -> dict[int, tuple[int, str]]:
        """Process → (exit code, cause) of one attempt."""
        return {end.process: (end.exit_code, end.cause) for end in self.result.attempts[attempt].ended}


def test_a_job_whose_processes_end_well_ends_well_after_one_attempt(tmp_path: Path) -> None:
    job = Job(tmp_path, "report=1", "report=2")
    assert job.result.exit_code == 0
    assert [attempt.failure for attempt in job.result.attempts] == [""]
    assert job.ends(0) == dict.fromkeys(range(4), (0, "own"))
    assert {end.step for end in job.result.attempts[0].ended} == {2}
    assert [(start.process, start.slice) for start in job.of(events.ProcessStarted)] == [
        (0, 0),
        (1, 0),
        (2, 1),
        (3, 1),
    ]


def test_each_process_is_told_who_it_is_and_has_its_own_ramdisk(tmp_path: Path, notes: Path) -> None:
    os.environ["XLA_FLAGS"], before = (
        "--xla_x=1 --xla_force_host_platform_device_count=8",
        os.environ["XLA_FLAGS"],
    )
    try:
        job = Job(
            tmp_path,
            f"env={notes}",
            ramdisk_root=tmp_path / "r",
            devices_per_process=3,
            environment={"MORE": "1"},
        )
    finally:
        os.environ["XLA_FLAGS"] = before
    assert job.result.exit_code == 0
    found = [json.loads((notes / f"{k}.0").read_text()) for k in range(4)]
    for k, variables in enumerate(found):
        expected = {
            launch.PROCESS_ID: str(k),
            launch.PROCESS_COUNT: "4",
            launch.SLICE: str(k // 2),
            launch.SLICES: "2",
            launch.ATTEMPT: "0",
            launch.RAMDISK: str(tmp_path / "r" / f"process_{k}"),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_x=1 --xla_force_host_platform_device_count=3",
            "MORE": "1",
        }
        assert {name: variables[name] for name in expected} == expected
        assert set(launch.VARIABLES) <= set(variables)
    assert len({variables[launch.COORDINATOR] for variables in found}) == 1
    assert found[0][launch.COORDINATOR].startswith("127.0.0.1:")


def test_a_killed_slice_loses_its_ramdisk_and_the_job_starts_again(tmp_path: Path, notes: Path) -> None:
    job = Job(
        tmp_path,
        f"list={notes}",
        "touch=kept",
        f"barrier={notes}",
        "report=3",
        "@0:wait",
        restarts=1,
        kills=(KillSpec.parse("slice=1@step=3"),),
        wipe_ramdisk=True,
    )
    assert job.result.exit_code == 0
    killed = 128 + signal.SIGKILL
    assert job.ends(0)[2] == job.ends(0)[3] == (killed, "injected")
    assert job.ends(0)[0] == job.ends(0)[1] == (128 + signal.SIGTERM, "ended")
    assert job.result.attempts[0].exit_code == killed
    assert job.result.attempts[0].failure == "processes 2, 3 killed as asked for (slice=1@step=3), after step 3"
    assert job.ends(1) == dict.fromkeys(range(4), (0, "own"))
    assert [event.processes for event in job.of(events.RamdiskWiped)] == [(2, 3)]
    assert {k: (notes / f"{k}.1").read_text() for k in range(4)} == {0: "kept", 1: "kept", 2: "", 3: ""}


def test_without_wiping_a_killed_process_finds_its_ramdisk_as_it_was(tmp_path: Path, notes: Path) -> None:
    job = Job(
        tmp_path,
        "touch=kept",
        f"barrier={notes}",
        "report=3",
        "@0:wait",
        f"list={notes}",
        restarts=1,
        kills=(KillSpec.parse("process=1,2@step=3"),),
    )
    assert job.result.exit_code == 0
    assert [event.processes for event in job.of(events.Killed)] == [(1, 2)]
    assert {(notes / f"{k}.1").read_text() for k in range(4)} == {"kept"}


def test_a_kill_waits_until_each_of_its_processes_reported_the_step(tmp_path: Path, notes: Path) -> None:
    # Process 3 reports the step only after all others are past it by a barrier.
    job = Job(
        tmp_path,
        "0:report=9",
        "1:report=9",
        "2:report=9",
        f"barrier={notes}",
        "3:report=4",
        "3:report=5",
        "wait",
        kills=(KillSpec.parse("slice=1@step=5"),),
    )
    assert job.result.exit_code == 137
    steps = {event.process: event.step for event in job.of(events.StepReported)}
    assert steps == {0: 9, 1: 9, 2: 9, 3: 5}
    names = [type(event).__name__ for event in job.events]
    assert names.count("Killed") == 1
    assert max(i for i, name in enumerate(names) if name == "StepReported") < names.index("Killed")


def test_several_kills_happen_once_each_over_the_attempts(tmp_path: Path) -> None:
    kills = (KillSpec.parse("slice=0@step=3"), KillSpec.parse("slice=1@step=2"))
    job = Job(tmp_path, "report=2", "@0:wait", "report=3", "@1:wait", restarts=3, kills=kills)
    assert job.result.exit_code == 0
    assert [(event.attempt, event.kill) for event in job.of(events.Killed)] == [(0, kills[1]), (1, kills[0])]
    assert job.result.kills_left == ()


def test_a_kill_that_never_came_to_pass_is_told(tmp_path: Path) -> None:
    kill = KillSpec.parse("process=0@step=5")
    job = Job(tmp_path, "report=4", kills=(kill,))
    assert (job.result.exit_code, job.result.kills_left) == (0, (kill,))


def test_a_failing_process_ends_all_others_and_its_exit_code_is_the_jobs(tmp_path: Path) -> None:
    job = Job(tmp_path, "report=8", "2:exit=7", "wait", restarts=2)
    assert job.result.exit_code == 7
    assert len(job.result.attempts) == 3
    for attempt in range(3):
        assert job.ends(attempt)[2] == (7, "own")
        assert job.ends(attempt)[0] == (128 + signal.SIGTERM, "ended")
        assert job.result.attempts[attempt].failure == "process 2 (slice 1) ended with exit code 7 after step 8"
    assert [event.restarts_left for event in job.of(events.Restarting)] == [1, 0]


def test_restarts_end_with_the_first_attempt_that_goes_well(tmp_path: Path, notes: Path) -> None:
    job = Job(tmp_path, f"env={notes}", "1@0:exit=1", "3@1:exit=1", restarts=9)
    assert job.result.exit_code == 0
    assert [attempt.exit_code for attempt in job.result.attempts] == [1, 1, 0]
    last = json.loads((notes / "0.2").read_text())
    assert last[launch.ATTEMPT] == "2"


def test_a_process_that_ended_well_is_not_a_failure_while_others_go_on(tmp_path: Path) -> None:
    ended = tmp_path / "process 0 ended"

    def on_event(event: events.JobEvent) -> None:
        if isinstance(event, events.ProcessEnded) and event.process == 0:
            ended.touch()

    command = (sys.executable, PROGRAM, "0:exit=0", f"until={ended}")
    spec = JobSpec(command=command, slices=2, processes_per_slice=1, log_dir=tmp_path / "logs")
    result = run_job(spec, on_event)
    assert [(end.process, end.exit_code) for end in result.attempts[0].ended] == [(0, 0), (1, 0)]
    assert result.exit_code == 0


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path, notes: Path) -> None:
    job = Job(tmp_path, "0:ignore-term", f"barrier={notes}", "3:exit=1", "wait", grace_seconds=0.1)
    assert job.result.exit_code == 1
    assert job.ends(0)[0] == (128 + signal.SIGKILL, "ended")


def test_the_time_limit_ends_the_job_with_its_own_code_and_without_a_restart(tmp_path: Path) -> None:
    job = Job(tmp_path, "wait", restarts=5, time_limit_seconds=0.3)
    assert job.result.exit_code == events.EXIT_TIME_LIMIT
    assert len(job.result.attempts) == 1
    assert job.result.attempts[0].failure == "the time limit of 0.3 s is over"


def test_the_time_limit_also_ends_the_pause_before_a_restart(tmp_path: Path) -> None:
    job = Job(tmp_path, "exit=3", restarts=1, restart_delay_seconds=3600, time_limit_seconds=2)
    assert job.result.exit_code == events.EXIT_TIME_LIMIT
    assert len(job.result.attempts) == 1


def test_a_job_in_another_thread_ends_when_it_is_told_to(tmp_path: Path) -> None:
    stop, started, results = StopRequest(), threading.Event(), []
    command = (sys.executable, PROGRAM, "report=1", "wait")
    spec = JobSpec(command=command, slices=1, processes_per_slice=2, log_dir=tmp_path / "logs")

    def on_event(event: events.JobEvent) -> None:
        if isinstance(event, events.StepReported):
            started.set()

    thread = threading.Thread(target=lambda: results.append(run_job(spec, on_event, stop=stop)))
    thread.start()
    assert started.wait(timeout=60)
    stop.request(77)
    thread.join(timeout=60)
    (result,) = results
    assert result.exit_code == 77


def test_an_exception_in_a_callback_ends_every_process_and_is_raised(tmp_path: Path) -> None:
    pids = []

    def on_event(event: events.JobEvent) -> None:
        if isinstance(event, events.ProcessStarted):
            pids.append(event.pid)
        if isinstance(event, events.StepReported):
            raise RuntimeError("the callback is broken")

    command = (sys.executable, PROGRAM, "ignore-term", "report=1", "wait")
    spec = JobSpec(command=command, slices=2, processes_per_slice=1, log_dir=tmp_path / "logs")
    with pytest.raises(RuntimeError, match="the callback is broken"):
        run_job(spec, on_event)
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_output_is_kept_for_each_process_and_attempt_and_handed_on_line_by_line(tmp_path: Path) -> None:
    job = Job(tmp_path, "print=héllo", "1@0:exit=1", restarts=1, slices=1)
    assert job.result.exit_code == 0
    logs = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert logs == [f"process_{k}.attempt_{n}.log" for k in range(2) for n in range(2)]
    assert (tmp_path / "logs" / "process_1.attempt_1.log").read_text() == "héllo\n"
    assert job.output.count((1, "héllo")) == 2


def test_the_last_line_is_shown_also_when_it_was_not_finished(tmp_path: Path) -> None:
    lines: list[str] = []
    script = "import os; os.write(1, b'one\\r\\ntw\\xffo')"
    spec = JobSpec(
        command=(sys.executable, "-c", script), slices=1, processes_per_slice=1, log_dir=tmp_path / "logs"
    )
    run_job(spec, on_output=lambda process, line: lines.append(line))
    assert lines == ["one", "tw\ufffdo"]


def test_a_report_that_is_no_step_is_shown_and_does_no_harm(tmp_path: Path) -> None:
    job = Job(tmp_path, "raw=7", "raw=seven", "raw=", slices=1, processes_per_slice=1)
    assert job.result.exit_code == 0
    assert job.result.attempts[0].ended[0].step == 7
    assert job.output == [(0, "(reported 'seven', which is no step)"), (0, "(reported '', which is no step)")]


def test_the_default_ramdisk_is_gone_when_the_job_is_and_a_given_one_stays(tmp_path: Path, notes: Path) -> None:
    Job(tmp_path, f"env={notes}", "touch=x", slices=1, processes_per_slice=1)
    ramdisk = Path(json.loads((notes / "0.0").read_text())[launch.RAMDISK])
    assert not ramdisk.exists()
    assert not ramdisk.parent.exists()
    Job(tmp_path, "touch=x", slices=1, processes_per_slice=1, ramdisk_root=tmp_path / "given")
    assert (tmp_path / "given" / "process_0" / "x").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_what_a_process_leaves_running_outlives_it_but_not_the_job(tmp_path: Path, notes: Path) -> None:
    child = notes / "0.0"
    job = Job(tmp_path, f"0@0:child={notes}", "0@0:exit=1", f"@1:alive={child}", restarts=1, slices=1)
    assert job.result.exit_code == 0
    assert not psutil.pid_exists(pid := int(child.read_text())) or not is_alive(psutil.Process(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("wiped", [False, True])
def test_agents_outlive_an_attempt_but_not_their_ramdisk_nor_the_job(
    tmp_path: Path, notes: Path, wiped: bool
) -> None:
    job = Job(
        tmp_path,
        f"agent={notes}",
        f"barrier={notes}",
        "@0:report=1",
        "@0:wait",
        restarts=1,
        processes_per_slice=1,
        kills=(KillSpec.parse("slice=1@step=1"),),
        wipe_ramdisk=wiped,
    )
    assert job.result.exit_code == 0
    pids = {name: int((notes / name).read_text()) for name in ("0.0", "0.1", "1.0", "1.1")}
    assert pids["0.0"] == pids["0.1"]
    assert (pids["1.0"] == pids["1.1"]) is not wiped
    assert not [pid for pid in pids.values() if psutil.pid_exists(pid) and is_alive(psutil.Process(pid))]


def test_the_variables_of_the_launcher_are_those_that_agents_do_not_inherit() -> None:
    assert all(name.startswith(LAUNCH_MARKS) for name in launch.VARIABLES)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_an_injected_kill_takes_what_the_process_started_with_it(tmp_path: Path, notes: Path) -> None:
    # Both processes leave a child in a session of its own; only that of the survivor is there afterwards.
    of_killed, of_survivor = notes / "1.0", notes / "0.0"
    job = Job(
        tmp_path,
        f"@0:child={notes}",
        f"barrier={notes}",
        "@0:report=1",
        "@0:wait",
        f"0@1:alive={of_survivor}",
        f"1@1:alive={of_killed}",
        restarts=1,
        slices=2,
        processes_per_slice=1,
        kills=(KillSpec.parse("slice=1@step=1"),),
    )
    assert job.result.exit_code == 9
    assert [end.process for end in job.result.attempts[1].ended if end.exit_code == 9] == [1]


def started_launcher(tmp_path: Path, *actions: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """The command in a process of its own, and its processes once each of them printed 'up'."""
    command = [
        *(sys.executable, "-m", "emergency_ckpt.cli.main", "launch", "--slices", "2"),
        *("--processes-per-slice", "1", "--grace", "60", "--ramdisk-root", str(tmp_path / "ramdisk")),
        *("--", sys.executable, PROGRAM, *actions, "print=up", "wait"),
    ]
    launcher = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert launcher.stdout is not None
    up = {launcher.stdout.readline(), launcher.stdout.readline()}
    assert up == {"[process 0] up\n", "[process 1] up\n"}
    return launcher, psutil.Process(launcher.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_to_the_launcher_ends_everything(number: signal.Signals, tmp_path: Path, notes: Path) -> None:
    launcher, processes = started_launcher(tmp_path, f"child={notes}")
    processes += [psutil.Process(int((notes / f"{k}.0").read_text())) for k in range(2)]
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + number
    assert "the launcher was told to stop; ending the others" in errors
    assert not any(map(is_alive, processes))


def test_a_second_signal_ends_processes_that_take_their_time_at_once(tmp_path: Path) -> None:
    launcher, processes = started_launcher(tmp_path, "ignore-term")
    assert launcher.stderr is not None
    launcher.terminate()
    while "told to stop" not in launcher.stderr.readline():
        pass
    launcher.terminate()
    launcher.communicate(timeout=50)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert not any(map(is_alive, processes))


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_processes_die_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launcher, processes = started_launcher(tmp_path, "ignore-term")
    launcher.kill()
    launcher.communicate(timeout=60)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []


def test_only_after_the_exit_codes_that_are_named_the_job_is_restarted_and_it_is_said_why(
    tmp_path: Path,
) -> None:
    """As on a spot instance: it leaves with 42 or by a signal and is restarted; a mistake in it ends it."""
    job = Job(
        tmp_path,
        "@0:exit=42",
        "@1:usr1=143",
        "@1:report=1",
        "@1:wait",
        "exit=1",
        slices=1,
        processes_per_slice=1,
        restarts=9,
        restart_on=parse_exit_codes("42,SIGTERM"),
        restart_delay_seconds=0.01,
        backoff=2,
        before=lambda event: (
            os.kill(os.getpid(), signal.SIGUSR1) if isinstance(event, events.StepReported) else None
        ),
    )
    assert [attempt.exit_code for attempt in job.result.attempts] == [42, 143, 1]
    restarts = job.of(events.Restarting)
    assert [event.delay_seconds for event in restarts] == [0.01, 0.02]
    assert [event.reason for event in restarts] == [
        "process 0 (slice 0) ended with exit code 42 before its first step",
        "process 0 (slice 0) ended with SIGTERM after step 1",
    ]
    assert [event.exit_code for event in job.of(events.NotRestarting)] == [1]
    assert job.result.exit_code == 1


def test_the_command_shows_what_failed_and_returns_the_exit_code(tmp_path: Path) -> None:
    command = [
        *(
            sys.executable,
            "-m",
            "emergency_ckpt.cli.main",
            "launch",
            "--slices",
            "1",
            "--processes-per-slice",
            "1",
        ),
        *(
            "--restarts",
            "5",
            "--restart-on",
            "3",
            "--kill",
            "slice=0@step=5",
            "--log-dir",
            str(tmp_path),
            "--quiet",
        ),
        *("--", sys.executable, PROGRAM, "report=4", "print=shown", "@0:exit=3", "@1:exit=4"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert done.stdout == ""
    assert "attempt 0 after" in done.stderr
    assert "process 0 (slice 0) ended with exit code 3 after step 4" in done.stderr
    assert "process 0 (slice 0) ended with exit code 4 after step 4" in done.stderr
    assert "restarting all processes, because process 0 (slice 0) ended with exit code 3" in done.stderr
    assert "not restarting: exit code 4 is not among those of --restart-on" in done.stderr
    assert "--kill slice=0@step=5 never came to pass" in done.stderr


def test_a_bad_option_is_an_error_with_a_remedy_and_no_traceback() -> None:
    command = [
        *(
            sys.executable,
            "-m",
            "emergency_ckpt.cli.main",
            "launch",
            "--slices",
            "1",
            "--processes-per-slice",
            "1",
        ),
        *("--kill", "slice=3@step=5", "--", sys.executable),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "names slice 3, but the job has 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_launcher_the_program_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert launch.launched_process() is None
    assert launch.initialize_from_launcher() is None
    launch.report_step(1)
