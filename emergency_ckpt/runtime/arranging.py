"""Arranging a mesh before there is a manager: all processes say what their ramdisks hold, process 0 decides.

Only manifests are read, no lock is taken and nothing is written: an arrangement is a wish, and whatever is told
wrongly here costs bytes on the network and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax

from emergency_ckpt.core.arrangement import HeldStep, MeshPlace, Place, arrange
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.jaxio.coordination import Coordinator, open_coordinator
from emergency_ckpt.jaxio.mesh_places import MeshPlaces
from emergency_ckpt.local.claim import SUBDIRECTORY
from emergency_ckpt.local.recovery import sealed_of_run
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.runtime.agreement import agree, tell
from emergency_ckpt.runtime.directories import choose_directory
from emergency_ckpt.telemetry.log import CheckpointLogger, LogContext
from emergency_ckpt.telemetry.metrics import Metrics

_MOST_STEPS = 8
"""How many steps each process tells of, the newest."""


def arrange_by_ramdisks(
    mesh: jax.sharding.Mesh,
    local_directory: Path,
    persistent_directory: str | os.PathLike[str],
    replica_axis: int | str,
    move_hosts: bool,
    timeout: timedelta,
) -> jax.sharding.Mesh:
    """The mesh in which hosts stand where their shards are needed. Collective; see `arrange_mesh`."""
    coordinator = open_coordinator()
    count = coordinator.process_count
    places = MeshPlaces(mesh, replica_axis, count)
    if count == 1:
        return mesh
    log = CheckpointLogger(LogContext(None, None, coordinator.process_index, None), Metrics())

    def known_run() -> str:
        # Looked at only: a run begins with its first manager.
        return PersistentStore(persistent_directory).known_run_id()

    run = tell(coordinator, "arrange/run", known_run, timeout)
    if not run:
        return mesh
    ordinal = choose_directory(coordinator, "arrange/host", local_directory, run, timeout)
    directory = local_directory.resolve() / SUBDIRECTORY / str(ordinal)
    decided = _decide(coordinator, places, directory, run, move_hosts, timeout)
    if coordinator.process_index == 0:
        log.info("arrange", decided["step"], decided["reason"])
    if decided["places"] is None:
        return mesh
    return places.arranged([Place(slice_index, spot) for slice_index, spot in decided["places"]])


def _decide(
    coordinator: Coordinator,
    places: MeshPlaces,
    directory: Path,
    run: str,
    move_hosts: bool,
    timeout: timedelta,
) -> Any:
    def decide(said: Sequence[Any]) -> Any:
        held = [[_held(places, row, len(said)) for row in rows] for rows in said]
        found = arrange(places.standing, held, move_hosts=move_hosts)
        moved = found.moved(places.standing)
        return {
            "step": found.step.step if found.step else None,
            "reason": found.reason,
            "places": [[place.slice, place.spot] for place in found.places] if moved else None,
        }

    return agree(coordinator, "arrange/held", lambda: _told(directory, run), decide, timeout)


def _told(directory: Path, run: str) -> list[Any]:
    """What this process tells of each of its newest slots."""
    sealed = sorted(sealed_of_run(directory, run), key=lambda found: found[0].step, reverse=True)
    return [
        [
            [m.step.generation, m.step.step],
            m.digest,
            nbytes,
            [m.place.shape, m.place.positions] if m.place else None,
            m.position,
            m.process_count,
        ]
        for m, nbytes in sealed[:_MOST_STEPS]
    ]


def _held(places: MeshPlaces, row: Any, process_count: int) -> HeldStep:
    (generation, step), digest, nbytes, place, position, saved_count = row
    found: Place | None = None
    if place is not None:
        shape, positions = place
        found = places.find(MeshPlace(tuple(shape), tuple(positions)))
    elif saved_count == process_count:
        # An earlier version saved it, whose processes stood in the order of their indices.
        found = places.standing.places[position]
    return HeldStep(StepId(generation, step), digest, nbytes, found)
