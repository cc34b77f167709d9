"""Lives of a job of three slices whose hydration begins before a restore is called, and what became of it.

Nothing is timed: a story goes on when the early work has ended, or when the source it reads from stands still.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from emergency_ckpt import CheckpointManager
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.options import AgentOptions
from emergency_ckpt.agent.record import agent_directory, read_record
from emergency_ckpt.agent.starting import ensure_agent
from emergency_ckpt.runtime.early import EarlyHydration
from tests.agent.served import LIMIT, CuttingProxy
from tests.integration.training_job import flip_newest, make_config, make_mesh, make_state

SLICES, ROWS = 3, 2048
LOST = 2  # the process that loses its ramdisk
_CUT_AFTER = 400_000  # of its megabyte from each source: in the middle of a shard


def live_early(root: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """What this process saw in each story; each begins with a ramdisk that process `LOST` lost."""
    trained = Path(root) / "trained"
    manager, mesh = _begin(trained)
    manager.restore_or_init(lambda: make_state(mesh, 0, ROWS))
    for step in (10, 12, 14):
        assert manager.save(step, make_state(mesh, step, ROWS), extras=_extras(step))
        manager.wait_until_finished()
    manager.close()
    told = {}
    for name in names:
        place = Path(root) / name
        mine = f"ramdisk_{jax.process_index()}"
        keeps = range(_KEPT.get(name, LOST))
        if jax.process_index() in keeps:
            shutil.copytree(trained / mine, place / mine, ignore=shutil.ignore_patterns("agent.*"))
        if jax.process_index() == 0:
            shutil.copytree(trained / "bucket", place / "bucket")
        _meet(name)
        told[name] = _STORIES[name](place)
        _meet(f"{name} ends")
    return told


def _restores(place: Path) -> dict[str, Any]:
    """A restore once the early work has ended."""
    manager, mesh = _begin(place)
    early = _early(manager)
    begun = early is not None and jax.process_index() in early._who
    if early is not None:
        assert early.wait(LIMIT)
    said = {"begun": begun, "thread": early is not None, "ready": early.ready_bytes if early else 0}
    _restore(manager, mesh, None, 14)
    return {**said, **_ended(manager)}


def _loses_shards(place: Path) -> dict[str, Any]:
    """Not the whole ramdisk, but one shard of the slot."""
    if jax.process_index() == 1:
        flip_newest(place, 1, 1)
    _meet("flipped")
    return _restores(place)


def _restores_from_store(place: Path) -> dict[str, Any]:
    """All ramdisks are lost: everything, extras included, comes from the persistent tier."""
    manager, mesh = _begin(place)
    early = _early(manager)
    assert early is not None
    assert early.wait(LIMIT)
    ready = early.ready_bytes
    _restore(manager, mesh, None, 10)
    return {"ready": ready, **_ended(manager)}


def _restores_older(place: Path) -> dict[str, Any]:
    manager, mesh = _begin(place)
    early = _early(manager)
    if early is not None:
        assert early.wait(LIMIT)
    _restore(manager, mesh, 10, 10)
    _restore(manager, mesh, None, 14)
    return _ended(manager)


def _reloads(place: Path) -> dict[str, Any]:
    """What was begun is given up, and begun anew; a part that is read meanwhile does not disturb it."""
    manager, mesh = _begin(place)
    first = _early(manager)
    manager.reload()
    again = _early(manager)
    if again is not None:
        assert again.wait(LIMIT)
        assert again is not first
    _restore(manager, mesh, None, 14)
    return _ended(manager)


def _never_restores(place: Path) -> dict[str, Any]:
    """Trains on from somewhere else and saves, while a source stands still."""
    with _source(place, stands_still=True) as source:
        manager, mesh = _begin(place, _SOURCE_FLAGS)
        early = _early(manager)
        if source is not None:
            assert source.reached.wait(60)
        _meet("stands still")
        running = early is not None and not early.ended.is_set()
        assert manager.save(16, make_state(mesh, 16, ROWS), extras=_extras(16))
        manager.wait_until_finished()
        thread = early is not None and early._thread.is_alive()
        return {
            "running": running,
            "thread": thread,
            "complete": manager.latest_complete_step(),
            **_ended(manager),
        }


def _closes(place: Path) -> dict[str, Any]:
    """Is closed while a source stands still; the next manager restores."""
    with _source(place, stands_still=True) as source:
        manager, _ = _begin(place, _SOURCE_FLAGS)
        early = _early(manager)
        if source is not None:
            assert source.reached.wait(60)
        _meet("stands still, too")
        manager.close()
        thread = early is not None and early._thread.is_alive()
    _meet("closed")
    manager, mesh = _begin(place)
    _restore(manager, mesh, None, 14)
    return {"thread": thread, **_ended(manager)}


def _loses_source(place: Path) -> dict[str, Any]:
    """The agent of process 0 dies in the middle of what it sends."""
    with _source(place, stands_still=False):
        manager, mesh = _begin(place, _SOURCE_FLAGS)
        early = _early(manager)
        if early is not None:
            assert early.wait(LIMIT)
        ready = early.ready_bytes if early is not None else 0
        _meet("lost")
        _restore(manager, mesh, None, 14)
        return {"ready": ready, **_ended(manager)}


_STORIES = {
    "nothing lost": _restores,
    "a ramdisk lost": _restores,
    "a shard lost": _loses_shards,
    "all lost": _restores_from_store,
    "an older step": _restores_older,
    "reload": _reloads,
    "never restores": _never_restores,
    "closes": _closes,
    "a source lost": _loses_source,
    "the only source lost": _loses_source,
}
# How many processes keep their ramdisks, where it is not all but the last one.
_KEPT = {"all lost": 0, "nothing lost": SLICES, "the only source lost": 1}


class _Source(CuttingProxy):
    """Stands before an agent, and stands still or kills it in the middle of its first large answer."""

    def __init__(self, endpoint: Endpoint, pid: int, stands_still: bool) -> None:
        self.reached = threading.Event()
        self._released = threading.Event()
        self._pid = pid
        self._stands_still = stands_still
        super().__init__(endpoint, _CUT_AFTER)

    def listen(self) -> socket.socket:
        return socket.create_server((_ADVERTISED, self._target[1]))

    def cut(self) -> None:
        self.reached.set()
        if self._stands_still:
            assert self._released.wait(60)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def __exit__(self, *raised: object) -> None:
        self._released.set()
        super().__exit__(*raised)


_LISTENS, _ADVERTISED = "127.0.0.1", "127.0.0.2"
_SOURCE_FLAGS = {
    "on_process": {
        "0": {
            "checkpoint_agent_bind_address": _LISTENS,
            "checkpoint_agent_advertise_address": _ADVERTISED,
        }
    }
}


@contextlib.contextmanager
def _source(place: Path, stands_still: bool) -> Iterator[_Source | None]:
    """On process 0: its agent, with something in between for all others."""
    if jax.process_index() != 0:
        yield None
        return
    ramdisk = place / "ramdisk_0"
    endpoint = ensure_agent(ramdisk, AgentOptions(bind=_LISTENS, advertise=_ADVERTISED, idle_seconds=20), LIMIT)
    record = read_record(agent_directory(ramdisk))
    assert record is not None
    with _Source(Endpoint(_LISTENS, endpoint.port, endpoint.token), record.pid, stands_still) as source:
        yield source


def _begin(place: Path, flags: dict[str, Any] | None = None) -> tuple[CheckpointManager, jax.sharding.Mesh]:
    mesh = make_mesh(SLICES)
    state = make_state(mesh, 0, ROWS)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    return CheckpointManager.from_config(make_config(str(place), flags or {}), mesh, abstract), mesh


def _early(manager: CheckpointManager) -> EarlyHydration | None:
    return manager._engine._restorer.early


def _extras(step: int) -> dict[str, Any]:
    return {"data": {"position": 100 * step + jax.process_index()}}


class _Position:
    def set_state(self, state: Any) -> None:
        self.state = state


def _restore(manager: CheckpointManager, mesh: jax.sharding.Mesh, step: int | None, right: int) -> None:
    position = _Position()
    if step is None:
        restored = manager.restore_or_init(lambda: make_state(mesh, 0, ROWS), {"data": position})
        assert restored.step == right
        assert position.state == _extras(right)["data"]
        state = restored.state
    else:
        state = manager.restore(step)["state"]
    for found, wanted in zip(
        jax.tree.leaves(state), jax.tree.leaves(make_state(mesh, right, ROWS)), strict=True
    ):
        for a, b in zip(found.addressable_shards, wanted.addressable_shards, strict=True):
            assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()


def _ended(manager: CheckpointManager) -> dict[str, Any]:
    """Closes the manager; what it says, and the steps that this ramdisk has."""
    local = manager._engine.job.local
    slots = [str(step) for step in local.sealed_steps()]
    unsettled = local._held.table.unsettled()
    counters = manager.metrics_snapshot()
    threads = [t.name for t in threading.enumerate() if t.name == "emergency_ckpt early"]
    manager.close()
    return {"slots": slots, "unsettled": unsettled, "threads": threads, **counters}


def _meet(name: str) -> None:
    multihost_utils.sync_global_devices(name)
