"""The hosts of a mesh as places: which positions each one has, and the mesh in which they stand otherwise.

A place is what stays when hosts move: a set of positions of the mesh's array. Worked out from plain arrays, so
that devices are touched only to be put in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from emergency_ckpt.core.arrangement import MeshPlace, Place, Standing
from emergency_ckpt.jaxio.topology import axis_position, slices_of

_Cells = tuple[tuple[int, int], ...]


def place_in(mesh: jax.sharding.Mesh, process: int) -> MeshPlace:
    """The place of a process in `mesh`."""
    owners = _owners(mesh).reshape(-1)
    return MeshPlace(mesh.devices.shape, tuple(np.flatnonzero(owners == process).tolist()))


class MeshPlaces:
    """The places of all processes in a mesh."""

    def __init__(self, mesh: jax.sharding.Mesh, replica_axis: int | str, process_count: int) -> None:
        """Raises TopologyError for a mesh that is not made of all processes' devices."""
        self._mesh = mesh
        self._axis = axis_position(mesh, replica_axis)
        self._shape = mesh.devices.shape
        owners = _owners(mesh)
        rows = self._as_rows(owners)
        process_slice = slices_of(owners, self._axis, process_count)
        slice_of_row = [process_slice[row[0]] for row in rows]
        self._rows = [
            [row for row, each in enumerate(slice_of_row) if each == s] for s in range(max(process_slice) + 1)
        ]
        # Of each position of the array its slice, and its cell there: (row among those of the slice, column).
        self._cell_of: dict[int, tuple[int, tuple[int, int]]] = {}
        positions = self._as_rows(np.arange(owners.size).reshape(self._shape))
        cells: list[list[tuple[int, int]]] = [[] for _ in range(process_count)]
        for slice_index, of_slice in enumerate(self._rows):
            for rank, row in enumerate(of_slice):
                for column, position in enumerate(positions[row].tolist()):
                    self._cell_of[position] = slice_index, (rank, column)
                    cells[rows[row, column]].append((rank, column))
        self._cells: list[_Cells] = [tuple(sorted(each)) for each in cells]
        self._spots = {each: number for number, each in enumerate(sorted(set(self._cells)))}
        forms: dict[_Cells, int] = {}
        self.standing = Standing(
            places=tuple(Place(process_slice[p], self._spots[each]) for p, each in enumerate(self._cells)),
            slice_rows=tuple(map(len, self._rows)),
            spot_forms=tuple(forms.setdefault(_form(each), len(forms)) for each in self._spots),
        )

    def find(self, place: MeshPlace) -> Place | None:
        """The same positions in this mesh; None where it has another shape or no host stands so."""
        if place.shape != self._shape or any(position not in self._cell_of for position in place.positions):
            return None
        found = [self._cell_of[position] for position in place.positions]
        slices = {slice_index for slice_index, _ in found}
        spot = self._spots.get(tuple(sorted(cell for _, cell in found)))
        return None if spot is None or len(slices) != 1 else Place(slices.pop(), spot)

    def arranged(self, places: Sequence[Place]) -> jax.sharding.Mesh:
        """The mesh in which each process stands at its place of these, its devices in their order."""
        before = self._as_rows(self._mesh.devices)
        after = np.empty_like(before)
        spot_cells = list(self._spots)
        for process, (there, here) in enumerate(zip(places, self.standing.places, strict=True)):
            for (rank, column), (old_rank, old_column) in zip(
                spot_cells[there.spot], self._cells[process], strict=True
            ):
                after[self._rows[there.slice][rank], column] = before[
                    self._rows[here.slice][old_rank], old_column
                ]
        shape = list(self._shape)
        shape.insert(0, shape.pop(self._axis))
        devices = np.moveaxis(after.reshape(shape), 0, self._axis)
        return jax.sharding.Mesh(devices, self._mesh.axis_names, axis_types=self._mesh.axis_types)

    def _as_rows(self, array: np.ndarray) -> np.ndarray:
        """One row per index along the replica axis."""
        return np.moveaxis(array, self._axis, 0).reshape(self._shape[self._axis], -1)


def _owners(mesh: jax.sharding.Mesh) -> np.ndarray:
    owners = [device.process_index for device in mesh.devices.flat]
    return np.array(owners, np.int64).reshape(mesh.devices.shape)


def _form(cells: _Cells) -> _Cells:
    """Equal for places that lie alike around different corners."""
    rank, column = (min(cell[axis] for cell in cells) for axis in (0, 1))
    return tuple((r - rank, c - column) for r, c in cells)
