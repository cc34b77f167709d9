"""Extras come back on another number of processes if they are declared, from ramdisks and from the store."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.integration.extras_job import RECORDS, records_of, restore_all, save_all
from tests.integration.processes import run_job

DECLARED = {"how": "declared"}
Told = list[dict[str, list[Any]]]


def told_by(
    ramdisk: Path, before: tuple[int, int], after: tuple[int, int], stories: dict[str, list[dict[str, Any]]]
) -> dict[str, list[list[Any]]]:
    """Per story and life what each process gets."""
    trained = ramdisk / "trained"
    run_job(save_all, before[1], str(trained), before[0])
    limit = timedelta(seconds=180)
    answers = run_job(restore_all, after[1], str(trained), str(ramdisk), after[0], stories, limit=limit)
    return {name: [list(life) for life in zip(*(a[name] for a in answers), strict=True)] for name in stories}


def check_shared(life: list[Any], step: int) -> None:
    """All records are in somebody's hands, and nobody lacks what all have."""
    count = len(life)
    assert [answer["step"] for answer in life] == [step] * count, life
    assert [answer["data"] for answer in life] == [records_of(p, count, step) for p in range(count)]
    assert sorted(r for answer in life for r in answer["data"]["records"]) == list(range(RECORDS))
    assert [answer["schedule"] for answer in life] == [f"schedule of {step}"] * count


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((2, 4), (2, 2), id="4 to 2"),
        pytest.param((2, 2), (2, 4), id="2 to 4", marks=pytest.mark.long),
    ],
)
def test_declared_extras_come_back_on_another_number_of_processes(
    ramdisk: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    everybody = list(range(after[1]))
    stories = {
        # Before the first save they are as redundant as if they had been saved.
        "ramdisks": [DECLARED, DECLARED, {"wipe": [after[1] - 1], "how": "declared"}],
        "persistent": [{"wipe": everybody, "how": "declared"}, DECLARED],
        "plain": [{"how": "plain"}, DECLARED],
        "global": [{"how": "global"}],
        "nothing": [{"how": "nothing"}],
        "failing": [{"how": "failing"}, DECLARED],
    }
    told = told_by(ramdisk, before, after, stories)
    for life in told["ramdisks"]:
        check_shared(life, 14)
    for life in told["persistent"]:
        check_shared(life, 10)
    for answer in told["plain"][0]:
        assert answer.startswith(
            "ExtrasError: extras 'data' are wanted, but step 14 (generation 1) was saved by "
        )
        assert f"saved by {before[1]} processes and this job has {after[1]}" in answer
        assert "restore them as ReshardedExtras" in answer
    check_shared(told["plain"][1], 14)
    for name in ("global", "nothing"):
        for answer in told[name][0]:
            assert answer["extras"] == {"schedule": "schedule of 14"}
    assert "failed for process" in told["failing"][0][-1]
    assert all("no such record" in answer for answer in told["failing"][0])
    check_shared(told["failing"][1], 14)


@pytest.mark.long
def test_extras_that_nobody_has_any_more_are_named_by_their_owners(ramdisk: Path) -> None:
    """Each of four slices holds the whole state; process 0 keeps the extras of 0, 2 and 3."""
    told = told_by(
        ramdisk,
        (4, 4),
        (2, 2),
        {"lost": [{"wipe": [1], "how": "declared"}, {"how": "global"}], "there": [DECLARED]},
    )
    for answer in told["lost"][0]:
        assert answer.startswith(
            "ExtrasError: extras 'data' were saved by 4 processes, and those of process 1 "
        )
    for answer in told["lost"][1]:
        assert answer["schedule"] == "schedule of 14"
    check_shared(told["there"][0], 14)
