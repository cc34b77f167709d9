"""A read that does not end keeps the places that it may still write to, whatever became of the restore."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import CoordinationTimeoutError
from tests.manager.states import OPTIONS, Opener, make_state, save_all


def test_the_own_slot_stays_under_repair_until_the_early_read_of_a_failed_restore_has_ended(
    opened: Opener, mesh: Mesh, tmp_path: Path
) -> None:
    manager = opened()
    save_all(manager, mesh, range(5, 11))
    slot = manager._engine.job.local.sealed(StepId(1, 10))
    assert slot is not None
    slot.shard(slot.layout.process_shards[0][-1])[0] ^= 1
    pipes = [path for path in (tmp_path / "bucket" / "10").glob("default/**/d/*") if path.is_file()]
    for path in pipes:
        path.unlink()
        os.mkfifo(path)  # Whoever opens it to read waits for a writer.
    options = dataclasses.replace(OPTIONS, async_options=ocp.options.AsyncOptions(timeout_secs=1))
    manager = opened(options=options)
    early, local = manager._engine._restorer.early, manager._engine.job.local
    assert early is not None

    def is_repaired() -> bool:
        return any(slot.repairing for slot in local._held.table.slots)

    with pytest.raises(CoordinationTimeoutError, match="has not ended within 1 s"):
        manager.restore_or_init(lambda: make_state(mesh, 0))
    assert not early.ended.is_set()
    assert is_repaired()
    while not early.ended.wait(0.01):
        for path in pipes:
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:  # Nobody reads it at this moment.
                continue
    early._thread.join(60)
    assert not is_repaired()
