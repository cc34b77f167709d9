"""Which step agents drain without their trainers: the newest that is whole somewhere, extras included."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.flush import Copy, Flush, choose_flush
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.core.upload_assignment import assign_uploads

SLICES, HOSTS = 2, 2


def make_layout() -> Layout:
    """Two slices of two processes: each host has half of the rows, and its counterpart the same."""
    halves = [Shard("w", Box((0, 0), (2, 4))), Shard("w", Box((2, 0), (4, 4)))]
    held = {process: [halves[process % HOSTS]] for process in range(SLICES * HOSTS)}
    return Layout.build([LeafSpec("w", (4, 4), "float32")], held, (0, 0, 1, 1))


LAYOUT = make_layout()
LAYOUTS = {LAYOUT.hash: LAYOUT}


def copy(process: int, step: int, **changes: object) -> Copy:
    digest = f"half {process % HOSTS} of {step}"
    made = Copy(process, StepId(1, step), LAYOUT.hash, process, digest, True, (process,))
    return dataclasses.replace(made, **changes)


def all_of(step: int) -> list[Copy]:
    return [copy(process, step) for process in range(4)]


def test_the_newest_step_that_all_hold_is_drained_by_all_and_committed_by_the_lowest() -> None:
    flush, reason = choose_flush([*all_of(4), *all_of(6)], LAYOUTS, StepId(1, 2))
    assert flush is not None
    assert (flush.step, flush.holders, flush.committer.process) == (StepId(1, 6), (0, 1, 2, 3), 0)
    assert "2 shards" in reason


def test_a_step_that_is_persistent_is_not_drained_nor_any_older_one() -> None:
    flush, reason = choose_flush([*all_of(4), *all_of(6)], LAYOUTS, StepId(1, 6))
    assert flush is None
    assert "step 6 (generation 1) is in the persistent tier" in reason


def test_a_step_that_lacks_a_shard_is_passed_over_for_an_older_one() -> None:
    flush, reason = choose_flush([*all_of(4), copy(0, 6), copy(2, 6)], LAYOUTS, None)
    assert flush is not None
    assert flush.step == StepId(1, 4)
    assert "step 6 (generation 1): 1 of 2 shards have no live holder" in reason


def test_half_of_each_slice_is_enough_where_extras_were_kept_for_the_others() -> None:
    held = [copy(0, 6, extras_of=(0, 2)), copy(3, 6, extras_of=(1, 3))]
    flush, _ = choose_flush(held, LAYOUTS, None)
    assert flush is not None
    assert (flush.holders, flush.committer.process) == ((0, 3), 0)
    flush, reason = choose_flush([copy(0, 6), copy(3, 6)], LAYOUTS, None)
    assert flush is None
    assert "the extras of processes [1, 2] are lost" in reason


def test_a_step_without_extras_needs_none() -> None:
    flush, _ = choose_flush([copy(0, 6, extras_of=()), copy(3, 6, extras_of=())], LAYOUTS, None)
    assert flush is not None


def test_replicas_that_differ_do_not_meet_in_one_step() -> None:
    odd = copy(0, 6, digest="other", extras_of=())
    others = [copy(process, 6, extras_of=()) for process in (1, 2, 3)]
    flush, _ = choose_flush([odd, *others], LAYOUTS, None)
    assert flush is not None
    assert flush.holders in ((0, 1, 3), (1, 2, 3))
    assert len({c.digest for c in flush.copies if c.position % HOSTS == 0}) == 1


def test_slots_that_lack_shards_and_unknown_layouts_do_not_count() -> None:
    damaged = [copy(process, 6, whole=process != 1) for process in range(4)]
    flush, _ = choose_flush([dataclasses.replace(c, extras_of=()) for c in damaged], LAYOUTS, None)
    assert flush is not None
    assert flush.holders == (0, 2, 3)
    flush, reason = choose_flush(all_of(6), {}, None)
    assert flush is None
    assert "its layout cannot be read" in reason
    assert choose_flush([], LAYOUTS, None) == (None, "nothing is sealed")


@given(
    st.lists(
        st.builds(
            lambda process, step, digest, whole: copy(process, step, digest=digest, whole=whole, extras_of=()),
            st.integers(0, 3),
            st.integers(1, 4),
            st.sampled_from("ab"),
            st.booleans(),
        ),
        unique_by=lambda c: (c.process, c.step),
    ),
    st.integers(0, 4),
)
def test_whatever_is_held_what_is_drained_is_covered_newer_and_of_one_content(
    copies: list[Copy], committed: int
) -> None:
    flush, reason = choose_flush(copies, LAYOUTS, StepId(1, committed) if committed else None)
    again, _ = choose_flush(reversed(copies), LAYOUTS, StepId(1, committed) if committed else None)
    assert reason
    assert flush == again
    if flush is None:
        return
    assert flush.step.step > committed
    assert {copy.position % HOSTS for copy in flush.copies} == {0, 1}
    assert list(flush.holders) == sorted(set(flush.holders))
    for half in (0, 1):
        assert len({c.digest for c in flush.copies if c.position % HOSTS == half}) == 1
    assert all(c.whole and c.step == flush.step for c in flush.copies)


def uploaded(flush: Flush) -> dict[int, set[int]]:
    """By process, the shards that it writes."""
    plan = assign_uploads(LAYOUT, flush.holders, flush.leaving)
    assert plan.shards is not None
    return {copy.process: set(plan.shards[copy.position]) for copy in flush.copies}


@given(
    st.sets(st.integers(0, 3)),
    st.sets(st.integers(0, 3)),
    st.dictionaries(st.integers(0, 3), st.sets(st.integers(0, 3))),
)
def test_processes_that_leave_write_only_what_no_other_one_has(
    held: set[int], leaving: set[int], extras: dict[int, set[int]]
) -> None:
    copies = [copy(p, 6, extras_of=tuple(sorted(extras.get(p, set())))) for p in sorted(held)]
    usual, _ = choose_flush(copies, LAYOUTS, None)
    flush, _ = choose_flush(copies, LAYOUTS, None, (), leaving)
    assert (usual is None) == (flush is None)
    if flush is None or usual is None:
        return
    assert flush.step == usual.step
    written = uploaded(flush)
    assert set().union(*written.values()) == set(range(len(LAYOUT.shards)))
    assert sum(map(len, written.values())) == len(LAYOUT.shards)
    for process, shards in written.items():
        for shard in shards if process in leaving else ():
            assert not [p for p in held - leaving if shard in LAYOUT.process_shards[p]]
    # Nothing of the extras is lost, and who leaves is not even asked where it adds nothing.
    assert {o for c in flush.copies for o in c.extras_of} == {o for c in usual.copies for o in c.extras_of}
    staying = {o for c in flush.copies if c.process not in leaving for o in c.extras_of}
    for each in flush.copies:
        if each.process in leaving:
            assert written[each.process] or set(each.extras_of) - staying
    assert flush.committer.process not in leaving or {c.process for c in flush.copies} <= leaving
