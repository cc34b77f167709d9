"""Uploads: every shard once, by a live holder, spread evenly, equal on every process, or a reason why not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.core.upload_assignment import assign_uploads


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Leaves of any size, each cut into rows that any non-empty set of processes may hold."""
    processes = draw(st.integers(1, 6))
    leaves, holders = [], {process: [] for process in range(processes)}
    for number in range(draw(st.integers(0, 6))):
        rows, columns = draw(st.integers(1, 4)), draw(st.integers(0, 50))
        leaf = LeafSpec(f"leaf{number}", (rows, columns), draw(st.sampled_from(["float32", "int8"])))
        leaves.append(leaf)
        for row in range(rows):
            shard = Shard(leaf.name, Box((row, 0), (row + 1, columns)))
            for process in draw(st.sets(st.integers(0, processes - 1), min_size=1)):
                holders[process].append(shard)
    return Layout.build(leaves, holders, tuple(range(processes)))


@given(layouts(), st.data())
def test_every_shard_is_uploaded_once_by_a_live_holder_or_named_as_missing(
    layout: Layout, data: st.DataObject
) -> None:
    live = data.draw(st.sets(st.integers(0, layout.process_count - 1)))
    lost = [i for i, holders in enumerate(layout.shard_holders) if not live & set(holders)]
    plan = assign_uploads(layout, live)
    assert plan.missing == tuple(lost)
    assert plan.reason
    if lost:
        assert plan.shards is None
        assert str(layout.shards[lost[0]]) in plan.reason
        return
    assert plan.shards is not None
    assert sorted(shard for shards in plan.shards for shard in shards) == list(range(len(layout.shards)))
    for process, shards in enumerate(plan.shards):
        assert list(shards) == sorted(shards)
        assert set(shards) <= set(layout.process_shards[process])
        assert process in live or not shards


@given(layouts(), st.data())
def test_the_order_in_which_holders_are_given_does_not_matter(layout: Layout, data: st.DataObject) -> None:
    live = data.draw(st.permutations(range(layout.process_count)))
    assert assign_uploads(layout, live) == assign_uploads(layout, sorted(live))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_replicated_shards_are_spread_within_one_shard_of_even(sizes: list[int], processes: int) -> None:
    leaves = [LeafSpec(f"leaf{i}", (size,), "int8") for i, size in enumerate(sizes)]
    shards = [Shard(leaf.name, Box.whole(leaf.shape)) for leaf in leaves]
    layout = Layout.build(leaves, dict.fromkeys(range(processes), shards), tuple(range(processes)))
    plan = assign_uploads(layout, range(processes))
    assert plan.shards is not None
    loads = [sum(layout.shard_nbytes[i] for i in held) for held in plan.shards]
    assert max(loads) - min(loads) <= max(sizes)


@given(st.integers(1, 6), st.integers(2, 4), st.integers(1, 10))
def test_all_slices_take_an_equal_share_of_what_they_all_hold(
    processes_per_slice: int, slices: int, leaves_per_slice: int
) -> None:
    specs = [
        LeafSpec(f"leaf{i}", (processes_per_slice, 8), "float32") for i in range(slices * leaves_per_slice)
    ]
    holders = {
        s * processes_per_slice + p: [Shard(leaf.name, Box((p, 0), (p + 1, 8))) for leaf in specs]
        for s in range(slices)
        for p in range(processes_per_slice)
    }
    process_slice = tuple(s for s in range(slices) for _ in range(processes_per_slice))
    plan = assign_uploads(Layout.build(specs, holders, process_slice), holders)
    assert plan.shards is not None
    assert {len(shards) for shards in plan.shards} == {leaves_per_slice}


def test_a_shard_without_a_live_holder_is_named() -> None:
    leaves = [LeafSpec("a", (4,), "int8"), LeafSpec("b", (4,), "int8")]
    a, b = (Shard(leaf.name, Box.whole(leaf.shape)) for leaf in leaves)
    layout = Layout.build(leaves, {0: [a], 1: [a, b]}, (0, 1))
    plan = assign_uploads(layout, [0])
    assert plan.shards is None
    assert plan.reason == "1 of 2 shards have no live holder among 1 processes (first: b[0:4])"
