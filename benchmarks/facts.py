"""Where and with what the figures were taken: without these they mean nothing later."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
_PACKAGES = (
    "jax",
    "jaxlib",
    "orbax-checkpoint",
    "tensorstore",
    "numpy",
    "ml_dtypes",
    "xxhash",
    "emergency_ckpt",
)


def environment_facts() -> dict[str, Any]:
    """Versions, machine, load and source revision, as JSON."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": platform.machine(),
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_bytes("MemTotal"),
        # Above the number of cores, others were at work and the figures are rough.
        "load_average": os.getloadavg()[0],
    }


def memory_bytes(field: str) -> int:
    """A field of /proc/meminfo, such as MemTotal or MemAvailable."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise KeyError(f"/proc/meminfo has no field {field}")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "model name":
            return rest.strip()
    return platform.processor() or "unknown"


def _commit() -> str:
    """The commit of the working tree, with '+changes' where it differs; 'unknown' outside of git."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + (
            "+changes" if _git("status", "--porcelain", "--", "emergency_ckpt", "benchmarks") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()
