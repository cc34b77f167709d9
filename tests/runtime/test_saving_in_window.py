"""A save through the window, as on accelerators: in the slot when the call returns, whatever happens then."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt.core.schedule import Due
from emergency_ckpt.errors import UnsupportedStateError
from emergency_ckpt.runtime.engine import Engine
from emergency_ckpt.runtime.saving import SaveContent
from emergency_ckpt.runtime.settings import Settings, settings_from_config
from tests.jaxio.states import filled
from tests.manager.states import assert_same, flags

NO_WAIT = timedelta(0)


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("replica", "fsdp"))


@pytest.fixture
def settings(ramdisk: Path, tmp_path: Path) -> Settings:
    return dataclasses.replace(settings_from_config(flags(ramdisk, tmp_path)), host_platforms=())


def make_state(mesh: Mesh, seed: int) -> dict[str, Any]:
    """5 MiB, most of it in one leaf: many windows."""
    cut = NamedSharding(mesh, P("fsdp"))
    return {"w": filled((1024, 1200), "float32", cut, seed), "b": filled((4, 3), "int4", cut, seed)}


def content(state: Any) -> SaveContent:
    return SaveContent(state, None, {})


def test_a_state_that_is_donated_right_after_the_call_is_saved(mesh: Mesh, settings: Settings) -> None:
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    engine = Engine(settings, mesh, make_state(mesh, 0))
    for step in (1, 2):
        state = make_state(mesh, step)
        assert engine.save(step, Due(local=True, persistent=False), lambda s=state: content(s), NO_WAIT)
        jax.block_until_ready(overwrite(state))
    engine.close()
    engine = Engine(settings, mesh, make_state(mesh, 0))
    assert_same(engine.restore(None).state, make_state(mesh, 2))
    engine.close()


def test_a_state_that_was_donated_before_is_refused_and_the_next_one_saved(
    mesh: Mesh, settings: Settings
) -> None:
    engine = Engine(settings, mesh, make_state(mesh, 0))
    state = make_state(mesh, 1)
    state["w"].delete()
    with pytest.raises(UnsupportedStateError, match=r"'w'.*donated"):
        engine.save(1, Due(local=True, persistent=False), lambda: content(state), NO_WAIT)
    assert engine.save(2, Due(local=True, persistent=False), lambda: content(make_state(mesh, 2)), NO_WAIT)
    engine.wait()
    assert engine.newest_complete is not None
    assert engine.newest_complete.step == 2
    engine.close()
