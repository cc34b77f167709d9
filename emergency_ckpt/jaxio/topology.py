"""Which slice each process belongs to, and which processes stand at the same place in different slices.

A slice is a failure domain of whole processes: replicas that share a process are one slice. The mapping is
worked out from plain arrays of process indices, so it needs no devices.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from emergency_ckpt.errors import TopologyError


@dataclasses.dataclass(frozen=True)
class Topology:
    """The processes of a job as slices.

    Attributes:
      process_index: this process.
      process_slice: per process, its slice. Slices are numbered in the order of the mesh's replica axis.
      groups: per process of slice 0 (ascending), the processes at the same place of the mesh in every
        slice (`groups[i][s]` is in slice s). None where the processes of different slices do not line up:
        the slices then hold the same state in differently cut pieces, and no slot can be copied whole.
      misalignment: why `groups` is None, for people; otherwise empty.
    """

    process_index: int
    process_slice: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...] | None
    misalignment: str = ""

    @classmethod
    def from_mesh(
        cls,
        mesh: jax.sharding.Mesh,
        replica_axis: int | str,
        process_index: int | None = None,
        process_count: int | None = None,
    ) -> Topology:
        """The topology of `mesh`, whose `replica_axis` (a name or a position) tells replicas apart.

        Local: any process may call it; all get the same answer but for `process_index`.
        Raises TopologyError when the axis does not exist or a process of the job has no device in the mesh.
        """
        grid = np.array([d.process_index for d in mesh.devices.flat], dtype=np.int64).reshape(
            mesh.devices.shape
        )
        return cls.from_process_grid(
            grid,
            axis_position(mesh, replica_axis),
            jax.process_index() if process_index is None else process_index,
            jax.process_count() if process_count is None else process_count,
        )

    @classmethod
    def from_process_grid(
        cls, grid: np.ndarray, replica_axis: int, process_index: int, process_count: int
    ) -> Topology:
        """The same from the index of the process that owns each position of the mesh."""
        process_slice = slices_of(grid, replica_axis, process_count)
        groups, misalignment = counterparts_of(grid, replica_axis, process_slice)
        return cls(process_index, process_slice, groups, misalignment)

    @classmethod
    def single_process(cls) -> Topology:
        """One process that is one slice: a job without a mesh."""
        return cls(0, (0,), ((0,),))

    @property
    def process_count(self) -> int:
        return len(self.process_slice)

    @property
    def slice_count(self) -> int:
        return max(self.process_slice) + 1

    @property
    def slice_index(self) -> int:
        """The slice of this process."""
        return self.process_slice[self.process_index]

    def processes_of(self, slice_index: int) -> tuple[int, ...]:
        """The processes of a slice, ascending."""
        return tuple(p for p, s in enumerate(self.process_slice) if s == slice_index)

    def counterparts(self, process: int) -> tuple[int, ...] | None:
        """Per slice, the process at the place of `process`, itself included; None where they do not line up."""
        if self.groups is None:
            return None
        return next(group for group in self.groups if process in group)


def slices_of(grid: np.ndarray, replica_axis: int, process_count: int) -> tuple[int, ...]:
    """Per process its slice: processes that share an index along the replica axis, directly or through others.

    Raises TopologyError for processes that own no position, or that the job does not have.
    """
    replicas = _replicas(grid, replica_axis)
    _check_processes(replicas, process_count)
    slice_of_replica = list(range(len(replicas)))
    first_replica: dict[int, int] = {}
    for replica, row in enumerate(replicas):
        for process in np.unique(row).tolist():
            earlier = slice_of_replica[first_replica.setdefault(process, replica)]
            mine = slice_of_replica[replica]
            if earlier != mine:
                low, high = sorted((earlier, mine))
                slice_of_replica = [low if s == high else s for s in slice_of_replica]
    number = {s: i for i, s in enumerate(sorted(set(slice_of_replica)))}
    return tuple(number[slice_of_replica[first_replica[p]]] for p in range(process_count))


def counterparts_of(
    grid: np.ndarray, replica_axis: int, process_slice: tuple[int, ...]
) -> tuple[tuple[tuple[int, ...], ...] | None, str]:
    """The groups of processes at equal places of different slices, or None and the reason why not."""
    places: list[list[np.ndarray]] = [[] for _ in range(max(process_slice) + 1)]
    for row in _replicas(grid, replica_axis):
        places[process_slice[row[0]]].append(row)
    replica_counts = [len(rows) for rows in places]
    if len(set(replica_counts)) > 1:
        return None, f"slices hold different numbers of replicas: {replica_counts}"
    first = np.concatenate(places[0])
    columns: list[dict[int, int]] = []
    for index, rows in enumerate(places):
        other = np.concatenate(rows)
        pairs = np.unique(np.stack([first, other]), axis=1)
        for side, name in ((0, 0), (1, index)):
            processes, uses = np.unique(pairs[side], return_counts=True)
            if uses.max() > 1:
                process = int(processes[uses.argmax()])
                partners = pairs[1 - side][pairs[side] == process].tolist()
                return None, (
                    f"process {process} of slice {name} holds places of the mesh that processes {partners} "
                    f"share in slice {index if side == 0 else 0}"
                )
        columns.append(dict(zip(*pairs.tolist(), strict=True)))
    return tuple(tuple(column[p] for column in columns) for p in sorted(columns[0])), ""


def _replicas(grid: np.ndarray, replica_axis: int) -> np.ndarray:
    """The grid as one row of process indices per index along the replica axis."""
    return np.moveaxis(np.asarray(grid), replica_axis, 0).reshape(grid.shape[replica_axis], -1)


def _check_processes(replicas: np.ndarray, process_count: int) -> None:
    present = set(np.unique(replicas).tolist())
    missing = sorted(set(range(process_count)) - present)
    if missing:
        raise TopologyError(
            f"processes {missing} have no device in the mesh, which spans processes {sorted(present)} of "
            f"{process_count}; every process must own a part of the mesh that is checkpointed: build the mesh "
            "from all of jax.devices(), or start only the processes that take part"
        )
    unknown = sorted(present - set(range(process_count)))
    if unknown:
        raise TopologyError(
            f"the mesh has devices of processes {unknown}, but the job has {process_count} processes; "
            "build the mesh after jax.distributed.initialize(), from jax.devices()"
        )


def axis_position(mesh: jax.sharding.Mesh, replica_axis: int | str) -> int:
    """The position of an axis from its name or number, as numpy counts. TopologyError where it is none."""
    names = list(map(str, mesh.axis_names))
    if isinstance(replica_axis, str):
        if replica_axis not in names:
            raise TopologyError(
                f"the mesh has no axis {replica_axis!r}, its axes are {names}; name the one over which the "
                "slices hold equal state"
            )
        return names.index(replica_axis)
    if not -len(names) <= replica_axis < len(names):
        raise TopologyError(
            f"replica axis {replica_axis} is out of range for a mesh of {len(names)} axes {names}; "
            "give a position, from 0 or from the end as -1, or a name"
        )
    return replica_axis % len(names)
