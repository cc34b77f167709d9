"""Extras survive the loss of any two slices (or of any two hosts of a single slice)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.placement import assign_directories, extras_keepers


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_two_lost_slices_never_take_all_copies_along(sizes: list[int]) -> None:
    process_slice = [s for s, size in enumerate(sizes) for _ in range(size)]
    for process, keepers in enumerate(extras_keepers(process_slice)):
        slices = {process_slice[keeper] for keeper in keepers} | {process_slice[process]}
        assert len(slices) == min(3, len(sizes))


@given(st.integers(2, 9))
def test_in_one_slice_other_hosts_keep_them(count: int) -> None:
    for process, keepers in enumerate(extras_keepers([0] * count)):
        assert len({*keepers, process}) == min(3, count)


def test_a_lone_process_has_nobody() -> None:
    assert extras_keepers([0]) == ((),)


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
