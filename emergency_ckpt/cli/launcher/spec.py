"""What to launch, and which failures to inject: checked before anything starts."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from emergency_ckpt.errors import ConfigError

PLACEHOLDERS = ("ramdisk", "process", "slice", "attempt")
_EXIT_CODES = 256
_MOST_BACKOFF = 100
_KILL_FORM = re.compile(r"(slice|process)=(\d+(?:,\d+)*)@step=(\d+)")


@dataclasses.dataclass(frozen=True)
class KillSpec:
    """Kill all processes of some slices, or some processes, at one moment, as a lost host would be.

    The moment is when each of these processes has reported `step` or a later one. A kill happens once.
    """

    target: Literal["slice", "process"]
    indices: tuple[int, ...]
    step: int

    @classmethod
    def parse(cls, text: str) -> KillSpec:
        """Reads `slice=1@step=30` or `process=0,3@step=30`; raises ConfigError for anything else."""
        match = _KILL_FORM.fullmatch(text.replace(" ", ""))
        if match is None:
            raise ConfigError(
                f"--kill {text!r} is not understood; write which slices or processes to kill, and after which "
                "step, as in slice=1@step=30 or process=0,3@step=30"
            )
        target, indices, step = match.groups()
        kind: Literal["slice", "process"] = "slice" if target == "slice" else "process"
        return cls(kind, tuple(sorted({int(index) for index in indices.split(",")})), int(step))

    def __str__(self) -> str:
        return f"{self.target}={','.join(map(str, self.indices))}@step={self.step}"

    def processes(self, processes_per_slice: int) -> tuple[int, ...]:
        """The indices of the processes that it kills."""
        if self.target == "process":
            return self.indices
        return tuple(
            slice_index * processes_per_slice + k
            for slice_index in self.indices
            for k in range(processes_per_slice)
        )


def parse_exit_codes(text: str) -> frozenset[int]:
    """Reads `42,143,SIGTERM`, a signal being 128 + its number; raises ConfigError for anything else."""
    found: set[int] = set()
    for word in text.replace(" ", "").split(","):
        if word.isascii() and word.isdigit() and 0 < int(word) < _EXIT_CODES:
            found.add(int(word))
        elif word in signal.Signals.__members__:
            found.add(128 + signal.Signals[word])
        else:
            raise ConfigError(
                f"--restart-on {text!r} is not understood at {word!r}; give exit codes from 1 to 255 and names"
                " of signals, as in 42,143,SIGKILL"
            )
    return frozenset(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job.

    Attributes:
      command: program and arguments of every process. `{ramdisk}`, `{process}`, `{slice}` and `{attempt}` in
        an argument are replaced for each process; other braces stay as they are.
      slices, processes_per_slice: process k belongs to slice k // processes_per_slice.
      devices_per_process: CPU devices that jax shows to each process.
      restarts: how often the whole job is started again after a process failed.
      kills: failures to inject, each once; one that does not come to pass waits for the next attempt.
      wipe_ramdisk: whether killed processes lose their ramdisk directories, as with a host that is replaced.
      ramdisk_root: holds `process_<k>/` of each process, and is kept afterwards. None: a fresh directory in
        memory, removed afterwards.
      log_dir: holds `process_<k>.attempt_<n>.log`. None: a fresh temporary directory. Kept in both cases.
      restart_on: the exit codes after which the job is started again; None: all but 0.
      restart_delay_seconds: pause before the first restart.
      backoff: each further pause is this many times as long, up to `max_restart_delay_seconds`. After an
        attempt that lived longer than the longest pause it begins anew.
      machine_devices: leave the devices that jax finds on this machine as they are, in place of CPU devices.
      grace_seconds: how long processes have between SIGTERM and SIGKILL when the job ends them.
      time_limit_seconds: for the whole job; None: no limit.
      environment: variables for every process, on top of the launcher's own environment.
    """

    command: tuple[str, ...]
    slices: int
    processes_per_slice: int
    devices_per_process: int = 1
    restarts: int = 0
    kills: tuple[KillSpec, ...] = ()
    wipe_ramdisk: bool = False
    ramdisk_root: Path | None = None
    log_dir: Path | None = None
    restart_on: frozenset[int] | None = None
    restart_delay_seconds: float = 0
    backoff: float = 1
    max_restart_delay_seconds: float = 300
    machine_devices: bool = False
    grace_seconds: float = 5
    time_limit_seconds: float | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for flag in ("slices", "processes_per_slice", "devices_per_process"):
            if getattr(self, flag) < 1:
                raise ConfigError(f"{_option(flag)} is {getattr(self, flag)}; it must be at least 1")
        for flag in ("restarts", "restart_delay_seconds", "grace_seconds"):
            if getattr(self, flag) < 0:
                raise ConfigError(f"{_option(flag)} is {getattr(self, flag)}; it cannot be negative")
        if not 1 <= self.backoff <= _MOST_BACKOFF:
            raise ConfigError(f"--backoff is {self.backoff:g}; expected a factor from 1 to {_MOST_BACKOFF}")
        if self.max_restart_delay_seconds <= 0:
            raise ConfigError(f"--max-restart-delay is {self.max_restart_delay_seconds:g}; expected seconds")
        if self.restart_on is not None and not self.restarts:
            raise ConfigError("--restart-on says after which exit codes to restart; add --restarts N")
        if self.time_limit_seconds is not None and self.time_limit_seconds <= 0:
            raise ConfigError(f"--time-limit is {self.time_limit_seconds}; it must be more than 0 seconds")
        for kill in self.kills:
            count = self.slices if kill.target == "slice" else self.process_count
            if max(kill.indices) >= count:
                raise ConfigError(
                    f"--kill {kill} names {kill.target} {max(kill.indices)}, but the job has {count}, numbered "
                    f"from 0"
                )
        if self.wipe_ramdisk and not self.kills:
            raise ConfigError(
                "--wipe-ramdisk wipes the directories of killed processes, but nothing is to be killed; add "
                "--kill slice=1@step=30 or leave it out"
            )
        if not self.command:
            raise ConfigError("there is no command to launch; give it after --, as in: -- python train.py")
        if shutil.which(self.command[0], path=self.environment.get("PATH")) is None:
            raise ConfigError(f"the command {self.command[0]!r} is not an executable on PATH")

    @property
    def process_count(self) -> int:
        return self.slices * self.processes_per_slice

    def restarts_after(self, exit_code: int) -> bool:
        """Whether the job is started again when its first failure was this one."""
        return self.restart_on is None or exit_code in self.restart_on

    def restart_delay(self, short_lives: int) -> float:
        """The pause before a restart after so many attempts in a row that did not live long."""
        with contextlib.suppress(OverflowError):
            delay = self.restart_delay_seconds * self.backoff ** max(short_lives - 1, 0)
            return min(delay, max(self.max_restart_delay_seconds, self.restart_delay_seconds))
        return self.max_restart_delay_seconds

    def slice_of(self, process: int) -> int:
        return process // self.processes_per_slice

    def command_of(self, process: int, ramdisk: Path, attempt: int) -> list[str]:
        """The command with the placeholders replaced for one process."""
        values = {
            "ramdisk": str(ramdisk),
            "process": str(process),
            "slice": str(self.slice_of(process)),
            "attempt": str(attempt),
        }
        pattern = "{(" + "|".join(PLACEHOLDERS) + ")}"
        return [re.sub(pattern, lambda match: values[match[1]], argument) for argument in self.command]


_OPTIONS = {"restart_delay_seconds": "--restart-delay", "grace_seconds": "--grace"}


def _option(flag: str) -> str:
    """The command line's name of a field."""
    return _OPTIONS.get(flag, "--" + flag.replace("_", "-"))
