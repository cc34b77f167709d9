"""A deleted step no longer speaks for overwriting older ones, and another run's step is overwritten last."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.slots import Outcome, SlotTable

outcomes = st.sampled_from([Outcome.COMPLETE, Outcome.ABANDONED, None])


@given(st.lists(outcomes, min_size=2, max_size=5), st.integers(1, 3), st.data())
def test_the_newest_step_that_is_left_is_protected_after_newer_ones_are_deleted(
    found: list[Outcome | None], max_to_keep: int, data: st.DataObject
) -> None:
    steps = [StepId(1, number) for number in range(len(found))]
    table = SlotTable.recovered(steps, max_to_keep)
    for step, outcome in zip(steps, found, strict=True):
        table = table.settle(step, outcome) if outcome else table
    deleted = data.draw(st.sets(st.sampled_from(steps)))
    for step in deleted:
        index = table.find(step)
        assert index is not None
        table = table.empty(index).forget(step)
    kept = [
        step
        for step, outcome in zip(steps, found, strict=True)
        if outcome is Outcome.COMPLETE and step not in deleted
    ]
    assert table.newest_complete() == max(kept, default=None)
    for step in sorted(kept)[-max_to_keep:]:
        index = table.find(step)
        assert index is not None
        assert table.protection(index) is not None


def test_a_step_can_be_saved_again_after_it_was_forgotten() -> None:
    table = SlotTable.recovered([StepId(1, 1), None], 1).settle(StepId(1, 1), Outcome.COMPLETE)
    table = table.empty(0).forget(StepId(1, 1))
    assert table.newest_complete() is None
    _, index, _ = table.begin(StepId(1, 1))
    assert index is not None


def test_a_slot_of_another_run_is_taken_when_no_other_is_free() -> None:
    table = SlotTable.recovered([None, None, None], 1, foreign={0, 2})
    taken: list[int | None] = []
    for number in range(4):
        table, index, _ = table.begin(StepId(1, number))
        taken.append(index)
        if index is not None:
            table = table.seal(index)
    assert taken == [1, 0, 2, None]
    table = SlotTable.recovered([None, None, None], 1, foreign={0})
    for number in range(6):
        table, index, _ = table.begin(StepId(1, number))
        assert index in (1, 2)
        table = table.seal(index).settle(StepId(1, number), Outcome.COMPLETE)
    assert table.slots[0].foreign


def test_a_step_that_is_being_written_is_not_begun_again() -> None:
    table = SlotTable.recovered([None, None, None], 1)
    table, index, _ = table.begin(StepId(1, 1))
    same, second, reason = table.begin(StepId(1, 1))
    assert (same, second) == (table, None)
    assert reason == f"step 1 (generation 1) is being written in slot {index} already"
    assert index is not None
    assert table.fail(index).begin(StepId(1, 1))[1] is not None


def test_a_slot_without_memory_is_left_out_and_named_where_no_other_is_free() -> None:
    table = SlotTable.recovered([StepId(1, 1), StepId(1, 2), None], 1)
    table = table.settle(StepId(1, 2), Outcome.COMPLETE)
    assert table.begin(StepId(1, 3))[1] == 2
    assert table.begin(StepId(1, 3), unusable={2: "slot 2 has no memory"})[1] == 0
    _, index, reason = table.begin(StepId(1, 3), unusable={0: "slot 0 has none", 2: "slot 2 has no memory"})
    assert index is None
    assert "slot 2 has no memory" in reason
    assert "slot 0 has none" in reason
