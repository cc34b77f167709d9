"""A job of one process that never joined `jax.distributed` hears of notices as well."""

from __future__ import annotations

import time
from pathlib import Path

from jax.sharding import Mesh

from emergency_ckpt import CheckpointManager, Config
from tests.manager.states import make_state


def test_without_agents_a_process_watches_by_itself_and_reacts_at_one_step(
    mesh: Mesh, ramdisk: Path, tmp_path: Path
) -> None:
    notice = tmp_path / "notice"
    config = Config(
        run_name="job",
        base_output_directory=str(tmp_path / "bucket"),
        enable_checkpointing=True,
        enable_emergency_checkpoint=True,
        local_checkpoint_directory=str(ramdisk),
        local_checkpoint_period=1000,
        checkpoint_period=1000,
        checkpoint_agent="off",
        enable_autocheckpoint=True,
        preemption_sources="gce-preempted,aws",
        preemption_notice_file=str(notice),
    )
    with CheckpointManager.from_config(config, mesh, make_state(mesh, 0)) as manager:
        assert manager.save(1, make_state(mesh, 1)), "the first step"
        assert not manager.reached_preemption(1)
        notice.write_text('{"kind": "migrate"}')
        wait_for(manager, 1)
        assert not manager.save(2, make_state(mesh, 2)), "a host that is only moved"
        notice.write_text('{"seconds": 30, "detail": "drained by an operator"}')
        wait_for(manager, 2)
        assert manager.save(3, make_state(mesh, 3))
        assert manager.reached_preemption(3)
        assert not manager.reached_preemption(4), "once for one notice"
        manager.wait_until_finished()
        assert {1, 3} >= set(manager.all_steps()) >= {3}
        heard = manager.notices[1]
        assert (heard.source, heard.kind, heard.detail) == ("file", "terminate", "drained by an operator")
        assert heard.deadline is not None


def wait_for(manager: CheckpointManager, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(manager.notices) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
