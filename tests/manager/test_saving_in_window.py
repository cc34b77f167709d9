"""A save through the window, as on accelerators: in the slot when the call returns, whatever happens then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt import CheckpointManager
from emergency_ckpt.errors import UnsupportedStateError
from emergency_ckpt.runtime.settings import settings_from_config
from tests.jaxio.states import filled
from tests.manager.states import assert_same, flags

Opener = Callable[[], CheckpointManager]


@pytest.fixture
def opened(mesh: Mesh, ramdisk: Path, tmp_path: Path) -> Iterator[Opener]:
    """Managers for which CPU devices stand in for accelerators, one after the other."""
    managers: list[CheckpointManager] = []

    def open_manager() -> CheckpointManager:
        for manager in managers:
            manager.close()
        settings = dataclasses.replace(settings_from_config(flags(ramdisk, tmp_path)), host_platforms=())
        managers.append(CheckpointManager.__new__(CheckpointManager))
        managers[-1]._start(settings, mesh, make_state(mesh, 0))
        return managers[-1]

    yield open_manager
    for manager in managers:
        manager.close()


def make_state(mesh: Mesh, seed: int) -> dict[str, Any]:
    """5 MiB, most of it in one leaf: many windows."""
    cut = NamedSharding(mesh, P("fsdp"))
    return {"w": filled((1024, 1200), "float32", cut, seed), "b": filled((4, 3), "int4", cut, seed)}


def test_a_state_that_is_donated_right_after_the_call_is_saved(mesh: Mesh, opened: Opener) -> None:
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    manager = opened()
    for step in (1, 2):
        state = make_state(mesh, step)
        assert manager.save(step, state)
        jax.block_until_ready(overwrite(state))
    assert_same(opened().restore(None)["state"], make_state(mesh, 2))


def test_a_state_that_was_donated_before_is_refused_and_the_next_one_saved(mesh: Mesh, opened: Opener) -> None:
    manager = opened()
    state = make_state(mesh, 1)
    state["w"].delete()
    with pytest.raises(UnsupportedStateError, match=r"'w'.*donated"):
        manager.save(1, state)
    assert manager.save(2, make_state(mesh, 2))
    manager.wait_until_finished()
    assert manager.latest_complete_step() == 2
