"""One flipped bit in the memory of one host is noticed at the next save, named, and gone after a restore."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.processes import run_job
from tests.integration.replicas_job import save_and_restore


@pytest.mark.parametrize(
    ("leaf", "part"),
    [
        ("w", "w[0:16, 0:4]"),
        ("lr", "lr"),
        pytest.param("scale", "scale[0:16, 0:4]", marks=pytest.mark.long),
        pytest.param("host", "host[0:5]", marks=pytest.mark.long),
    ],
)
def test_of_three_slices_the_deviating_one_is_named_and_restores_from_the_others(
    ramdisk: Path, leaf: str, part: str
) -> None:
    told = run_job(save_and_restore, 3, str(ramdisk), 3, {}, {"1": leaf})
    lines = [line for answer in told for line in answer["lines"]]
    assert len(lines) == 2, "one line per step and leaf"
    for step, line in zip((3, 4), sorted(lines, key=lambda line: "step=4" in line), strict=True):
        assert f"step={step} " in line
        assert f"replicas of {part} differ" in line
        assert "not what most have is in slice 1 (process 1); most: slices 0, 2 (processes 0, 2)" in line
    assert [answer["raised"] for answer in told] == [{}] * 3
    assert [answer["saved"] for answer in told] == [2] * 3
    assert [answer["wrong"] for answer in told] == [[]] * 3
    assert [(a["step"], a["restored"], a["last"]) for a in told] == [(4, 1, 4)] * 3
    assert "replicas differ: process 1 takes the bytes of the majority" in told[0]["reason"]
    (line,) = [line for answer in told for line in answer["restored_lines"] if f"replicas of {part} " in line]
    assert "step=4 " in line
    assert "not what most have is in slice 1 (process 1); most: slices 0, 2 (processes 0, 2)" in line
    assert {answer["again"] for answer in told} == {"own slot"}, "the next restart finds nothing to mend"


def test_slices_that_are_wrong_in_different_leaves_make_each_other_good(ramdisk: Path) -> None:
    """No slice is right as a whole; with each wrong in another leaf, none would win as a whole."""
    damaged = {"0": "w", "1": "scale", "2": "lr"}
    told = run_job(save_and_restore, 3, str(ramdisk), 3, {}, damaged)
    assert [answer["step"] for answer in told] == [4] * 3
    assert [answer["wrong"] for answer in told] == [[]] * 3
    # Each fetches the shard that it has wrong, and whose values are wrong takes those of another.
    assert [answer["fetched"] for answer in told] == [16 * 4 * 4, 16 * 4 * 4, 0]
    for part, process in (("w[0:16, 0:4]", 0), ("scale[0:16, 0:4]", 1), ("lr", 2)):
        (line,) = [line for line in told[0]["restored_lines"] if f"replicas of {part} differ" in line]
        assert f"not what most have is in slice {process} (process {process})" in line
    assert [answer["restored"] for answer in told] == [3] * 3
    assert {answer["again"] for answer in told} == {"own slot"}


def test_of_two_slices_both_are_named_and_the_processes_that_hold_the_copies_raise(ramdisk: Path) -> None:
    told = run_job(save_and_restore, 4, str(ramdisk), 2, {"on_replica_divergence": "raise"}, {"3": "w"})
    for process in (1, 3):
        assert told[process]["raised"] == {"3": "3 ('w',)", "4": "4 ('w',)"}
        assert told[process]["saved"] == 2
    for process in (0, 2):
        assert told[process]["raised"] == {}
        assert told[process]["saved"] == 0
    lines = [line for answer in told for line in answer["lines"]]
    assert len(lines) == 2
    for line in lines:
        assert "replicas of w[8:16, 0:4] differ" in line
        assert "slice 0 (process 1) and slice 1 (process 3) differ, and nothing tells which" in line
    (line,) = [line for line in told[0]["restored_lines"] if "replicas of w" in line]
    assert "slice 0 (process 1) and slice 1 (process 3) differ, and nothing tells which" in line
    # Where nothing tells, all take the bytes of the lowest slice, which are right here.
    assert [answer["wrong"] for answer in told] == [[]] * 4
    assert [answer["restored"] for answer in told] == [1] * 4


def test_of_slices_that_keep_overlapping_parts_all_get_one_version_and_keep_it(ramdisk: Path) -> None:
    """Three slices with two copies: slice 0 keeps `w` and `scale`, 1 `scale` and `host`, 2 `w` and `host`."""
    spread = {"local_checkpoint_spread": True, "local_checkpoint_copies": 2}
    told = run_job(save_and_restore, 3, str(ramdisk), 3, spread, {"0": "lr", "1": "scale", "2": "w"})
    assert [answer["step"] for answer in told] == [4] * 3
    assert [answer["wrong"] for answer in told] == [[]] * 3, (
        "of two versions the lowest slice's, of values most"
    )
    # Beside what its slice does not keep, each fetches the shard that it has wrong.
    assert [answer["fetched"] for answer in told] == [40, 2 * 16 * 4 * 4, 2 * 16 * 4 * 4]
    for part, odd in (("w[0:16, 0:4]", (0, 2)), ("scale[0:16, 0:4]", (0, 1))):
        (line,) = [line for line in told[0]["restored_lines"] if f"replicas of {part} differ" in line]
        assert " and ".join(f"slice {p} (process {p})" for p in odd) + " differ, and nothing tells" in line
    assert [answer["restored"] for answer in told] == [3] * 3
    assert [answer["again_divergences"] for answer in told] == [0] * 3, (
        "what was wrong lies on no ramdisk any more"
    )
