"""Whether a shell stands between this process and whoever signals it, and would keep the signal for itself.

A shell that waits for a command does not pass signals on: it ends by them, or, as process 1 of a container,
ignores them. Only one that catches them can do something for its command.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

_SHELLS = {"sh", "bash", "dash", "ash", "zsh", "ksh", "busybox"}
_MOST_ANCESTORS = 32


@dataclasses.dataclass(frozen=True, slots=True)
class _Process:
    name: str
    pid: int
    parent: int
    has_terminal: bool
    catches: bool


def shell_in_the_way(number: int = signal.SIGTERM, proc: Path = Path("/proc")) -> str | None:
    """A sentence on the shell that keeps a signal from this process, and on the way out; None: there is none.

    Looks at the shells directly above this process. One with a controlling terminal is a person's. Where
    nothing can be found out (no /proc, processes of others), nothing is said.
    """
    pid = os.getppid()
    for _ in range(_MOST_ANCESTORS):
        process = _look_at(pid, number, proc)
        if process is None or process.name not in _SHELLS or process.has_terminal:
            return None
        if not process.catches:
            return _sentence(process, number)
        pid = process.parent
    return None


def _sentence(shell: _Process, number: int) -> str:
    name = signal.Signals(number).name
    fate = "is process 1 here and ignores it" if shell.pid == 1 else "ends by it"
    return (
        f"a {name} to {shell.name} (process {shell.pid}), which started this program and waits for it, never "
        f"gets here: the shell {fate}. Nothing is saved then. Start the program so that no shell waits: "
        "`exec python …`, or `emergency-ckpt run -- python …`; with no ';' and no pipe around it (for a log: "
        "`python … > >(tee log)` in bash)"
    )


def _program(pid: int, name: str, proc: Path) -> str:
    """The name of the program that a process runs: a script that was started by its name goes by that one."""
    try:
        program = os.path.basename(os.readlink(proc / str(pid) / "exe")).removesuffix(" (deleted)")
    except OSError:
        return name
    # Which of its tools it is, busybox says by the name.
    return name if program == "busybox" and not name.endswith(".sh") else program


def _look_at(pid: int, number: int, proc: Path) -> _Process | None:
    try:
        # The name is in parentheses, and may have any in it.
        fields = (proc / str(pid) / "stat").read_text(errors="replace")
        status = (proc / str(pid) / "status").read_text(errors="replace")
        name, _, rest = fields.partition("(")[2].rpartition(")")
        name = _program(pid, name, proc)
        _, parent, _, _, terminal, *_ = rest.split()
        masks = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
        catches = bool(int(masks[0], 16) >> (number - 1) & 1)
        return _Process(name, pid, int(parent), int(terminal) != 0, catches)
    except (OSError, ValueError, IndexError):
        return None
