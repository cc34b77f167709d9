"""A mesh over the devices of this process, and managers on one ramdisk, one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from emergency_ckpt import (
    CheckpointManager,
    CheckpointManagerOptions,
)
from emergency_ckpt.runtime.settings import AGENT_VARIABLE, Settings
from tests.manager.states import OPTIONS, Opener, make_state


@pytest.fixture(autouse=True)
def _without_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drains run in this process: starting an agent for each manager would take longer than most tests."""
    monkeypatch.setenv(AGENT_VARIABLE, "off")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that stands still no save is skipped, where a test does not say how long saves wait."""
    start = CheckpointManager._start

    def start_patiently(self: CheckpointManager, settings: Settings, *args: Any) -> None:
        if settings.slot_wait == timedelta(seconds=1):
            settings = dataclasses.replace(settings, slot_wait=timedelta(seconds=30))
        start(self, settings, *args)

    monkeypatch.setattr(CheckpointManager, "_start", start_patiently)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("replica", "fsdp"))


@pytest.fixture
def opened(mesh: Mesh, ramdisk: Path, tmp_path: Path) -> Iterator[Opener]:
    """Opens managers on one ramdisk directory and one persistent directory, one after the other."""
    managers: list[CheckpointManager] = []

    def open_manager(
        state: Any = None, options: CheckpointManagerOptions = OPTIONS, **kwargs: Any
    ) -> CheckpointManager:
        for manager in managers:
            manager.close()
        abstract = make_state(mesh, 0) if state is None else state
        managers.append(
            CheckpointManager(ramdisk, tmp_path / "bucket", mesh, abstract, options=options, **kwargs)
        )
        return managers[-1]

    yield open_manager
    for manager in managers:
        manager.close()
