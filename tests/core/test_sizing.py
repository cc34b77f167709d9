"""Ramdisk sizes: the guide's example, what tools take, and that shares of slots are those of real layouts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.forecast.job_shape import JobShape, Protection, layouts_of, stored_share
from emergency_ckpt.core.forecast.sizing import (
    Ramdisk,
    evenly_sharded,
    host_memory,
    quantity,
    round_up,
    slots_wanted,
)
from emergency_ckpt.core.forecast.storage_cost import OBJECT_BYTES, PRICES, monthly_cost, requests_of_save
from emergency_ckpt.core.machines import MIB
from emergency_ckpt.errors import ConfigError
from emergency_ckpt.persistent import arrays


def test_the_guides_example_of_70b_parameters_on_32_hosts() -> None:
    """MaxText: 840 GB, 26.25 GB per host, twice that 52.5 GB, with 15 % some 60 GB: `60000Mi`."""
    state = evenly_sharded(70 * 10**9 * 12, JobShape(2, 32, 4), Protection(), "")
    assert (state.total_bytes, state.host_bytes) == (840 * 10**9, 26_250_000_000)
    guide = Ramdisk(state.slot_bytes, 2)
    assert guide.needed_bytes == pytest.approx(60.375e9, abs=2)
    assert quantity(guide.asked_mib()) == "60000Mi"
    # Drains want a third slot, which the guide does not know.
    assert slots_wanted(1, True) == 3
    assert quantity(Ramdisk(state.slot_bytes, 3).asked_mib()) == "90000Mi"


@given(st.integers(1, 10**9))
def test_round_sizes_are_enough_and_at_most_a_tenth_more(number: int) -> None:
    rounded = round_up(number)
    assert number <= rounded <= number * 1.1
    assert round_up(rounded) <= rounded * 1.1


def test_a_round_size_that_is_too_much_gives_way_to_the_exact_one() -> None:
    ramdisk = Ramdisk(57_578 * MIB, 1, 0.0)
    assert ramdisk.asked_mib(59_000 * MIB) == 57_578
    assert ramdisk.asked_mib(60_000 * MIB) == 60_000


@given(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(1, 5), st.booleans())
def test_slots_are_as_large_as_those_of_the_layout_that_saves_use(
    slices: int, hosts: int, replicated: bool, copies: int, spreads: bool
) -> None:
    shape, protection = JobShape(slices, hosts, 1, replicated), Protection(1, copies, spreads)
    if copies > shape.failure_domains:
        with pytest.raises(ConfigError, match=f"set it to {shape.failure_domains} at most"):
            stored_share(shape, protection)
        return
    devices, slots = layouts_of(shape, copies, spreads)
    held = sum(map(len, devices.process_shards))
    stored = sum(map(len, slots.process_shards))
    assert stored / held == pytest.approx(stored_share(shape, protection))


def test_what_is_left_of_a_hosts_memory_counts_what_a_restore_gathers() -> None:
    shape = JobShape(4, 16, 4)
    whole = evenly_sharded(10**12, shape, Protection(), "")
    spread = evenly_sharded(10**12, shape, Protection(1, 2, True), "")
    assert spread.slot_bytes * 2 == whole.slot_bytes
    assert host_memory(10**12, spread).window_bytes == whole.host_bytes // 2
    assert host_memory(10**12, whole).window_bytes == whole.host_bytes // 20
    assert host_memory(10**12, whole, 7, is_on_gke=False).reserved_bytes == 0


@pytest.mark.parametrize(
    ("gigabytes", "hosts", "writes", "reads"),
    # The table of docs/bucket-rights-and-costs.md, counted on a server.
    [(20, 8, 635, 52), (20, 4096, 16395, 20492), (840, 64, 25291, 332), (840, 512, 26635, 2572)],
)
def test_requests_of_a_save_are_those_that_were_counted(
    gigabytes: int, hosts: int, writes: int, reads: int
) -> None:
    found = requests_of_save(gigabytes * 10**9, hosts)
    assert (found.writes, found.lists, found.reads) == (writes, 16, reads)
    assert OBJECT_BYTES == arrays.OBJECT_BYTES


def test_a_month_costs_what_the_documentation_says() -> None:
    month = monthly_cost(840 * 10**9, 64, 1800, 5, PRICES["s3"])
    assert month.storage == pytest.approx(96.60)
    assert month.requests == pytest.approx(182 * 1460 / 1440, rel=0.01)
    assert monthly_cost(10**9, 1, 3600, None, PRICES["gs"]).kept_bytes == 730 * 10**9
