"""Any hosts may be lost as long as every shard is left somewhere: the job comes back, bit for bit.

Real processes, agents and sockets. What is restored is compared with the trained state in each process.
`make survivors` goes through every loss of a job of three slices of two hosts; otherwise some are drawn.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.agent.served import agents_of
from tests.integration.processes import Job, run_job
from tests.integration.training_job import live_through, train

AT_A_TIME = 6
"""How many losses one started job goes through: each leaves agents that run for a while."""


def survivable_losses(slices: int, hosts: int) -> Iterator[list[int]]:
    """Every set of processes that may be lost: of each host, one counterpart in some slice is left."""
    processes = range(slices * hosts)
    for count in range(1, len(processes)):
        for lost in itertools.combinations(processes, count):
            if all(any(s * hosts + host not in lost for s in range(slices)) for host in range(hosts)):
                yield list(lost)


def lives_after(
    tmp_path: Path, slices: int, hosts: int, losses: list[list[int]], **flags: Any
) -> dict[str, list[dict[str, Any]]]:
    """What each process says after each loss, of a job that was trained to step 14 and saved it on ramdisks."""
    told = stories_of(tmp_path, slices, hosts, {str(lost): [lost] for lost in losses}, flags)
    return {name: lives[0] for name, lives in told.items()}


def stories_of(
    tmp_path: Path, slices: int, hosts: int, losses: dict[str, list[list[int]]], flags: dict[str, Any]
) -> dict[str, list[list[dict[str, Any]]]]:
    """The same for one loss after the other, with no save in between."""
    count = slices * hosts
    trained = tmp_path / "trained"
    run_job(train, count, str(trained), slices, 14, flags)
    stories = {
        name: [{"wipe": lost, "until": 14, "flags": flags} for lost in one_by_one]
        for name, one_by_one in losses.items()
    }
    limit = timedelta(seconds=60 + 15 * sum(map(len, losses.values())))
    answers = run_job(live_through, count, str(trained), str(tmp_path), slices, stories, limit=limit)
    return {name: [list(life) for life in zip(*(a[name] for a in answers), strict=True)] for name in stories}


def batches() -> Iterator[tuple[int, int, list[list[int]]]]:
    """All losses of two slices of two hosts; of three slices some, or with SURVIVORS=all every one."""
    yield 2, 2, list(survivable_losses(2, 2))
    losses = list(survivable_losses(3, 2))
    if os.environ.get("SURVIVORS") != "all":
        losses = random.Random(5).sample(losses, AT_A_TIME)
    for at in range(0, len(losses), AT_A_TIME):
        yield 3, 2, losses[at : at + AT_A_TIME]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("slices", "hosts", "losses"), tuple(batches()))
def test_every_loss_that_leaves_each_shard_somewhere_is_made_good_by_the_survivors(
    ramdisk: Path, slices: int, hosts: int, losses: list[list[int]]
) -> None:
    for name, life in lives_after(ramdisk, slices, hosts, losses).items():
        lost = [p for p in range(slices * hosts) if f"{p}" in name]
        assert [r.get("start") for r in life] == [14] * slices * hosts, (name, life)
        for process, said in enumerate(life):
            counters = said["counters"]
            assert said["extras"] == {"data": {"position": 1400 + process}}
            # Whoever lost nothing touches no network; the others fetch what they lost, and no more.
            fetched = counters["restored_bytes"] if process in lost else 0
            assert counters["fetched_bytes"] == fetched, (name, process)


@pytest.mark.long
def test_a_loss_of_all_copies_of_a_shard_falls_back_to_the_persistent_step(ramdisk: Path) -> None:
    (life,) = lives_after(ramdisk, 2, 2, [[1, 3]]).values()
    assert [r["start"] for r in life] == [10] * 4
    assert "step 14: the shards of processes 1, 3 have no survivor" in life[0]["reason"]


@pytest.mark.parametrize(
    ("before", "after", "copies"),
    [
        ((2, 2), (1, 4), 2),
        pytest.param((1, 2), (2, 2), 1, marks=pytest.mark.long),
        pytest.param((2, 2), (1, 2), 1, marks=pytest.mark.long),
        pytest.param((1, 4), (2, 2), 1, marks=pytest.mark.long),
    ],
)
def test_ramdisks_restore_a_job_of_another_shape(
    ramdisk: Path, before: tuple[int, int], after: tuple[int, int], copies: int
) -> None:
    """Fewer and more slices, processes and pieces; nothing but step 1 is in the persistent tier."""
    flags = {
        "checkpoint_period": 1000,
        "save_checkpoint_on_completion": False,
        "local_checkpoint_copies": copies,
    }
    run_job(train, before[0] * before[1], str(ramdisk), before[0], 14, flags)
    for _ in range(2):
        lives = run_job(train, after[0] * after[1], str(ramdisk), after[0], 14, flags)
        assert [r["start"] for r in lives] == [14] * len(lives)
    assert [r["source"] for r in lives] == ["own slot"] * len(lives), "redundant before the first save"


def test_copies_make_good_what_no_other_host_holds_by_nature(ramdisk: Path) -> None:
    """One slice, each host with other shards: partners keep them for each other, 0 with 1 and 2 with 3."""
    losses = {
        **{f"host {host}": [[host]] for host in range(4)},
        "one of each pair": [[0, 3]],
        "both of a pair": [[2, 3]],
        "one after the other": [[0], [1], [2], [3]],
    }
    told = stories_of(ramdisk, 1, 4, losses, {"local_checkpoint_copies": 2})
    for life in told.pop("both of a pair"):
        assert [r["start"] for r in life] == [10] * 4, "only the persistent step is left"
    for name, lives in told.items():
        for life in lives:
            assert [r.get("start") for r in life] == [14] * 4, (name, life)
    (life,) = told["host 1"]
    assert [r["counters"]["fetched_bytes"] > 0 for r in life] == [False, True, False, False]
    assert {r["counters"]["survives_host_losses"] for r in life} == {1}


def test_slices_keep_copies_for_each_other_where_the_state_is_sharded_over_them_too(ramdisk: Path) -> None:
    """Two slices that hold different halves: each keeps the other's."""
    flags = {"local_checkpoint_copies": 2, "cut": "all"}
    told = lives_after(ramdisk, 2, 2, [[0, 1], [2, 3], [0, 3]], **flags)
    for name, life in told.items():
        assert [r.get("start") for r in life] == [14] * 4, (name, life)
        assert {r["counters"]["survives_slice_losses"] for r in life} == {1}


@pytest.mark.long
def test_without_copies_the_loss_of_a_host_of_such_a_state_costs_its_newest_step(ramdisk: Path) -> None:
    (life,) = lives_after(ramdisk, 2, 2, [[3]], cut="all").values()
    assert [r["start"] for r in life] == [10] * 4
    assert {r["counters"]["survives_host_losses"] for r in life} == {0}


def test_an_agent_that_is_killed_while_the_job_runs_costs_the_copies_of_one_save(ramdisk: Path) -> None:
    """It is started again when others need it next, and they ask anew where it is."""
    flags = {"local_checkpoint_copies": 2, "checkpoint_period": 1000, "local_checkpoint_period": 1}
    with Job(train, 2, str(ramdisk), 1, 1_000_000, flags) as running:
        running.wait_for_line(0, "complete 3")
        (agent,) = agents_of(ramdisk / "ramdisk_1")
        agent.kill()
        killed_at = len(running.lines(0))

        def goes_on() -> bool:
            complete = {line.split()[-1] for line in running.lines(0)[killed_at:] if line.startswith("step")}
            return len(complete - {"None"}) >= 6

        running.wait_until(lambda: goes_on() or running.failed, timedelta(seconds=60))
        assert not running.failed, running.describe()
        (again,) = agents_of(ramdisk / "ramdisk_1")
        assert again.pid != agent.pid
