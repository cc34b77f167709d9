"""Copies: every shard lies in enough failure domains, partners stand in groups, what is told is exact."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.copies import copies_from, gives_copies, survivable, with_copies
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.placement import failure_domains
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.errors import ConfigError


def layout_of(held: list[set[int]], process_slice: tuple[int, ...]) -> Layout:
    """Shards are single elements of one leaf."""
    count = max((s for each in held for s in each), default=0) + 1
    holders = {p: [Shard("w", Box((s,), (s + 1,))) for s in each] for p, each in enumerate(held)}
    return Layout.build([LeafSpec("w", (count,), "float32")], holders, process_slice)


def fully_sharded(slices: int, hosts: int, shards_each: int = 2) -> Layout:
    """Every process holds other shards than all others."""
    held = [set(range(p * shards_each, (p + 1) * shards_each)) for p in range(slices * hosts)]
    return layout_of(held, tuple(s for s in range(slices) for _ in range(hosts)))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    process_slice = tuple(s for s, size in enumerate(sizes) for _ in range(size))
    shards = st.sets(st.integers(0, 7), max_size=5)
    return layout_of([draw(shards) for _ in process_slice], process_slice)


def domains_of(layout: Layout, holders: tuple[int, ...]) -> set[int]:
    domains = failure_domains(layout.process_slice)
    return {domains[p] for p in holders}


@given(layouts(), st.integers(1, 4))
def test_every_shard_lies_in_enough_failure_domains_and_no_more(layout: Layout, copies: int) -> None:
    count = len(set(failure_domains(layout.process_slice)))
    if copies > count:
        with pytest.raises(ConfigError, match=f"local_checkpoint_copies={copies} needs {copies} failure"):
            with_copies(layout, copies)
        return
    storage = with_copies(layout, copies)
    for shard, holders in enumerate(storage.shard_holders):
        natural = layout.shard_holders[shard]
        assert set(natural) <= set(holders)
        assert len(domains_of(layout, holders)) >= copies
        if len(domains_of(layout, natural)) >= copies:
            assert holders == natural, "what is replicated by nature does not travel"
        else:
            assert len(domains_of(layout, holders)) == copies, "no more copies than asked for"


@given(layouts(), st.integers(1, 4))
def test_each_copy_comes_from_one_process_that_has_the_shard_itself(layout: Layout, copies: int) -> None:
    if copies > len(set(failure_domains(layout.process_slice))):
        return
    storage = with_copies(layout, copies)
    givers = {p for q in range(layout.process_count) for p in copies_from(layout, storage, q)}
    for process in range(layout.process_count):
        assert gives_copies(layout, storage, process) == (process in givers)
        coming = copies_from(layout, storage, process)
        received = sorted(s for shards in coming.values() for s in shards)
        assert sorted([*layout.process_shards[process], *received]) == list(storage.process_shards[process])
        for source, shards in coming.items():
            assert source != process
            assert set(shards) <= set(layout.process_shards[source])


def test_a_state_that_is_replicated_over_the_slices_keeps_its_layout() -> None:
    layout = layout_of([{0, 1}, {2, 3}, {0, 1}, {2, 3}], (0, 0, 1, 1))
    assert with_copies(layout, 2) is layout


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_copies_are_spread_evenly_over_equal_slices(copies: int, hosts: int, groups: int) -> None:
    storage = with_copies(fully_sharded(copies * groups, hosts), copies)
    assert {len(shards) for shards in storage.process_shards} == {2 * copies}


@pytest.mark.parametrize("copies", [2, 3])
def test_partners_in_groups_lose_less_than_a_ring_would(copies: int) -> None:
    """Simultaneous failures of as many hosts as there are copies, all of them tried."""
    count = 12
    storage = with_copies(fully_sharded(1, count), copies)
    lost = sum(
        any(set(holders) <= set(failed) for holders in storage.shard_holders)
        for failed in itertools.combinations(range(count), copies)
    )
    assert lost == count // copies, "only where a whole group fails; in a ring it is once per host"


@given(layouts(), st.integers(1, 3))
def test_what_survives_is_exact(layout: Layout, copies: int) -> None:
    domains = failure_domains(layout.process_slice)
    if copies > len(set(domains)) or not layout.shards:
        return
    storage = with_copies(layout, copies)
    told = survivable(storage)

    def survives(failed: set[int]) -> bool:
        return all(set(holders) - failed for holders in storage.shard_holders)

    processes = range(layout.process_count)
    assert all(survives(set(f)) for f in itertools.combinations(processes, told.hosts))
    assert not all(survives(set(f)) for f in itertools.combinations(processes, told.hosts + 1))
    slices = sorted(set(layout.process_slice))
    members = {s: {p for p in processes if layout.process_slice[p] == s} for s in slices}

    def survives_slices(failed: tuple[int, ...]) -> bool:
        return survives(set().union(*(members[s] for s in failed)))

    assert all(map(survives_slices, itertools.combinations(slices, told.slices)))
    assert not all(map(survives_slices, itertools.combinations(slices, told.slices + 1)))


def test_the_figure_is_said_in_words() -> None:
    alone = fully_sharded(1, 2)
    assert survivable(alone).describe() == "does not survive the loss of a host: w[0:1] has one copy"
    two = survivable(with_copies(alone, 2))
    assert two.describe() == "survives the loss of any 1 host"
    three = survivable(layout_of([{0}, {0}, {0}], (0, 1, 2)))
    assert three.describe() == "survives the loss of any 2 hosts or any 2 slices"
