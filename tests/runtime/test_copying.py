"""Waiting for those of whose shards this process keeps copies."""

from __future__ import annotations

from datetime import timedelta

import pytest

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import CoordinationTimeoutError, PeerFailedError
from emergency_ckpt.jaxio.memory_store import InMemoryCluster, InMemoryCoordinator
from emergency_ckpt.runtime.copying import await_sources

STEP = StepId(1, 7)
LIMIT = timedelta(minutes=5)


class Watched(InMemoryCoordinator):
    """Remembers how long it was to wait for each key."""

    def __init__(self, cluster: InMemoryCluster) -> None:
        super().__init__(cluster, 0, 4)
        self.limits: list[timedelta] = []

    def get(self, key: str, timeout: timedelta) -> bytes:
        self.limits.append(timeout)
        return super().get(key, timeout)


def test_one_time_limit_is_for_all_sources_together() -> None:
    coordinator = Watched(InMemoryCluster(4))
    for process in (1, 2, 3):
        coordinator.put_once(f"save/there/{process}", b"")
    await_sources(coordinator, "save/there", (1, 2, 3), STEP, LIMIT)
    first, second, third = coordinator.limits
    assert LIMIT >= first > second > third


def test_who_gives_no_copy_is_found_out_before_anybody_silent_is_waited_for() -> None:
    coordinator = Watched(InMemoryCluster(4))
    coordinator.put_once("save/there/2", b"withheld")
    with pytest.raises(PeerFailedError, match="process 2 abandoned step 7"):
        await_sources(coordinator, "save/there", (1, 2, 3), STEP, LIMIT)


def test_who_is_silent_is_named() -> None:
    coordinator = Watched(InMemoryCluster(4))
    coordinator.put_once("save/there/1", b"")
    with pytest.raises(CoordinationTimeoutError, match="process 3 did not seal step 7"):
        await_sources(coordinator, "save/there", (1, 3), STEP, timedelta(0))
