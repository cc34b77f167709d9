"""The main job: real processes train, lose what one can lose, and come back bit for bit.

Most stories are told by one job of four processes that opens one manager after the other, because starting JAX
takes far longer than a life of this small job; `check_state` holds every bit of every restored state.
"""

from __future__ import annotations

import random
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from tests.integration.processes import Job, run_job
from tests.integration.training_job import live_through, train, train_until_preempted

# The job that tells the stories has a limit of its own.
pytestmark = pytest.mark.timeout(400)

NO_LOCAL_TIER = {
    "enable_emergency_checkpoint": False,
    "local_checkpoint_directory": "",
    "local_checkpoint_period": 0,
}
FROM_ANOTHER_RUN = {"run_name": "next", "load_full_state_path": "{root}/bucket/job/checkpoints/20"}
ONE_CANNOT_LOAD = {"run_name": "last", "on_process": {"1": {"load_full_state_path": "/nowhere"}}}
ALL = [0, 1, 2, 3]

# Two slices of two processes were trained to step 14: local steps 12 and 14, persistent steps 1 and 10.
STORIES: dict[str, list[dict[str, Any]]] = {
    "nothing_lost": [{"until": 20}],
    "slice_wiped": [{"wipe": [2, 3], "until": 16}, {"wipe": [0, 1], "until": 18}],
    "slice_wiped_without_agents": [{"wipe": [2, 3], "until": 15, "flags": {"checkpoint_agent": "off"}}],
    "slice_wiped_single_replica": [
        {"wipe": [2, 3], "until": 15, "flags": {"enable_single_replica_ckpt_restoring": True}}
    ],
    "slice_wiped_twice_without_a_save": [{"wipe": [2, 3], "until": 14}, {"wipe": [0, 1], "until": 14}],
    "half_of_each_single_replica": [
        {"wipe": [1, 2], "until": 15, "flags": {"enable_single_replica_ckpt_restoring": True}}
    ],
    "half_of_each_slice": [{"wipe": [1, 2], "until": 15}],
    "all_wiped": [{"wipe": ALL, "until": 12}],
    "all_wiped_single_replica": [
        {"wipe": ALL, "until": 12, "flags": {"enable_single_replica_ckpt_restoring": True}}
    ],
    "flipped_bit": [{"flip": [3], "until": 15}],
    "flipped_in_all_copies": [{"flip_all": [1, 3], "until": 20}, {"until": 21}],
    "older_on_request": [
        {"wanted": 10, "until": 11},
        {"until": 14},
        {"wanted": 10, "until": 12},
        {"until": 14},
    ],
    "part": [
        {
            "wipe": [2, 3],
            "parts": [
                (14, "as saved"),
                (1, "as saved"),
                (10, "otherwise"),
                (14, "otherwise"),
                (14, "otherwise on process 1"),
            ],
            "until": 14,
        }
    ],
    "nowhere": [{"wanted": 11, "until": 20}],
    "persistent_damaged": [{"wipe": ALL, "flip_persistent": True, "until": 12}],
    "shard_of_one_place_damaged": [{"wipe": ALL, "flip_shard": {"step": 10, "rows": [8, 16]}, "until": 3}],
    "counterparts_swapped": [{"swap": [[0, 2], [1, 3]], "until": 16}, {"swap": [[0, 2]], "until": 17}],
    "swapped_within_a_slice": [{"swap": [[0, 1]], "until": 16}, {"until": 17}],
    "swapped_within_all_slices": [{"swap": [[0, 1], [2, 3]], "until": 16}, {"until": 17}],
    "swapped_with_nothing_persistent": [
        {"swap": [[0, 1], [2, 3]], "drop_persistent": True, "until": 15},
        {"swap": [[0, 1], [2, 3]], "until": 15},
    ],
    "state_changed": [
        {"rows": 32, "until": 15},
        {"rows": 32, "until": 15, "flags": {"enable_single_replica_ckpt_restoring": True}, "wipe": [1]},
        {"rows": 32, "until": 15, "drop_persistent": True},
        {"until": 15},
    ],
    "slow_drain": [
        {
            "until": 60,
            "hold_commits_until": 40,
            "flags": {
                "local_checkpoint_period": 1,
                "checkpoint_period": 4,
                "local_checkpoint_slot_wait_seconds": 0.01,
            },
        },
        {"until": 61},
    ],
    "one_process_fails": [{"block_lock": [2], "until": 15}],
    "one_save_refused": [{"until": 20, "refused_at": {"process": 1, "step": 18}}, {"until": 20}],
    "every_step": [
        {"until": 60, "flags": {"local_checkpoint_period": 1, "checkpoint_period": 20}},
        {"until": 61},
    ],
    "synchronous": [{"until": 21, "flags": {"async_checkpointing": False}}],
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[dict[str, Any]]]]:
    """Per story, per life, what each process says."""
    trained, root = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("stories")
    first = run_job(train, 4, str(trained), 2, 14, {})
    assert [r["start"] for r in first] == [0] * 4
    assert {r["counters"]["saves_skipped"] for r in first} == {0}
    limit = timedelta(seconds=300)
    answers = run_job(live_through, 4, str(trained), str(root), 2, STORIES, limit=limit)
    return {name: [list(life) for life in zip(*(a[name] for a in answers), strict=True)] for name in STORIES}


def sources(life: list[dict[str, Any]]) -> list[tuple[int, str]]:
    assert not [r for r in life if "error" in r], life
    return [(r["start"], r["source"]) for r in life]


Told = dict[str, list[list[dict[str, Any]]]]


def test_a_restart_with_nothing_lost_reads_only_the_own_ramdisk(told: Told) -> None:
    (life,) = told["nothing_lost"]
    assert sources(life) == [(14, "own slot")] * 4
    assert [r["extras"]["data"]["position"] for r in life] == [1400, 1401, 1402, 1403]
    assert all(r["steps"][-1] == 20 for r in life)


def test_a_slice_that_lost_its_ramdisk_gets_its_shards_from_the_agents_of_the_other(told: Told) -> None:
    first, second = told["slice_wiped"]
    assert sources(first) == [(14, "own slot")] * 2 + [(14, "process 0"), (14, "process 1")]
    assert [r["extras"]["data"]["position"] for r in first] == [1400, 1401, 1402, 1403]
    assert sources(second) == [(16, "process 2"), (16, "process 3")] + [(16, "own slot")] * 2
    # What a process lost is what it fetches; those that lost nothing fetch nothing.
    fetched = [r["counters"]["fetched_bytes"] for r in first]
    assert fetched[:2] == [0, 0]
    assert fetched[2:] == [r["counters"]["restored_bytes"] for r in first[2:]]


def test_without_agents_a_slice_that_lost_its_ramdisk_gets_the_state_by_broadcast(told: Told) -> None:
    (life,) = told["slice_wiped_without_agents"]
    assert sources(life) == [(14, "own slot")] * 2 + [(14, "broadcast from slice 0")] * 2
    assert [r["extras"]["data"]["position"] for r in life] == [1400, 1401, 1402, 1403]
    assert {r["counters"]["fetched_bytes"] for r in life} == {0}


def test_with_single_replica_restoring_one_slice_broadcasts_what_its_ramdisks_hold(told: Told) -> None:
    (life,) = told["slice_wiped_single_replica"]
    assert sources(life) == [(14, "own slot")] * 2 + [(14, "broadcast from slice 0")] * 2


def test_a_restored_slice_is_redundant_before_its_first_save(told: Told) -> None:
    second = told["slice_wiped_twice_without_a_save"][1]
    assert sources(second) == [(14, "process 2"), (14, "process 3")] + [(14, "own slot")] * 2


def test_half_of_each_slice_is_enough(told: Told) -> None:
    (life,) = told["half_of_each_slice"]
    assert sources(life) == [
        (14, "own slot"),
        (14, "process 3"),
        (14, "process 0"),
        (14, "own slot"),
    ]


def test_with_single_replica_restoring_the_sending_slice_gets_what_it_lacks_from_agents(told: Told) -> None:
    (life,) = told["half_of_each_single_replica"]
    assert [start for start, _ in sources(life)] == [14] * 4
    assert sorted(source for _, source in sources(life))[1:] == ["own slot", "own slot", "process 3"]
    assert sorted(source for _, source in sources(life))[0] == "broadcast from slice 0"


def test_with_all_ramdisks_lost_the_persistent_tier_is_read(told: Told) -> None:
    (life,) = told["all_wiped"]
    assert sources(life) == [(10, "persistent")] * 4
    assert [r["extras"]["data"]["position"] for r in life] == [1000, 1001, 1002, 1003]


def test_a_single_replica_reads_the_persistent_tier_and_broadcasts(told: Told) -> None:
    (life,) = told["all_wiped_single_replica"]
    assert sources(life) == [(10, "persistent")] * 2 + [(10, "broadcast from slice 0")] * 2
    assert [r["extras"]["data"]["position"] for r in life] == [1000, 1001, 1002, 1003]


def test_of_a_damaged_slot_only_the_damaged_shard_is_fetched(told: Told) -> None:
    (life,) = told["flipped_bit"]
    assert sources(life) == [(14, "own slot")] * 3 + [(14, "own slot, process 2")]
    assert "process 3 gets 1 shard from process 2" in life[0]["reason"]


def test_damage_in_all_copies_walks_back_and_the_step_is_trained_again(told: Told) -> None:
    first, second = told["flipped_in_all_copies"]
    assert [start for start, _ in sources(first)] == [12] * 4
    assert "step 14: the shards of processes 1, 3 have no survivor" in first[0]["reason"]
    assert sources(second) == [(20, "own slot")] * 4


def test_an_older_step_on_request_voids_the_newer_ones_once_the_run_goes_on_from_it(told: Told) -> None:
    starts = [[start for start, _ in sources(life)] for life in told["older_on_request"]]
    # Nothing is saved at step 11, so that 14 is still there; from the new 12 on, 14 is void.
    assert starts == [[10] * 4, [14] * 4, [10] * 4, [12] * 4]


def test_a_part_is_read_from_every_tier_by_all_processes_and_changes_nothing(told: Told) -> None:
    (life,) = told["part"]
    tiers = [r["parts"][:3] for r in life]
    assert tiers[:2] == [["own slot", "persistent", "own slot, 1 leaves persistent"]] * 2
    assert tiers[2:] == [[f"process {p}", "persistent", f"process {p}, 1 leaves persistent"] for p in (0, 1)]
    for answer in life:
        assert answer["parts"][3].startswith(
            "StateMismatchError: step 14 (generation 1) is on the ramdisks only"
        )
        assert "processes [1] ask for another part of the state than process 0" in answer["parts"][4]
    assert sources(life) == [(14, "own slot")] * 2 + [(14, "process 0"), (14, "process 1")]


def test_a_step_that_is_nowhere_is_refused_with_the_newest_that_is(told: Told) -> None:
    for answer in told["nowhere"][0]:
        assert answer["error"].startswith("NoRestorableStepError: Step 11 cannot be restored")
        assert answer["error"].endswith("The newest restorable step is 14.")


def test_a_damaged_persistent_step_is_refused_not_half_restored(told: Told) -> None:
    for answer in told["persistent_damaged"][0]:
        assert answer["error"].startswith("NoRestorableStepError: No step can be restored: step 10:")


def test_a_persistent_shard_that_some_processes_find_damaged_is_walked_back_from_by_all(told: Told) -> None:
    (life,) = told["shard_of_one_place_damaged"]
    assert sources(life) == [(1, "persistent")] * 4
    for answer in life:
        assert "step 10: the persistent tier is unusable (reading params.w[8:16, 0:300]" in answer["reason"]


def test_hosts_that_changed_places_between_slices_lose_nothing(told: Told) -> None:
    first, second = told["counterparts_swapped"]
    assert sources(first) == [(14, "own slot")] * 4
    assert [r["extras"]["data"]["position"] for r in first] == [1400, 1401, 1402, 1403]
    assert sources(second) == [(16, "own slot")] * 4
    assert [r["extras"]["data"]["position"] for r in second] == [1600, 1601, 1602, 1603]


def test_hosts_that_changed_places_within_a_slice_give_each_other_what_they_have(told: Told) -> None:
    first, second = told["swapped_within_a_slice"]
    assert [start for start, _ in sources(first)] == [14] * 4
    assert [source for _, source in sources(first)][2:] == ["own slot"] * 2
    assert all(source.startswith("own slot, process") for _, source in sources(first)[:2])
    assert [r["extras"]["data"]["position"] for r in first] == [1400, 1401, 1402, 1403]
    assert sources(second) == [(16, "own slot")] * 4


def test_hosts_that_changed_places_within_all_slices_lose_nothing(told: Told) -> None:
    first, second = told["swapped_within_all_slices"]
    assert [start for start, _ in sources(first)] == [14] * 4
    assert all(source.startswith("own slot, process") for _, source in sources(first))
    assert [r["extras"]["data"]["position"] for r in first] == [1400, 1401, 1402, 1403]
    assert sources(second) == [(16, "own slot")] * 4


def test_hosts_on_wrong_places_with_nothing_persistent_lose_nothing(told: Told) -> None:
    first, second = told["swapped_with_nothing_persistent"]
    for life, newest in ((first, 14), (second, 15)):
        assert [start for start, _ in sources(life)] == [newest] * 4
        assert all(source.startswith("own slot, process") for _, source in sources(life)), sources(life)


def test_a_changed_state_names_the_leaves_on_all_processes_and_voids_nothing(told: Told) -> None:
    persistent, broadcast, ramdisks, right = told["state_changed"]
    for answer in [*persistent, *broadcast, *ramdisks]:
        assert answer["error"].startswith("StateMismatchError: ")
        assert "params.half: saved bfloat16[80], wanted bfloat16[160]" in answer["error"]
        assert "params.w: saved float32[16, 300], wanted float32[32, 300]" in answer["error"]
        assert "count" not in answer["error"]
    assert "the ramdisks hold step 14" in ramdisks[0]["error"]
    assert sources(right) == [(14, "own slot"), (14, "process 3"), *[(14, "own slot")] * 2]


def test_saves_that_outrun_the_drains_are_abandoned_alike_and_all_tiers_go_on(told: Told) -> None:
    first, second = told["slow_drain"]
    assert [start for start, _ in sources(first)] == [14] * 4
    ends = [r["counters"]["saves_abandoned"] + r["counters"]["saves_skipped"] for r in first]
    assert ends[0] > 0
    assert ends == [ends[0]] * 4
    assert len({r["counters"]["saves_complete"] for r in first}) == 1
    assert first[0]["counters"]["saves_skipped"] > 0
    assert len(set(first[0]["committed"]) - {1, 10}) >= 1
    assert [start for start, _ in sources(second)] == [first[0]["complete"]] * 4


def test_an_error_of_one_process_is_told_to_all(told: Told) -> None:
    errors = [answer["error"] for answer in told["one_process_fails"][0]]
    assert errors[2].startswith("LocalDirectoryError: cannot write below")
    for process in (0, 1, 3):
        assert errors[process].startswith("PeerFailedError: process 2: cannot write below")


def test_a_save_that_one_process_refuses_is_abandoned_by_all_and_the_next_one_is_whole(told: Told) -> None:
    first, second = told["one_save_refused"]
    assert [r["counters"]["saves_complete"] for r in first] == [2, 2, 2, 2]
    assert [r["counters"]["saves_abandoned"] + r["counters"]["saves_skipped"] for r in first] == [1] * 4
    assert sources(second) == [(20, "own slot")] * 4


def test_saving_at_every_step_keeps_up(told: Told) -> None:
    first, second = told["every_step"]
    assert [start for start, _ in sources(first)] == [14] * 4
    assert sources(second) == [(60, "own slot")] * 4


def test_synchronous_saves_are_sealed_when_the_call_returns(told: Told) -> None:
    assert [r["steps"][-1] for r in told["synchronous"][0]] == [20] * 4


def test_one_slice_of_two_hosts_and_no_local_tier_work_as_well(tmp_path: Path) -> None:
    stories = {
        "one_slice": [{"until": 12}, {"until": 13}, {"wipe": [1], "until": 13}],
        "one_ramdisk_for_both": [{"until": n, "flags": {"shared_ramdisk": True}} for n in (12, 16, 20)]
        + [{"until": 21, "flags": {"shared_ramdisk": True}, "swap_shared": True}],
        "no_local_tier": [
            {"until": 25, "flags": NO_LOCAL_TIER},
            {"until": 26, "flags": NO_LOCAL_TIER},
            {"until": 2, "flags": {**NO_LOCAL_TIER, **FROM_ANOTHER_RUN}, "loaded": 20},
            {"until": 2, "flags": {**NO_LOCAL_TIER, **FROM_ANOTHER_RUN, **ONE_CANNOT_LOAD}, "loaded": 20},
        ],
    }
    answers = run_job(live_through, 2, str(tmp_path / "none"), str(tmp_path), 1, stories)
    one_slice, shared, off = (
        [list(life) for life in zip(*(a[n] for a in answers), strict=True)] for n in stories
    )
    assert sources(one_slice[1]) == [(12, "own slot")] * 2
    # Nobody else has the shards of process 1; process 0 still holds the very step that is persistent.
    assert sources(one_slice[2]) == [(10, "own slot"), (10, "persistent, process 0")]
    assert [sources(life) for life in shared[1:]] == [[(n, "own slot")] * 2 for n in (12, 16, 20)]
    assert off[0][0]["steps"] == [1, 10, 20]
    assert sources(off[1]) == [(20, "persistent")] * 2
    assert [(r["start"], r["steps"]) for r in off[2]] == [(0, [1])] * 2
    assert off[3][0]["error"].startswith("PeerFailedError: process 1: /nowhere does not exist or is empty")
    assert off[3][1]["error"].startswith("PersistentStoreError: /nowhere does not exist or is empty")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))])
def test_sigkill_of_a_slice_at_any_moment_loses_no_complete_step(ramdisk: Path, seed: int) -> None:
    """Whatever step any process said to be complete is restored at least, without the slice that was lost."""
    chance = random.Random(seed)
    victims = chance.choice([(0, 1), (2, 3)])
    with Job(train, 4, str(ramdisk), 2, 10_000, {}, heartbeat_seconds=10) as running:
        running.wait_for_line(0, f"step {chance.randrange(3, 40)} ")
        for victim in victims:
            running.signal(victim, signal.SIGKILL)
        running.wait()
        said = [line.split()[-1] for p in ALL for line in running.lines(p) if line.startswith("step")]
    for victim in victims:
        remove_tree(ramdisk / f"ramdisk_{victim}")
    results = run_job(train, 4, str(ramdisk), 2, 0, {})
    assert results[0]["start"] >= max((int(step) for step in said if step != "None"), default=0)
    assert len({r["start"] for r in results}) == 1


def test_a_sigterm_to_a_job_of_one_process_saves_a_step(ramdisk: Path) -> None:
    with Job(train_until_preempted, 1, str(ramdisk), devices_per_process=2) as running:
        running.wait_for_line(0, "step 5")
        running.signal(0, signal.SIGTERM)
        assert running.wait() == [0], running.describe()
        result = running.result(0)
    step = result["left_at"]
    assert result["steps"][-1] == step
    assert (ramdisk / f"bucket/job/checkpoints/{step}/default").is_dir()
