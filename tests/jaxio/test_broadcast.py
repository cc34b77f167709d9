"""What broadcast does in one process: nothing, or refuse. Real broadcasts are in the integration tests."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from emergency_ckpt.errors import TopologyError
from emergency_ckpt.jaxio.broadcast import Transfer, broadcast_regions


def never(*_: object) -> Any:
    raise AssertionError("nothing is read or written")


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, -1), ("replica", "fsdp"))


class Region:
    """A process's bytes, and which of them were read and written."""

    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []
        self.written: list[int] = []

    def read_window(self, offset: int, length: int) -> np.ndarray:
        self.read.append((offset, length))
        return np.ones(length, np.uint8)

    def write_window(self, offset: int, data: np.ndarray) -> None:
        self.written += range(offset, offset + data.nbytes)


@pytest.mark.parametrize("transfers", [[], [Transfer(0, (), 5, 0)]])
def test_without_bytes_to_send_nothing_happens(mesh: Mesh, transfers: list[Transfer]) -> None:
    region = Region()
    broadcast_regions(mesh, "replica", transfers, region.read_window, region.write_window)
    assert (region.read, region.written) == ([], [])


def test_a_transfer_without_receivers_changes_nothing(mesh: Mesh) -> None:
    region = Region()
    broadcast_regions(mesh, 0, [Transfer(0, (), 20, 10)], region.read_window, region.write_window, 4)
    assert region.written == []
    assert all(offset >= 20 and offset + length <= 30 for offset, length in region.read)


@pytest.mark.parametrize("axis", ["data", 2, -1])
def test_an_axis_that_the_mesh_does_not_have_is_refused(mesh: Mesh, axis: int | str) -> None:
    with pytest.raises(TopologyError, match=r"no axis .*\['replica', 'fsdp'\]"):
        broadcast_regions(mesh, axis, [], never, never)


def test_a_receiver_outside_the_job_is_refused(mesh: Mesh) -> None:
    with pytest.raises(TopologyError, match="process 1 has no device in the mesh"):
        broadcast_regions(mesh, "replica", [Transfer(0, (1,), 0, 10)], never, never)


def test_a_window_without_room_for_a_word_is_refused(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match="window_bytes is 3, at least 4"):
        broadcast_regions(mesh, "replica", [Transfer(0, (), 0, 10)], never, never, window_bytes=3)
