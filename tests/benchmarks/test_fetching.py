"""The figures about fetching come out for every size of shards, beside those of the bare copy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.facts import REPOSITORY
from tests.agent.served import agents_of, has_ended


def test_every_contender_is_measured_and_no_agent_is_left(ramdisk: Path) -> None:
    words = ["--size-mib", "4", "--rounds", "2", "--streams", "1,3", "--shards", "2 MiB,100 kB", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fetching", "--directory", str(ramdisk), *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    found = [(figure["shards"], figure["streams"]) for figure in figures]
    assert found == [("2 MiB", 1), ("2 MiB", 3), ("100 kB", 1), ("100 kB", 3)]
    for figure in figures:
        assert figure["seconds"].keys() == {"fetch", "bare copy", "bare copy, hashed"}
        assert all(len(each) == 2 and min(each) > 0 for each in figure["seconds"].values())
    assert all(has_ended(agent.pid, 30) for agent in agents_of(ramdisk))
    assert list(ramdisk.iterdir()) == []
