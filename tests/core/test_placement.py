"""Extras survive the loss of any one slice (or of any one host of a single slice)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.placement import assign_directories, extras_keepers


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_a_lost_slice_never_takes_both_copies_along(sizes: list[int]) -> None:
    process_slice = [s for s, size in enumerate(sizes) for _ in range(size)]
    for process, keeper in enumerate(extras_keepers(process_slice)):
        assert keeper is not None
        assert process_slice[keeper] != process_slice[process]


@given(st.integers(2, 9))
def test_in_one_slice_another_host_keeps_them(count: int) -> None:
    keepers = extras_keepers([0] * count)
    assert all(keeper is not None and keeper != p for p, keeper in enumerate(keepers))


def test_a_lone_process_has_nobody() -> None:
    assert extras_keepers([0]) == (None,)


@given(
    st.dictionaries(st.integers(0, 6), st.none() | st.integers(0, 5), max_size=5),
    st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True),
)
def test_each_process_takes_a_directory_of_its_own_and_the_one_with_its_shards(
    held: dict[int, int | None], processes: list[int]
) -> None:
    assigned = assign_directories(held, processes)
    assert sorted(assigned) == sorted(processes)
    assert len(set(assigned.values())) == len(processes)
    for process in processes:
        own = [ordinal for ordinal, position in held.items() if position == process]
        if own:
            assert assigned[process] == min(own)


def test_processes_that_found_nothing_take_over_what_nobody_claims() -> None:
    assert assign_directories({0: 7, 1: 3}, [3, 4]) == {3: 1, 4: 0}
