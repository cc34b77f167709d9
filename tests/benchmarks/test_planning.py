"""The figures about planning come out for any number of processes."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.facts import REPOSITORY


def test_a_curve_is_measured() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.planning", "--processes", "4,8", "--leaves", "6", "--json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert {figure["processes"] for figure in figures} == {4, 8}
    assert all(figure["seconds"] > 0 and figure["mib"] > 0 for figure in figures)
