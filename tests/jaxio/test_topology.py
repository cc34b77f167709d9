"""Slices and counterparts, from arrays of process indices and from real meshes."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.errors import TopologyError
from emergency_ckpt.jaxio.topology import Topology, counterparts_of, slices_of


@st.composite
def process_grids(draw):
    """A mesh of 1 to 4 axes whose positions belong to any of its processes, and its replica axis."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    size = int(np.prod(shape))
    owners = draw(st.lists(st.integers(0, draw(st.integers(0, 7))), min_size=size, max_size=size))
    _, grid = np.unique(np.array(owners), return_inverse=True)
    return grid.reshape(shape), draw(st.integers(0, len(shape) - 1))


@st.composite
def aligned_grids(draw):
    """Equal slices: every replica is cut among its own processes in the same way."""
    replicas, places, order = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.randoms())
    cut = draw(st.lists(st.integers(0, 2), min_size=places, max_size=places))
    _, cut = np.unique(np.array(cut), return_inverse=True)
    per_slice = cut.max() + 1
    names = list(range(replicas * per_slice))
    order.shuffle(names)
    return np.array([[names[r * per_slice + c] for c in cut] for r in range(replicas)])


def together(grid, axis):
    """Oracle: the pairs of processes that are in one slice, by repeated joining until nothing changes."""
    groups = [set(np.take(grid, r, axis).flat) for r in range(grid.shape[axis])]
    changed = True
    while changed:
        changed = False
        for a, b in itertools.combinations(range(len(groups)), 2):
            if groups[a] & groups[b] and groups[a] != groups[b]:
                groups[a] = groups[b] = groups[a] | groups[b]
                changed = True
    return {(p, q) for group in groups for p in group for q in group}


@given(process_grids())
def test_processes_are_in_one_slice_exactly_when_replicas_connect_them(case):
    grid, axis = case
    count = int(grid.max()) + 1
    slices = slices_of(grid, axis, count)
    found = {(p, q) for p in range(count) for q in range(count) if slices[p] == slices[q]}
    assert found == together(grid, axis)


@given(process_grids())
def test_slices_are_numbered_without_gaps_along_the_replica_axis(case):
    grid, axis = case
    slices = slices_of(grid, axis, int(grid.max()) + 1)
    met = [slices[np.take(grid, r, axis).flat[0]] for r in range(grid.shape[axis])]
    assert list(dict.fromkeys(met)) == list(range(max(slices) + 1))


@given(process_grids())
def test_counterparts_hold_the_same_places_of_the_mesh(case):
    grid, axis = case
    topology = Topology.from_process_grid(grid, axis, 0, int(grid.max()) + 1)
    if topology.groups is None:
        assert topology.misalignment
        assert topology.counterparts(0) is None
        return
    replicas = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)

    def places(process):
        return set(np.nonzero(replicas == process)[1].tolist())

    for process in range(topology.process_count):
        group = topology.counterparts(process)
        assert group is not None
        assert [topology.process_slice[p] for p in group] == list(range(topology.slice_count))
        assert process in group
        assert all(places(p) == places(process) for p in group)


@given(aligned_grids())
def test_equally_cut_slices_always_line_up(grid):
    count = int(grid.max()) + 1
    groups, reason = counterparts_of(grid, 0, slices_of(grid, 0, count))
    assert reason == ""
    assert groups is not None
    assert sorted(p for group in groups for p in group) == list(range(count))


def test_a_process_that_holds_two_replicas_joins_them_into_one_slice():
    grid = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    topology = Topology.from_process_grid(grid, 0, 3, 4)
    assert topology.process_slice == (0, 0, 1, 1)
    assert topology.groups == ((0, 2), (1, 3))
    assert topology.slice_index == 1
    assert topology.processes_of(1) == (2, 3)


def test_differently_cut_slices_give_a_reason_that_names_the_processes():
    grid = np.array([[0, 0, 1, 1], [2, 3, 3, 3]])
    groups, reason = counterparts_of(grid, 0, slices_of(grid, 0, 4))
    assert groups is None
    assert "process 0 of slice 0" in reason
    assert "[2, 3]" in reason


def test_slices_of_different_numbers_of_replicas_do_not_line_up():
    groups, reason = counterparts_of(np.array([[0], [0], [1]]), 0, (0, 1))
    assert groups is None
    assert "[2, 1]" in reason


def test_processes_outside_the_mesh_are_named():
    with pytest.raises(TopologyError, match=r"processes \[2, 4\] have no device in the mesh"):
        slices_of(np.array([[0, 1], [3, 5]]), 0, 6)


def test_devices_of_processes_that_the_job_does_not_have_are_refused():
    with pytest.raises(TopologyError, match=r"processes \[7\]"):
        slices_of(np.array([0, 7]), 0, 1)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3, "data", "fsdp", "tensor"])
def test_one_process_with_all_devices_is_one_slice_whatever_the_axis(axis):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    topology = Topology.from_mesh(mesh, axis)
    assert topology == Topology.single_process()
    assert (topology.process_count, topology.slice_count) == (1, 1)


@pytest.mark.parametrize("axis", ["replica", 2, -3])
def test_an_axis_that_the_mesh_does_not_have_is_refused_with_the_ones_it_has(axis):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    with pytest.raises(TopologyError, match=r"data.*fsdp"):
        Topology.from_mesh(mesh, axis)
