"""Runs a scenario in a process of its own that may mount what it likes, where the machine allows that."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_CHILD = "import importlib, pathlib, sys; sys.path[:0] = {paths!r}; " + (
    "getattr(importlib.import_module({module!r}), {name!r})(pathlib.Path({directory!r}))"
)


@functools.cache
def _can_mount() -> bool:
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return False
    tried = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


def run_in_namespace(scenario: Callable[[Path], None], directory: Path) -> None:
    """Calls `scenario(directory)`, a function of a module, in a child whose mounts nobody else sees."""
    if not _can_mount():
        pytest.skip("this machine does not let an ordinary user mount in a namespace")
    paths = [str(Path(__file__).parent), *sys.path]
    code = _CHILD.format(
        paths=paths, module=scenario.__module__, name=scenario.__name__, directory=str(directory)
    )
    ended = subprocess.run(
        ["unshare", "-Urm", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, f"{scenario.__name__} ended with {ended.returncode}:\n{ended.stderr}"


def mount_tmpfs(directory: Path, options: str, kind: str = "tmpfs") -> None:
    """Mounts a fresh file system over `directory`, within a scenario."""
    subprocess.run(["mount", "-t", kind, "-o", options, "none", str(directory)], check=True)


def unmount(directory: Path) -> None:
    subprocess.run(["umount", "-l", str(directory)], check=True)
