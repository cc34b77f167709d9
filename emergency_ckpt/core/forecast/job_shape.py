"""The shape of a job as far as planning needs it: slices, hosts, and what each holds of the state.

A host stands for one process. A state is either replicated over the slices and sharded over the hosts of
each, or sharded over all hosts.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.placement import failure_domains
from emergency_ckpt.core.shards import Box
from emergency_ckpt.core.storage import storage_layout
from emergency_ckpt.errors import ConfigError

MOST_CHIPS = 100_000
_MOST_HOSTS = 100_000


@dataclasses.dataclass(frozen=True, slots=True)
class JobShape:
    """How many hosts there are, and how the state lies on them.

    Attributes:
      replicated: every slice has the whole state, sharded over its hosts; otherwise no two hosts hold the same.

    Raises ConfigError for sizes that are not positive or beyond what planning is made for.
    """

    slices: int
    hosts_per_slice: int
    chips_per_host: int = 1
    replicated: bool = True

    def __post_init__(self) -> None:
        for name in ("slices", "hosts_per_slice", "chips_per_host"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; a job has one at least")
        if self.hosts > _MOST_HOSTS or self.chips > MOST_CHIPS:
            raise ConfigError(
                f"{self.slices} slices of {self.hosts_per_slice} hosts with {self.chips_per_host} chips are "
                f"{self.chips:,} chips; up to {MOST_CHIPS:,} can be planned, {self.most_slices} such slices"
            )

    @property
    def hosts(self) -> int:
        return self.slices * self.hosts_per_slice

    @property
    def chips(self) -> int:
        return self.hosts * self.chips_per_host

    @property
    def most_slices(self) -> int:
        """How many slices of this size can be planned."""
        return max(MOST_CHIPS // (self.hosts_per_slice * self.chips_per_host), 0)

    @property
    def process_slice(self) -> tuple[int, ...]:
        return tuple(s for s in range(self.slices) for _ in range(self.hosts_per_slice))

    @property
    def natural_copies(self) -> int:
        """In how many slices each shard lies by nature."""
        return self.slices if self.replicated else 1

    @property
    def failure_domains(self) -> int:
        return max(failure_domains(self.process_slice)) + 1

    def hosts_of(self, slice_: int) -> range:
        """The hosts of one slice."""
        return range(slice_ * self.hosts_per_slice, (slice_ + 1) * self.hosts_per_slice)


@dataclasses.dataclass(frozen=True, slots=True)
class Protection:
    """How the local tier keeps steps: `local_checkpoint_max_to_keep`, `_copies` and `_spread`."""

    kept: int = 1
    copies: int = 1
    spreads: bool = False


def device_layout(shape: JobShape, pieces: int = 1) -> Layout:
    """A made-up state of this shape: one leaf, of which each host holds `pieces` shards of one byte."""
    parts = shape.hosts_per_slice if shape.replicated else shape.hosts
    boxes = {
        host: [Box((at * pieces + piece,), (at * pieces + piece + 1,)) for piece in range(pieces)]
        for host in range(shape.hosts)
        for at in (host % parts,)
    }
    return Layout.build_from_boxes(
        [LeafSpec("state", (parts * pieces,), "uint8")], {"state": boxes}, shape.process_slice
    )


@functools.lru_cache(maxsize=8)
def layouts_of(shape: JobShape, copies: int, spreads: bool) -> tuple[Layout, Layout]:
    """(what devices hold, what slots hold) of the made-up state. Raises ConfigError as `storage_layout`."""
    groups = -(-shape.slices // max(1, copies))
    devices = device_layout(shape, groups if spreads and shape.replicated else 1)
    return devices, storage_layout(devices, copies, spreads)


def stored_share(shape: JobShape, protection: Protection) -> float:
    """Bytes of a slot, as a share of what the devices of a host hold.

    Where slices share a replicated state each keeps `copies` of `slices` parts; a state without replicas is
    kept `copies` times. Shards are taken as small: what they leave uneven is one shard.
    """
    copies = max(1, protection.copies)
    if copies > shape.failure_domains:
        what = "slices" if shape.slices > 1 else "hosts"
        raise ConfigError(
            f"local_checkpoint_copies={copies} needs as many failure domains, and this job has "
            f"{shape.failure_domains} {what}; set it to {shape.failure_domains} at most"
        )
    if not shape.replicated or shape.slices == 1:
        return float(copies)
    if protection.spreads:
        return min(1.0, copies / shape.slices)
    return 1.0


def host_bytes(shape: JobShape, total_bytes: int) -> int:
    """What the devices of one host hold of a state of so many bytes, evenly sharded, rounded up."""
    return math.ceil(total_bytes / (shape.hosts_per_slice if shape.replicated else shape.hosts))
