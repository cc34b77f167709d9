"""How large a ramdisk has to be, and whether the memory of a host has room for it.

The rule is the one that guides of MaxText and of GKE's multi-tier checkpointing give (12 bytes per parameter,
over the hosts of a slice, times the slots, and 10 to 15 % more), with the slots that this package really
allocates.
"""

from __future__ import annotations

import dataclasses
import math

from emergency_ckpt.core.forecast.job_shape import JobShape, Protection, host_bytes, stored_share
from emergency_ckpt.core.machines import GIB, MIB, gke_reserved_bytes

BYTES_PER_PARAMETER = 12
"""Weights and both moments of Adam, four bytes each (MaxText's guide to emergency checkpointing)."""

BUFFER = 0.15
"""Room beside the slots: the upper end of what that guide calls good practice, 10 to 15 %."""

SNAPSHOT_WINDOW = 0.05
"""Share of a host's bytes that a save needs beside the slots (docs/how-it-works.md)."""


@dataclasses.dataclass(frozen=True, slots=True)
class StateSize:
    """Bytes of a state: all of it once, what the devices of the fullest host hold, and what its slots hold.

    `source`: where the figures are from, in words.
    """

    total_bytes: int
    host_bytes: int
    slot_bytes: int
    source: str

    @property
    def gathered_bytes(self) -> int:
        """What a restore holds in ordinary memory, where slots have only a part (`local_checkpoint_spread`)."""
        return max(0, self.host_bytes - self.slot_bytes)


def evenly_sharded(total_bytes: int, shape: JobShape, protection: Protection, source: str) -> StateSize:
    """The size of a state that lies evenly on the hosts. Raises ConfigError for copies that cannot be."""
    held = host_bytes(shape, total_bytes)
    return StateSize(total_bytes, held, math.ceil(held * stored_share(shape, protection)), source)


def slots_wanted(kept: int, drains: bool) -> int:
    """One per kept step, one to write, and one that a drain may hold meanwhile."""
    return kept + 1 + (1 if drains else 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Ramdisk:
    """A ramdisk of a host: its slots, and the size to ask for."""

    slot_bytes: int
    slots: int
    buffer: float = BUFFER

    @property
    def needed_bytes(self) -> int:
        """Slots and buffer."""
        return math.ceil(self.slot_bytes * self.slots * (1 + self.buffer))

    @property
    def least_mib(self) -> int:
        """The same in whole MiB, rounded up."""
        return max(1, -(-self.needed_bytes // MIB))

    def asked_mib(self, most_bytes: int | None = None) -> int:
        """A round number of MiB that is enough; the exact one where the round one exceeds `most_bytes`."""
        rounded = round_up(self.least_mib)
        return self.least_mib if most_bytes is not None and rounded * MIB > most_bytes else rounded


def round_up(number: int) -> int:
    """The next multiple of 1, 2 or 5 times a power of ten that adds at most a tenth: 57,578 gives 60,000."""
    step = 1
    for candidate in (factor * 10**power for power in range(len(str(number))) for factor in (1, 2, 5)):
        if candidate <= number / 10:
            step = candidate
    return -(-number // step) * step


def quantity(mib: int) -> str:
    """As XPK (`--mtc-ramdisk-size`), GKE and Kubernetes take it: `60000Mi`."""
    return f"{mib}Mi"


@dataclasses.dataclass(frozen=True, slots=True)
class HostMemory:
    """What the memory of a host is for, beside the ramdisk.

    Attributes:
      memory_bytes: all of it.
      reserved_bytes: what Kubernetes keeps.
      trainer_bytes: what the training program, its input pipeline and the system need.
      window_bytes: what saves and restores of this package need in ordinary memory.
    """

    memory_bytes: int
    reserved_bytes: int
    trainer_bytes: int
    window_bytes: int

    @property
    def for_ramdisk(self) -> int:
        """What is left; may be negative."""
        return self.memory_bytes - self.reserved_bytes - self.trainer_bytes - self.window_bytes


TRAINER_SHARE = 0.1
LEAST_TRAINER_BYTES = 16 * GIB


def host_memory(
    memory_bytes: int, state: StateSize, trainer_bytes: int | None = None, is_on_gke: bool = True
) -> HostMemory:
    """The memory of a host that trains with this state.

    `trainer_bytes` None: a tenth of the memory, 16 GiB at least, which is a guess and nothing more.
    """
    guess = max(int(memory_bytes * TRAINER_SHARE), LEAST_TRAINER_BYTES)
    return HostMemory(
        memory_bytes,
        gke_reserved_bytes(memory_bytes) if is_on_gke else 0,
        guess if trainer_bytes is None else trainer_bytes,
        max(state.gathered_bytes, math.ceil(state.host_bytes * SNAPSHOT_WINDOW)),
    )
