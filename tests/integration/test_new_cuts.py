"""A job is killed while its hosts seal a restored step in the cut of another job shape: nothing of it is lost.

Real processes, agents and sockets. Nothing but step 1 is in the persistent tier, and agents drain nothing, so
that what comes back comes from the ramdisks; every state is compared with the trained one in each process.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cut_job import AT_THE_SEAL, restore_and_stay
from tests.integration.processes import Job, run_job
from tests.integration.test_outliving import wait_for
from tests.integration.training_job import live_through, train

NEWEST = 14
RAMDISKS_ALONE = {
    "checkpoint_period": 1000,
    "save_checkpoint_on_completion": False,
    "agent_flush_on_trainer_exit": False,
}
further = pytest.mark.long
COPIES = {"local_checkpoint_copies": 2}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Slices, processes, and along what the weights are cut."""

    slices: int
    processes: int
    cut: str

    def flags(self, more: dict[str, Any]) -> dict[str, Any]:
        return {**RAMDISKS_ALONE, **more, "cut": self.cut}


ROWS, COLUMNS = Shape(1, 2, "fsdp"), Shape(1, 2, "columns")
SLICES, ONE_SLICE = Shape(2, 4, "fsdp"), Shape(1, 4, "columns")


def cuts_of(root: Path, process: int, step: int = NEWEST) -> set[str]:
    """The layouts in which a ramdisk has a step."""
    found: set[str] = set()
    for path in (root / f"ramdisk_{process}").glob("emergency_ckpt/*/slot_*.manifest"):
        body = json.loads(path.read_bytes().partition(b"\n")[2])
        if body["step"][1] == step:
            found.add(body["layout"])
    return found


def kill_in_the_middle(
    root: Path, before: Shape, after: Shape, flags: dict[str, Any], late: list[int], moment: str
) -> None:
    """All are killed when the late ones stand in the middle of their seal and the others have sealed."""
    run_job(train, before.processes, str(root), before.slices, NEWEST, before.flags(flags))
    (old,) = set.union(*(cuts_of(root, process) for process in range(before.processes)))
    with Job(
        restore_and_stay, after.processes, str(root), after.slices, after.flags(flags), late, moment
    ) as job:
        for process in range(after.processes):
            job.wait_for_line(process, AT_THE_SEAL[moment] if process in late else f"restored {NEWEST}")
        for process in (*late, *(p for p in range(after.processes) if p not in late)):
            job.signal(process, signal.SIGKILL)
        assert job.wait() == [-signal.SIGKILL] * after.processes, job.describe()
    cuts = [cuts_of(root, process) for process in range(after.processes)]
    assert [old in found for found in cuts] == [True] * after.processes, "the old cut is given up by nobody"
    assert [len(found) for found in cuts] == [1 if p in late else 2 for p in range(after.processes)]


@further
def test_killed_in_the_first_save_after_a_host_had_no_room_for_the_new_cut_the_job_comes_back(
    ramdisk: Path,
) -> None:
    """That host has the old cut alone, the other one both, and a third slot to save into."""
    root = ramdisk / "killed"
    run_job(train, 2, str(root), 1, NEWEST, ROWS.flags({}))
    (old,) = cuts_of(root, 0)
    late = [1]
    with Job(restore_and_stay, 2, str(root), 1, COLUMNS.flags({}), late, "os.rename", NEWEST + 2) as job:
        job.wait_for_line(1, AT_THE_SEAL["os.rename"])
        wait_for(lambda: bool(cuts_of(root, 0, NEWEST + 2)), root)
        for process in range(2):
            job.signal(process, signal.SIGKILL)
        job.wait()
        assert "the ramdisk is full" in "\n".join(job.lines(1))
    assert [(old in cuts_of(root, p), len(cuts_of(root, p))) for p in range(2)] == [(True, 2), (True, 1)]
    stories = {
        shape.cut: [{"until": n, "flags": shape.flags({})} for n in (NEWEST, 16)] for shape in (ROWS, COLUMNS)
    }
    for lives in told_by(root, ramdisk, COLUMNS, stories).values():
        assert_starts(lives, [NEWEST, NEWEST])


def told_by(killed: Path, root: Path, shape: Shape, stories: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    limit = timedelta(seconds=60 + 15 * sum(map(len, stories.values())))
    answers = run_job(live_through, shape.processes, str(killed), str(root), shape.slices, stories, limit=limit)
    return {name: [list(life) for life in zip(*(a[name] for a in answers), strict=True)] for name in stories}


def assert_starts(lives: list[list[dict[str, Any]]], steps: list[int]) -> None:
    assert [[said.get("start") for said in life] for life in lives] == [
        [step] * len(life) for step, life in zip(steps, lives, strict=True)
    ], lives


@pytest.mark.parametrize(
    ("late", "moment"),
    [
        ([1], "os.rename"),
        pytest.param([0], "os.rename", marks=further),
        pytest.param([0], "os.remove", marks=further),
        pytest.param([1], "os.remove", marks=further),
        pytest.param([0, 1], "os.rename", marks=further),
    ],
)
def test_killed_while_hosts_seal_a_new_cut_the_job_comes_back_in_either_shape(
    ramdisk: Path, late: list[int], moment: str
) -> None:
    """Each host has half of either cut, and nobody has it twice."""
    kill_in_the_middle(ramdisk / "killed", ROWS, COLUMNS, {}, late, moment)
    told = told_by(
        ramdisk / "killed",
        ramdisk,
        COLUMNS,
        {
            "the old shape": [{"until": n, "flags": ROWS.flags({})} for n in (NEWEST, 16, 16)],
            "the new shape": [{"until": n, "flags": COLUMNS.flags({})} for n in (NEWEST, 16, 16)],
            "one and the other": [
                {"until": NEWEST, "flags": shape.flags({})} for shape in (COLUMNS, ROWS, COLUMNS, ROWS)
            ],
        },
    )
    assert_starts(told["the old shape"], [NEWEST, NEWEST, 16])
    assert_starts(told["the new shape"], [NEWEST, NEWEST, 16])
    assert_starts(told["one and the other"], [NEWEST] * 4)
    assert {said["source"] for said in told["the old shape"][0]} == {"own slot"}


@pytest.mark.parametrize(
    ("before", "after", "late"),
    [
        (ROWS, COLUMNS, [0]),
        pytest.param(ROWS, COLUMNS, [1], marks=further),
        pytest.param(SLICES, ONE_SLICE, [0, 1], marks=further),
        pytest.param(SLICES, ONE_SLICE, [1, 2, 3], marks=further),
        pytest.param(ONE_SLICE, SLICES, [3], marks=further),
        pytest.param(ONE_SLICE, SLICES, [0, 2], marks=further),
    ],
)
def test_killed_while_hosts_seal_a_new_cut_with_copies_the_job_comes_back_without_any_host(
    ramdisk: Path, before: Shape, after: Shape, late: list[int]
) -> None:
    """Hosts keep copies for each other in both cuts, so that one of them may be lost as well."""
    kill_in_the_middle(ramdisk / "killed", before, after, COPIES, late, "os.rename")
    for shape, name in ((after, "new"), (before, "old")):
        flags = shape.flags(COPIES)
        told = told_by(
            ramdisk / "killed",
            ramdisk / name,
            shape,
            {
                f"{host}": [{"until": NEWEST, "flags": flags, "wipe": [host]}, {"until": 16, "flags": flags}]
                for host in range(shape.processes)
            },
        )
        for lives in told.values():
            assert_starts(lives, [NEWEST, NEWEST])
