"""Plans on the wire: small, read back as they were, and refused when they are anything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.index_runs import runs_from_json, runs_to_json
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.restore_plan import CommonPlan, PlanOfOne, ProcessPlan, RestorePlan, Strike, Take
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.errors import CorruptDataError

ascending = st.sets(st.integers(0, 10**6), max_size=30).map(sorted).map(tuple)
takes = st.builds(Take, st.integers(0, 3), st.sampled_from(["x" * 32, "y" * 32]), st.integers(0, 9), ascending)
own_plans = st.one_of(
    st.builds(ProcessPlan, st.booleans(), st.lists(takes, max_size=3).map(tuple), ascending),
    st.builds(ProcessPlan, sender=st.integers(0, 3)),
)
keepers = st.one_of(st.none(), st.integers(0, 3))
plans = st.builds(
    RestorePlan,
    st.builds(StepId, st.integers(0, 5), st.integers(0, 10**9)),
    st.tuples(*[own_plans] * 4),
    st.tuples(*[keepers] * 4),
    st.text(max_size=20),
    st.lists(keepers, max_size=9).map(tuple),
)


@given(plans)
def test_each_process_reads_what_was_planned_for_it(plan: RestorePlan) -> None:
    common = json.loads(json.dumps(plan.common_json()))
    assert CommonPlan.from_json(common) == plan.common
    for process, own in enumerate(plan.processes):
        read = PlanOfOne.from_json(process, common, json.loads(json.dumps(plan.process_json(process))))
        assert read == plan.of(process)
        assert read.own == own
        assert read.common.receivers(process) == tuple(
            p for p, each in enumerate(plan.processes) if each.sender == process
        )
    assert plan.common.has_broadcast == any(own.sender is not None for own in plan.processes)
    assert plan.uses_persistent == any(own.persistent for own in plan.processes)


@given(ascending)
def test_indices_come_back_from_runs(indices: tuple[int, ...]) -> None:
    assert runs_from_json(runs_to_json(indices)) == indices


@given(st.integers(0, 10**9), st.integers(4, 10**5), st.integers(1, 10**6))
def test_evenly_spaced_indices_are_one_run(first: int, count: int, step: int) -> None:
    assert runs_to_json(range(first, first + count * step, step)) == [[first, count, step]]


def test_the_common_part_of_a_plan_for_thousands_is_small() -> None:
    count = 4096
    plan = RestorePlan(
        StepId(1, 2),
        tuple(ProcessPlan(sender=p - count // 2 if p >= count // 2 else None) for p in range(count)),
        tuple(p % (count // 2) for p in range(count)),
        "why",
    )
    assert len(json.dumps(plan.common_json())) < 300


hostile = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-2, 2), max_size=3),
    st.just([0, 10**12, 1]),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(plans, st.data())
def test_damaged_plans_are_refused_or_sound(plan: RestorePlan, data: st.DataObject) -> None:
    whole: Any = json.loads(json.dumps([plan.common_json(), plan.process_json(1)]))
    node, key = whole, data.draw(st.integers(0, 1))
    while isinstance(node[key], (list, dict)) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    node[key] = data.draw(hostile)
    try:
        read = PlanOfOne.from_json(1, *whole)
    except CorruptDataError:
        return
    assert all(list(take.shards) == sorted(set(take.shards)) for take in read.own.takes)
    assert all(take.process < len(read.common.senders) for take in read.own.takes)
    assert len(read.common.senders) == len(read.common.extras_from)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (0, "processes", 10**12),
        (0, "senders", [[1, 0]]),
        (0, "senders", [[3, None]]),
        (0, "senders", [[2, 1]]),
        (0, "senders", [[2, -1]]),
        (0, "readers", [2]),
        (0, "readers", [1]),
        (0, "reason", 5),
        (0, "saved_by", 10**12),
        (0, "saved_by", 4),
        (0, "extras_kept", [[3, 0]]),
        (0, "extras_kept", [[1, None]]),
        (1, "takes", [[2, 0, 0, [1]]]),
        (1, "takes", [[0, 1, 0, [1]]]),
        (1, "takes", [[0, 0, 0, [1, 1]]]),
        (1, "takes", [[0, 0, 0, [2, 1]]]),
        (1, "takes", [[0, 0, 0, [[0, 10**12, 1]]]]),
        (1, "takes", [[0, 0, 0, [[0, 4, 0]]]]),
        (1, "takes", [[0, -1, 0, [0]]]),
        (1, "in_place", 1),
        (1, "sender", 0),
        (1, "persistent", [3]),
    ],
)
def test_contradictions_are_refused(part: int, key: str, value: Any) -> None:
    take = Take(0, "h" * 32, 0, (0, 1))
    plan = RestorePlan(
        StepId(1, 2), (ProcessPlan(in_place=True), ProcessPlan(takes=(take,))), (0, 1), "because", (None, 0, 1)
    )
    raw: Any = [plan.common_json(), plan.process_json(1)]
    assert PlanOfOne.from_json(1, *raw) == plan.of(1)
    raw[part][key] = value
    with pytest.raises(CorruptDataError, match="a restore plan cannot be read"):
        PlanOfOne.from_json(1, *raw)


bounds = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted)
shards = st.builds(lambda leaf, b: Shard(leaf, Box((b[0],), (b[1],))), st.text(max_size=3), bounds)


@given(
    st.builds(
        Strike,
        st.builds(StepId, st.integers(0, 5), st.integers(0, 99)),
        st.one_of(st.none(), st.integers(0, 9)),
        st.one_of(st.none(), st.frozensets(shards, max_size=3)),
        st.text(max_size=9),
    )
)
def test_strikes_survive_the_wire(strike: Strike) -> None:
    raw = json.loads(json.dumps(strike.to_json()))
    again = Strike.from_json(raw)
    assert again == strike
    assert again.why == strike.why


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [1, 2, 3, None],
        [1, -2, 3, None, ""],
        [1, 2, "3", None, ""],
        [1, 2, 3, [["w", [4], [0]]], ""],
        [1, 2, 3, [["w", [0]]], ""],
        [1, 2, 3, [[5, [0], [4]]], ""],
        [1, 2, 3, None, None],
    ],
)
def test_what_is_no_strike_is_refused(raw: Any) -> None:
    with pytest.raises(CorruptDataError):
        Strike.from_json(raw)
