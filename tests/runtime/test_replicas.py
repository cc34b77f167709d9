"""Simulated jobs: equal replicas cost two keys, and those that differ are named by all that hold them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import pytest

from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import ReplicaDivergenceError
from emergency_ckpt.jaxio.coordination import InMemoryCluster
from emergency_ckpt.jaxio.outcome_agreement import OutcomeAgreement
from emergency_ckpt.jaxio.topology import Topology
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.runtime.replicas import ReplicaComparison
from emergency_ckpt.telemetry.log import CheckpointLogger, LogContext
from emergency_ckpt.telemetry.metrics import Metrics

LIMIT = timedelta(seconds=30)
LEAVES = [LeafSpec("w", (8, 4), "float32"), LeafSpec("scale", (3,), "float32")]


def make_layout(slices: int, hosts: int) -> Layout:
    rows = 8 // hosts
    holders = {
        s * hosts + h: [Shard("w", Box((h * rows, 0), (h * rows + rows, 4))), Shard("scale", Box((0,), (3,)))]
        for s in range(slices)
        for h in range(hosts)
    }
    return Layout.build(LEAVES, holders, tuple(p // hosts for p in range(slices * hosts)), ["lr"])


class Process:
    """One simulated process: its part in the agreement, its comparison, and what it was told."""

    def __init__(
        self, cluster: InMemoryCluster, process: int, layout: Layout, mode: Literal["warn", "raise"]
    ) -> None:
        self.process = process
        self.layout = layout
        coordinator = cluster.coordinator(process)
        self.agreement = OutcomeAgreement(coordinator, 1)
        self.metrics = Metrics()
        self.events: list[dict[str, Any]] = []
        context = LogContext("r", 1, process, layout.process_slice[process])
        log = CheckpointLogger(context, self.metrics, "text", self.events.append)
        hosts = layout.process_count // layout.slice_count
        groups = tuple(tuple(range(h, layout.process_count, hosts)) for h in range(hosts))
        topology = Topology(process, layout.process_slice, groups)
        self.replicas = ReplicaComparison(coordinator, layout, topology, log, LIMIT, mode)

    def save(self, ordinal: int, change: Callable[[Manifest], Manifest]) -> ReplicaDivergenceError | None:
        checksums = tuple((100 + e.shard,) for e in self.layout.slot_entries(self.process))
        step = StepId(1, ordinal + 10)
        manifest = Manifest(
            "r", "n", step, self.layout.hash, self.process, self.layout.process_count, checksums, {"lr": 0.5}
        )
        fingerprints = self.replicas.fingerprints(change(manifest), self.layout)
        published = self.replicas.publish(self.agreement.keys_of(ordinal), fingerprints)
        self.agreement.report_sealed(ordinal)
        assert self.agreement.await_outcome(ordinal, LIMIT).outcome is Outcome.COMPLETE
        return self.replicas.compare(step, published)


Changes = dict[int, Callable[[Manifest], Manifest]]


def with_other_bits(leaf: int, by: int = 1) -> Callable[[Manifest], Manifest]:
    """The shard of this place in the slot has other bits."""

    def change(manifest: Manifest) -> Manifest:
        changed = list(manifest.checksums)
        changed[leaf] = (changed[leaf][0] ^ by,)
        return dataclasses.replace(manifest, checksums=tuple(changed))

    return change


def with_other_value(manifest: Manifest) -> Manifest:
    return dataclasses.replace(manifest, values={"lr": 0.25})


def run(
    slices: int,
    hosts: int,
    changes: Changes,
    mode: Literal["warn", "raise"] = "warn",
    saves: int = 1,
    cluster: InMemoryCluster | None = None,
) -> tuple[list[Process], list[list[ReplicaDivergenceError | None]]]:
    layout = make_layout(slices, hosts)
    cluster = cluster or InMemoryCluster(layout.process_count)
    processes = [Process(cluster, p, layout, mode) for p in range(layout.process_count)]

    def live(each: Process) -> list[ReplicaDivergenceError | None]:
        return [each.save(save, changes.get(each.process, lambda m: m)) for save in range(saves)]

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        return processes, list(pool.map(live, processes))


def lines(processes: list[Process]) -> list[dict[str, Any]]:
    return [event for each in processes for event in each.events]


def test_equal_replicas_are_silent_and_leave_few_keys() -> None:
    cluster = InMemoryCluster(6)
    processes, errors = run(3, 2, {}, "raise", 50, cluster)
    assert lines(processes) == []
    assert errors == [[None] * 50] * 6
    # Of each group one key; those of the last save only.
    assert cluster.key_count() <= 2 + 6 + 2


def test_with_two_slices_both_are_named() -> None:
    processes, _ = run(2, 2, {3: with_other_bits(1)})
    (line,) = lines(processes)
    assert (line["leaf"], line["boxes"], line["step"]) == ("w", ["[4:8, 0:4]"], 10)
    assert (line["deviating"], line["versions"], line["slices"]) == ([], [[1], [3]], [[0], [1]])
    assert "slice 0 (process 1) and slice 1 (process 3) differ, and nothing tells" in line["message"]
    counts = [each.metrics.snapshot() for each in processes]
    assert [c["replica_divergences"] for c in counts] == [0, 1, 0, 1]
    assert [c.get("last_divergent_step") for c in counts] == [None, 10, None, 10]


@pytest.mark.parametrize("deviating", range(3))
def test_with_three_slices_the_one_that_deviates_is_named_whoever_was_first(deviating: int) -> None:
    processes, _ = run(3, 1, {deviating: with_other_bits(0)})
    (line,) = lines(processes)
    others = [p for p in range(3) if p != deviating]
    assert (line["leaf"], line["deviating"]) == ("scale", [deviating])
    assert line["versions"] == [others, [deviating]]
    assert f"not what most have is in slice {deviating} (process {deviating})" in line["message"]


def test_every_leaf_has_a_line_of_its_own_once_per_step() -> None:
    def both(manifest: Manifest) -> Manifest:
        return with_other_value(with_other_bits(1)(with_other_bits(0)(manifest)))

    processes, _ = run(3, 1, {1: both}, saves=2)
    assert sorted((line["step"], line["leaf"]) for line in lines(processes)) == [
        (step, leaf) for step in (10, 11) for leaf in ("lr", "scale", "w")
    ]


def test_all_processes_that_hold_the_copies_raise_and_no_others() -> None:
    _, errors = run(2, 2, {2: with_other_value}, "raise")
    assert [error is not None for (error,) in errors] == [True, False, True, False]
    for error in (errors[0][0], errors[2][0]):
        assert error is not None
        assert (error.step, error.leaves) == (10, ("lr",))
        assert "step 10 (generation 1) was saved with copies that differ in lr" in str(error)
        assert "[0, 2]" in str(error)


def test_one_slice_compares_what_all_of_its_hosts_hold() -> None:
    processes, errors = run(1, 4, {2: with_other_bits(0)}, "raise")
    (line,) = lines(processes)
    assert (line["leaf"], line["deviating"]) == ("scale", [2])
    assert all(error is not None for (error,) in errors)
    assert lines(run(1, 4, {2: with_other_bits(1)})[0]) == []  # Nobody else has these rows.


def test_keys_do_not_grow_however_often_replicas_differ() -> None:
    cluster = InMemoryCluster(4)
    processes, _ = run(4, 1, {1: with_other_bits(0), 3: with_other_bits(0, 2)}, saves=60, cluster=cluster)
    assert len(lines(processes)) == 60
    assert cluster.key_count() <= 16


def test_random_jobs_name_just_those_that_deviate() -> None:
    chance = random.Random(3)
    for _ in range(15):
        slices, hosts = chance.choice([(3, 2), (5, 1), (4, 2)])
        deviating = chance.sample(range(slices), (slices - 1) // 2)
        host = chance.randrange(hosts)
        changes = {s * hosts + host: with_other_bits(1, 1 + s) for s in deviating}
        processes, _ = run(slices, hosts, changes)
        (line,) = lines(processes)
        assert line["deviating"] == sorted(changes)
