"""What comes back from which loss: groups of hosts restore what the planner of the whole job restores."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_ckpt.core.forecast.job_shape import JobShape, Protection, layouts_of
from emergency_ckpt.core.forecast.recovery import PlannedRecovery, Restored, Source
from emergency_ckpt.core.forecast.simulated_policies import OrbaxEmergency
from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.storage import either


def by_the_whole_job(shape: JobShape, protection: Protection, lost: set[int], persistent: int) -> Restored:
    """The same asked of one planner that knows all hosts; the local step is 2."""
    devices, slots = layouts_of(shape, protection.copies, protection.spreads)
    needed = either(devices, slots)
    held = tuple(
        Inventory(p, (Holding(StepId(1, 2), slots.hash, p, f"{slots.held.kinds[p]}"),))
        for p in range(shape.hosts)
        if p not in lost
    )
    planner = Planner(
        needed,
        tuple((p,) for p in range(shape.hosts)),
        held,
        (StepId(1, persistent),),
        stored=None if slots is needed else slots,
    )
    plan, reason = planner.plan()
    assert plan is not None, reason
    own = all(each.is_whole for each in plan.processes)
    source = Source.PERSISTENT if plan.uses_persistent else Source.OWN if own else Source.PEERS
    return Restored(plan.step.step, source)


@st.composite
def losses(draw: st.DrawFn) -> tuple[JobShape, Protection, set[int]]:
    shape = JobShape(draw(st.integers(1, 5)), draw(st.integers(1, 4)), 1, draw(st.booleans()))
    protection = Protection(1, draw(st.integers(1, min(3, shape.failure_domains))), draw(st.booleans()))
    return shape, protection, draw(st.sets(st.integers(0, shape.hosts - 1)))


@settings(max_examples=150, deadline=None)
@given(losses(), st.sampled_from([1, 2]))
def test_groups_of_hosts_restore_what_the_whole_job_restores(
    case: tuple[JobShape, Protection, set[int]], persistent: int
) -> None:
    shape, protection, lost = case
    found = PlannedRecovery(shape, protection).restore(lost, 2, persistent)
    assert found == by_the_whole_job(shape, protection, lost, persistent)


def test_groups_of_other_slices_that_are_alike_are_planned_once() -> None:
    """Otherwise a job of 100,000 slices asks the planner about 50,000 kinds at every failure."""
    recovery = PlannedRecovery(JobShape(40, 1, replicated=False), Protection(1, 2))
    for host in range(40):
        recovery.restore((host,), 1, 0)
    assert len(recovery._known) <= 3  # pyright: ignore[reportPrivateUsage]


def test_nothing_on_the_ramdisks_or_something_older_comes_from_the_persistent_tier() -> None:
    recovery = PlannedRecovery(JobShape(2, 2), Protection())
    assert recovery.restore((), None, 7) == Restored(7, Source.PERSISTENT)
    assert recovery.restore((), 6, 7) == Restored(7, Source.PERSISTENT)
    assert recovery.restore((), 8, 7) == Restored(8, Source.OWN)


def test_two_lost_hosts_of_two_slices_of_64_cost_what_is_published() -> None:
    """About half of all pairs leave no whole slice; 0.8 % leave a shard without a copy (1 of 127)."""
    shape = JobShape(2, 64)
    recovery = PlannedRecovery(shape, Protection())
    pairs = list(itertools.combinations(range(shape.hosts), 2))
    lost = sum(recovery.restore(pair, 1, 0).source is Source.PERSISTENT for pair in pairs)
    no_whole_slice = sum(len({host // 64 for host in pair}) == 2 for pair in pairs)
    assert lost / len(pairs) == pytest.approx(1 / 127)
    assert no_whole_slice / len(pairs) == pytest.approx(64 / 127)


def test_orbaxs_rule_needs_a_whole_slice_that_is_not_the_first() -> None:
    rule = OrbaxEmergency(JobShape(3, 2))
    assert rule.restore((0, 1), 5, 3) == Restored(5, Source.PEERS)
    assert rule.restore((2,), 5, 3) == Restored(5, Source.PEERS)
    assert rule.restore((2, 4), 5, 3) == Restored(3, Source.PERSISTENT)
    assert OrbaxEmergency(JobShape(2, 2)).restore((2,), 5, 3).source is Source.PERSISTENT
    assert OrbaxEmergency(JobShape(1, 2)).restore((), 5, 3).source is Source.PERSISTENT
