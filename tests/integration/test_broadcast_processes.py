"""Broadcast between slices in a real job: four processes with two devices each, as slices in several ways.

Every process checks its own region after each scenario, so a failure names the process and the scenario.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from emergency_ckpt.jaxio.broadcast import Transfer, broadcast_regions
from tests.integration.processes import run_job


@dataclasses.dataclass
class Region:
    """The region of this process: random bytes of its own, and what should be in it after the transfers."""

    data: np.ndarray
    expected: np.ndarray
    reads: int = 0
    writes: int = 0
    largest: int = 0

    @classmethod
    def build(cls, nbytes: int, transfers: list[Transfer]) -> Region:
        data, expected = content(jax.process_index(), nbytes), content(jax.process_index(), nbytes)
        for t in transfers:
            if jax.process_index() in t.receivers:
                expected[t.offset : t.offset + t.nbytes] = content(t.source, nbytes)[t.offset :][: t.nbytes]
        return cls(data, expected)

    def read(self, offset: int, length: int) -> np.ndarray:
        self.reads += 1
        self.largest = max(self.largest, length)
        return self.data[offset : offset + length]

    def write(self, offset: int, window: np.ndarray) -> None:
        self.writes += 1
        self.largest = max(self.largest, len(window))
        self.data[offset : offset + len(window)] = window


def content(process: int, nbytes: int) -> np.ndarray:
    return np.random.default_rng(process).integers(0, 256, nbytes, np.uint8)


def check(mesh: Mesh, axis: str, nbytes: int, transfers: list[Transfer], window_bytes: int) -> Region:
    region = Region.build(nbytes, transfers)
    broadcast_regions(mesh, axis, transfers, region.read, region.write, window_bytes)
    np.testing.assert_array_equal(region.data, region.expected)
    assert region.largest <= window_bytes
    return region


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...], order: tuple[int, ...] | None = None) -> Mesh:
    """Devices by process; `order` transposes a mesh that was laid out slice by slice."""
    devices = np.array(sorted(jax.devices(), key=lambda d: (d.process_index, d.id))).reshape(shape)
    return Mesh(devices if order is None else devices.transpose(order), names)


def one_slice_sends_all() -> None:
    mesh = mesh_of((2, 4), ("replica", "fsdp"))
    region = check(mesh, "replica", 1001, [Transfer(0, (2,), 0, 1001), Transfer(1, (3,), 0, 1001)], 64)
    sends = jax.process_index() in (0, 1)
    assert bool(region.reads) == sends
    assert bool(region.writes) != sends


def each_place_has_its_own_source() -> None:
    mesh = mesh_of((2, 4), ("replica", "fsdp"))
    check(mesh, "replica", 999, [Transfer(0, (2,), 0, 999), Transfer(3, (1,), 0, 500)], 100)


def a_region_has_parts_from_both_slices() -> None:
    mesh = mesh_of((2, 4), ("replica", "fsdp"))
    transfers = [Transfer(0, (2,), 0, 333), Transfer(2, (0,), 333, 101), Transfer(0, (2,), 700, 5)]
    check(mesh, "replica", 1000, transfers, 64)


def a_window_larger_than_the_regions() -> None:
    mesh = mesh_of((2, 4), ("replica", "fsdp"))
    check(mesh, "replica", 7, [Transfer(2, (0,), 0, 7)], 1 << 20)


def the_replica_axis_is_not_first() -> None:
    mesh = mesh_of((2, 2, 2), ("tensor", "replica", "fsdp"), (2, 0, 1))
    check(mesh, "replica", 501, [Transfer(2, (0,), 0, 501), Transfer(1, (3,), 1, 500)], 48)


def four_axes_and_four_slices() -> None:
    mesh = mesh_of((4, 2, 1, 1), ("a", "b", "c", "replica"), (1, 2, 3, 0))
    check(mesh, "replica", 777, [Transfer(1, (0, 2, 3), 0, 777)], 52)


def a_mesh_of_the_replica_axis_alone() -> None:
    mesh = mesh_of((8,), ("replica",))  # each process holds two replicas: they are one slice
    region = check(mesh, "replica", 777, [Transfer(3, (0, 1), 0, 777)], 52)
    assert region.writes == (15 if jax.process_index() < 2 else 0)


def the_user_has_set_a_mesh_and_forbids_transfers() -> None:
    mesh = mesh_of((2, 4), ("replica", "fsdp"))
    other = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(other))
        stack.enter_context(jax.transfer_guard("disallow"))
        check(mesh, "replica", 100, [Transfer(0, (2,), 0, 100)], 64)


def errors_come_at_the_end_and_leave_nobody_waiting() -> None:
    mesh = mesh_of((2, 4), ("replica", "fsdp"))
    region = Region.build(400, [])

    def bad_read(offset: int, length: int) -> np.ndarray:
        if offset < 64:
            raise OSError("unreadable")
        return region.read(offset, length)

    def bad_write(offset: int, window: np.ndarray) -> None:
        if jax.process_index() == 3:
            raise OSError("no room")
        region.write(offset, window)

    transfers = [Transfer(0, (2,), 0, 400), Transfer(1, (3,), 0, 400)]
    read = bad_read if jax.process_index() == 0 else region.read
    raised = ""
    try:
        broadcast_regions(mesh, "replica", transfers, read, bad_write, 64)
    except OSError as error:
        raised = str(error)
    assert raised == {0: "unreadable", 1: "", 2: "", 3: "no room"}[jax.process_index()]
    if jax.process_index() == 2:
        assert not region.data[:64].any()
        np.testing.assert_array_equal(region.data[64:], content(0, 400)[64:])


def nothing_to_send_needs_nobody() -> None:
    if jax.process_index() == 1:
        region = Region.build(10, [])
        broadcast_regions(mesh_of((2, 4), ("replica", "fsdp")), "replica", [], region.read, region.write)


SCENARIOS: list[Callable[[], None]] = [
    one_slice_sends_all,
    each_place_has_its_own_source,
    a_region_has_parts_from_both_slices,
    a_window_larger_than_the_regions,
    the_replica_axis_is_not_first,
    four_axes_and_four_slices,
    a_mesh_of_the_replica_axis_alone,
    the_user_has_set_a_mesh_and_forbids_transfers,
    errors_come_at_the_end_and_leave_nobody_waiting,
    nothing_to_send_needs_nobody,
]


def run_all() -> list[str]:
    for scenario in SCENARIOS:
        print(scenario.__name__, flush=True)
        scenario()
    return [scenario.__name__ for scenario in SCENARIOS]


def test_regions_arrive_bit_for_bit_in_every_scenario() -> None:
    assert run_job(run_all, 4, devices_per_process=2) == [[s.__name__ for s in SCENARIOS]] * 4
