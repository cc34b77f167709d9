"""What to launch, and which failures to inject: checked before anything starts."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from emergency_ckpt.errors import ConfigError

PLACEHOLDERS = ("ramdisk", "process", "slice", "attempt")
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
      restart_delay_seconds: pause before each restart.
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
    restart_delay_seconds: float = 0
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
