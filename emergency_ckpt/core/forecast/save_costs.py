"""How long saves, restores and repairs take: measured by the user, or assumed from bytes and rates.

Every assumption has a name, so that a result can be printed together with what it rests on.
"""

from __future__ import annotations

import dataclasses

from emergency_ckpt.core.forecast.failures import Kind
from emergency_ckpt.core.forecast.job_shape import JobShape
from emergency_ckpt.core.forecast.sizing import StateSize
from emergency_ckpt.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second; assumptions, all of them.

    Attributes:
      device: from the devices of a host into its memory (several PCIe links).
      seal: copying into the slot and checksums (13 GB/s measured on two cores).
      network: between hosts, per host (2 GB/s measured on one stream of loopback).
      store: to and from the persistent tier, per host. store_total: of all hosts together (Llama 3's storage
        sustained 2 TB/s).
    """

    device: float = 10e9
    seal: float = 10e9
    network: float = 2e9
    store: float = 1e9
    store_total: float = 1e12

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigError(f"a rate of {getattr(self, field.name)} bytes per second ({field.name})")


MOST_SECONDS = 30 * 86400
"""A month: what takes longer is a slip in a unit or a rate."""


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """Seconds.

    Attributes:
      local_blocked: how long a local save stops the training: the copy off the devices.
      local_lag: from then on until the step is complete on all hosts.
      persistent_blocked: how much a persistent save delays it beside the local one, by its drain.
      snapshot: how long all of a host's state takes off the devices: what every save of the others costs.
      persistent_lag: from then on until it is committed: seal and drain.
      one_slice_lag: the same where the hosts of one slice write everything, as Orbax's managers do.
      restart: from a failure until the program is about to restore: noticing, scheduling, compiling.
      repair_host, repair_slice: until there is another host, or slice.
      own_restore: from the own ramdisk. peers_restore: where shards come from other hosts.
      persistent_restore: all of it from the persistent tier.
    """

    local_blocked: float
    local_lag: float
    persistent_blocked: float
    snapshot: float
    persistent_lag: float
    one_slice_lag: float
    restart: float
    repair_host: float
    repair_slice: float
    own_restore: float
    peers_restore: float
    persistent_restore: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) <= MOST_SECONDS:
                raise ConfigError(
                    f"{field.name} is {getattr(self, field.name):g} seconds; expected 0 to {MOST_SECONDS:,}. "
                    "Give what was measured, or the rates that it is assumed from"
                )

    def repair(self, kind: Kind) -> float:
        """Until what failed is replaced."""
        return {
            Kind.PROCESS: 0.0,
            Kind.HOST: self.repair_host,
            Kind.SLICE: self.repair_slice,
            Kind.JOB: self.repair_slice,
        }[kind]


LEAST_BLOCKED = 0.01
"""A save that blocks for no time at all would be made at every step: the floor of what is assumed."""

DRAIN_SLOWS = 0.01
"""Share of its time by which a drain is assumed to slow the training: it takes memory bandwidth and network."""

_AGREEMENT = 0.1
"""Until all processes know that a step is complete (0.08 s measured with two)."""


def assumed_costs(state: StateSize, shape: JobShape, rates: Rates) -> Costs:
    """What follows from the bytes. A restart takes five minutes, another host or slice five more."""
    snapshot = min(state.host_bytes, state.slot_bytes)
    blocked = max(snapshot / rates.device, LEAST_BLOCKED)
    copied = max(0, state.slot_bytes - state.host_bytes)
    own = state.slot_bytes / rates.seal + snapshot / rates.device
    sealed = state.slot_bytes / rates.seal + copied / rates.network + _AGREEMENT
    drained = _store_seconds(state.total_bytes, shape.hosts, rates)
    return Costs(
        local_blocked=blocked,
        local_lag=sealed,
        persistent_blocked=LEAST_BLOCKED + DRAIN_SLOWS * drained,
        snapshot=max(state.host_bytes / rates.device, LEAST_BLOCKED),
        persistent_lag=sealed + drained,
        one_slice_lag=sealed + _store_seconds(state.total_bytes, shape.hosts_per_slice, rates),
        restart=300.0,
        repair_host=300.0,
        repair_slice=300.0,
        own_restore=own,
        peers_restore=own + state.host_bytes / rates.network,
        persistent_restore=own + _store_seconds(state.host_bytes * shape.hosts, shape.hosts, rates),
    )


def _store_seconds(nbytes: int, hosts: int, rates: Rates) -> float:
    return nbytes / min(hosts * rates.store, rates.store_total)
