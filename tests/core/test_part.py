"""Parts of layouts: the bytes that a part takes are its shards' and no others."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.part import Part
from emergency_ckpt.core.shards import Box, Shard

NAMES = "abcdefg"


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=7), st.sets(st.sampled_from(NAMES)))
def test_ranges_hold_the_shards_of_the_part_and_no_byte_of_another(sizes: list[int], names: set[str]) -> None:
    leaves = [LeafSpec(name, (size,), "uint8") for name, size in zip(NAMES, sizes, strict=False)]
    shards = [Shard(leaf.name, Box.whole(leaf.shape)) for leaf in leaves]
    layout = Layout.build(leaves, {0: shards}, (0,), value_leaves=["x"])
    part = Part(layout, frozenset(names))
    entries, ranges = part.entries(0), part.ranges(0)
    assert [leaf.name for leaf in part.leaves] == [layout.shards[e.shard].leaf for e in entries]
    for entry in layout.slot_entries(0):
        inside = [r for r in ranges if r[0] <= entry.offset and entry.offset + entry.nbytes <= sum(r)]
        touches = [r for r in ranges if entry.offset < sum(r) and r[0] < entry.offset + entry.nbytes]
        assert len(inside) >= 1 if entry in entries else not touches
    assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(ranges))


def test_the_whole_of_a_layout_is_one_range_with_all_values() -> None:
    leaves = [LeafSpec(name, (5000,), "uint8") for name in NAMES]
    layout = Layout.build(leaves, {0: [Shard(n, Box((0,), (5000,))) for n in NAMES]}, (0,), value_leaves=["x"])
    part = Part(layout)
    assert part.is_whole
    assert part.leaves == layout.leaves
    assert part.value_leaves == {"x"}
    assert part.ranges(0) == ((0, layout.slot_entries(0)[-1].offset + 5000),)
