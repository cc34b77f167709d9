"""Hosts keep the shards that they hold: by their former ids where the platform tells them, else by the mesh."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from tests.integration.processes import REPOSITORY, _reserved_address, run_job
from tests.integration.training_job import live_through

SLICES = [[0, 2], [1, 3]]
HOSTS = [[0, 1], [2, 3]]


@pytest.mark.long
def test_hosts_that_changed_places_restore_without_the_network_once_the_mesh_is_arranged(ramdisk: Path) -> None:
    """Jobs of two slices with two hosts each; every story trains first, and then lives on elsewhere."""
    sharded = {"cut": "all", "checkpoint_period": 1000, "save_checkpoint_on_completion": False}
    replicated = {"checkpoint_period": 1000, "save_checkpoint_on_completion": False}

    def arranged(flags: dict[str, object], what: str) -> dict[str, object]:
        return {**flags, "arranged": what}

    stories = {
        "slices": [
            {"until": 4, "flags": sharded},
            {"until": 6, "swap": SLICES, "flags": arranged(sharded, "slices")},
            # What was saved in an arranged mesh is found again in the ordinary one, and in another.
            {"until": 8, "swap": SLICES, "flags": arranged(sharded, "slices")},
            {"until": 8, "swap": SLICES, "flags": sharded},
        ],
        "hosts": [
            {"until": 4, "flags": replicated},
            {"until": 4, "swap": HOSTS, "flags": arranged(replicated, "slices")},
            {"until": 6, "swap": [], "flags": replicated},
            {"until": 8, "swap": HOSTS, "flags": arranged(replicated, "hosts")},
        ],
        "both": [
            {"until": 4, "flags": sharded},
            {"until": 4, "swap": [[0, 3], [1, 2]], "flags": arranged(sharded, "hosts")},
        ],
        "replicas": [
            {"until": 4, "flags": replicated},
            {"until": 4, "swap": SLICES, "flags": arranged(replicated, "hosts")},
        ],
    }
    answers = run_job(
        live_through, 4, str(ramdisk / "none"), str(ramdisk), 2, stories, limit=timedelta(seconds=200)
    )
    told = {name: [list(life) for life in zip(*(a[name] for a in answers), strict=True)] for name in stories}
    for name, lives in told.items():
        for number, life in enumerate(lives):
            assert all("error" not in said for said in life), (name, number, life)

    def fetched(name: str, life: int) -> list[int]:
        return [said["counters"]["fetched_bytes"] for said in told[name][life]]

    def starts(name: str) -> list[int]:
        return [life[0]["start"] for life in told[name]]

    assert starts("slices") == [0, 4, 6, 8]
    assert starts("hosts") == [0, 4, 4, 6]
    assert starts("both") == starts("replicas") == [0, 4]
    for name, life in (("slices", 1), ("slices", 2), ("hosts", 3), ("both", 1), ("replicas", 1)):
        assert fetched(name, life) == [0] * 4, (name, life)
        assert told[name][life][0]["hints"] == [], "nobody stands wrong"
        assert {said["source"] for said in told[name][life]} == {"own slot"}
    assert told["slices"][1][0]["mesh"] == [2, 3, 0, 1]
    assert told["slices"][2][0]["mesh"] == [0, 1, 2, 3]
    assert told["hosts"][3][0]["mesh"] == [1, 0, 3, 2]
    assert told["both"][1][0]["mesh"] == [3, 2, 1, 0]
    assert told["replicas"][1][0]["mesh"] == [0, 1, 2, 3], "each slice has what the other needs"
    # Without it, or with slices only where hosts were swapped, everybody fetches, and the log says why.
    for name, life in (("slices", 3), ("hosts", 1)):
        assert all(fetched(name, life)), (name, life)
        (hint,) = told[name][life][0]["hints"]
        assert "only because hosts have changed places" in hint
        assert f"fetch {sum(fetched(name, life))} bytes" in hint


def test_processes_take_the_ids_that_the_platform_wrote_down(tmp_path: Path) -> None:
    with _reserved_address() as address:
        started = []
        for place, process_id in enumerate((1, 0)):
            directory = tmp_path / f"{place}"
            directory.mkdir()
            (directory / "jax-init-info.txt").write_text(f"{process_id}\n{address}\n")
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.integration.joining_job", str(directory), "2"],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    cwd=REPOSITORY,
                    env={**os.environ, "JAX_PLATFORMS": "cpu"},
                )
            )
        try:
            said = [process.communicate(timeout=90)[0] for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
    assert [text.splitlines()[-1] for text in said] == ["process 1 of 2", "process 0 of 2"], said
