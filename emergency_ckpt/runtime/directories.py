"""Which of the directories on a host's ramdisk each of its processes takes: the one with its own shards."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from emergency_ckpt.core.placement import assign_directories
from emergency_ckpt.jaxio.coordination import Coordinator
from emergency_ckpt.local.claim import directory_identity
from emergency_ckpt.local.replicator import refuse_replicator
from emergency_ckpt.local.store import held_positions
from emergency_ckpt.runtime.agreement import agree


def choose_directory(coordinator: Coordinator, key: str, root: Path, run: str, timeout: timedelta) -> int:
    """The ordinal of this process's directory below `root`, which several processes may share. Collective."""

    def mine() -> str:
        identity = directory_identity(root)
        refuse_replicator(root)
        return identity

    identities: list[str] = agree(coordinator, key, mine, lambda found: found, timeout)
    process = coordinator.process_index
    here = [p for p, identity in enumerate(identities) if identity == identities[process]]
    return assign_directories(held_positions(root, run), here)[process]
