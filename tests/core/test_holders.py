"""Blocks of shards: those that the same lists hold lie in one, and holders say the same as the lists."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.holders import ShardHolders
from emergency_ckpt.core.shard_table import HeldShards

SHARDS = 12


@given(st.lists(st.sets(st.integers(0, SHARDS - 1)), max_size=6))
def test_shards_lie_in_one_block_where_the_same_processes_hold_them(held: list[set[int]]) -> None:
    holders = ShardHolders(HeldShards.of([sorted(each) for each in held]), SHARDS)
    expected = [tuple(p for p, each in enumerate(held) if shard in each) for shard in range(SHARDS)]
    assert list(holders) == expected
    assert holders[:3] == tuple(expected[:3])
    assert len(holders.processes) == len(set(expected))
    blocks = list(holders.of_blocks())
    assert sorted(shard for _, shards in blocks for shard in shards.tolist()) == list(range(SHARDS))
    for processes, shards in blocks:
        assert shards.tolist() == sorted(shards.tolist())
        assert {expected[shard] for shard in shards.tolist()} == {processes}
