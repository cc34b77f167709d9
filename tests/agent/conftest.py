"""Agents for the tests of this room: none outlives its test, detached though they are."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.cli.launcher.ramdisk import remove_tree
from tests.agent.served import Ramdisk, ending_agents, open_ramdisk, start


@pytest.fixture
def disk(ramdisk: Path) -> Iterator[Ramdisk]:
    """A ramdisk with slots; whatever agent serves it ends with the test."""
    with ending_agents(ramdisk), open_ramdisk(ramdisk) as opened:
        yield opened


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Ramdisk, Endpoint]]:
    """One agent for all tests of a module that change nothing."""
    parent = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="emergency-ckpt-test-", dir=parent if parent.is_dir() else None))
    try:
        with ending_agents(root), open_ramdisk(root) as opened:
            yield opened, start(root)
    finally:
        remove_tree(root)
