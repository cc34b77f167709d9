"""The real XPK, in an environment of its own: it needs other versions of packages than this project's tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

_OWN = Path(__file__).parents[2] / ".xpk" / "bin" / "xpk"


def xpk_program() -> Path:
    """XPK, from the variable XPK or as `make xpk` installs it; without it skips the test, but never in CI."""
    program = Path(os.environ.get("XPK") or _OWN)
    if not program.exists():
        reason = f"there is no {program}: `make xpk` installs it"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; in CI nothing is skipped")
        pytest.skip(reason)
    return program


def run_script(script: str, words: Sequence[str], directory: Path, answers: str = "") -> str:
    """Runs a rendered script with the real XPK; returns what it printed, its exit code in the last line."""
    file = directory / "script.sh"
    file.write_text(script)
    done = subprocess.run(
        ["bash", str(file), *words],
        cwd=directory,
        env=_environment(directory),
        input=answers,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return f"{done.stdout}{done.stderr}\nexit code {done.returncode}"


def run_python(code: str, directory: Path) -> str:
    """What a program prints that can import XPK."""
    python = xpk_program().with_name("python")
    done = subprocess.run(
        [python, "-c", code], env=_environment(directory), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _environment(directory: Path) -> dict[str, str]:
    # Its own home: XPK reads and writes settings there, and a kubeconfig would be one of somebody's cluster.
    return {"PATH": f"{xpk_program().parent}:/usr/bin:/bin", "HOME": str(directory), "LANG": "C.UTF-8"}
