"""The three ways to checkpoint that a simulation compares, as rules of what comes back after which losses.

They see the same failures; each saves as often as is best for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Protocol

from emergency_ckpt.core.forecast.failures import Failure, FailureModel, Kind, hosts_lost
from emergency_ckpt.core.forecast.intervals import TwoTiers
from emergency_ckpt.core.forecast.job_shape import JobShape
from emergency_ckpt.core.forecast.recovery import PlannedRecovery, Restored, Source
from emergency_ckpt.core.forecast.save_costs import Costs


class Policy(Protocol):
    """A way to checkpoint.

    Attributes:
      name: for people.
      saves_locally: whether there is a local tier.
      hydrates: whether a restore leaves the restored step on every ramdisk, before training goes on.
      drains_from_all: whether all hosts write a persistent step, from the snapshot of the local one; otherwise
        those of one slice do, from a snapshot of its own.
    """

    @property
    def name(self) -> str: ...

    @property
    def saves_locally(self) -> bool: ...

    @property
    def hydrates(self) -> bool: ...

    @property
    def drains_from_all(self) -> bool: ...

    def restore(self, lost: Collection[int], local: int | None, persistent: int) -> Restored:
        """What comes back (see `PlannedRecovery.restore`)."""
        ...


@dataclasses.dataclass(frozen=True)
class PersistentOnly:
    """No local tier: every failure goes back to the newest committed step."""

    name: str = "persistent only"
    saves_locally: bool = False
    hydrates: bool = False
    drains_from_all: bool = False

    def restore(self, lost: Collection[int], local: int | None, persistent: int) -> Restored:
        return Restored(persistent, Source.PERSISTENT)


@dataclasses.dataclass(frozen=True)
class OrbaxEmergency:
    """Orbax's emergency manager: the first slice keeps no local copy, and a step needs one whole other slice.

    That slice then sends to the others. Hosts that were lost have a local copy again after the next local
    save. A job of one slice, or of a state without replicas, has no local tier.
    """

    shape: JobShape
    name: str = "Orbax emergency"
    hydrates: bool = False
    drains_from_all: bool = False

    @property
    def saves_locally(self) -> bool:
        return self.shape.slices > 1 and self.shape.replicated

    def restore(self, lost: Collection[int], local: int | None, persistent: int) -> Restored:
        if not self.saves_locally or local is None or local < persistent:
            return Restored(persistent, Source.PERSISTENT)
        hit = {host // self.shape.hosts_per_slice for host in lost} - {0}
        if len(hit) >= self.shape.slices - 1:
            return Restored(persistent, Source.PERSISTENT)
        return Restored(local, Source.PEERS)


@dataclasses.dataclass(frozen=True)
class ThisPackage:
    """Any survivors that have every shard between them, as the planner of restores decides."""

    recovery: PlannedRecovery
    name: str = "emergency_ckpt"
    saves_locally: bool = True
    hydrates: bool = True
    drains_from_all: bool = True

    def restore(self, lost: Collection[int], local: int | None, persistent: int) -> Restored:
        return self.recovery.restore(lost, local, persistent)


def local_cost(policy: Policy, costs: Costs) -> float:
    """How long a local save stops the training."""
    if not policy.saves_locally:
        return 0.0
    return costs.local_blocked if policy.drains_from_all else costs.snapshot


def persistent_cost(policy: Policy, costs: Costs) -> float:
    """How long a persistent save stops it, beside a local one that may be due."""
    return costs.persistent_blocked + (0.0 if policy.drains_from_all else costs.snapshot)


def persistent_lag(policy: Policy, costs: Costs) -> float:
    """How long a persistent save is under way."""
    return costs.persistent_lag if policy.drains_from_all else costs.one_slice_lag


def restore_seconds(source: Source, costs: Costs) -> float:
    """How long a restore takes that the program has begun."""
    return (costs.own_restore, costs.peers_restore, costs.persistent_restore)[source]


def two_tiers(policy: Policy, model: FailureModel, shape: JobShape, costs: Costs) -> TwoTiers:
    """The closed formulas' view of a policy: what it misses, if one thing fails at a time."""
    shares: dict[Kind, float] = {}
    hit_seconds: dict[Kind, float] = {}
    missed_seconds: dict[Kind, float] = {}
    places = {Kind.PROCESS: 1, Kind.HOST: shape.hosts, Kind.SLICE: shape.slices, Kind.JOB: 1}
    for kind, count in places.items():
        sources = [
            policy.restore(tuple(hosts_lost(Failure(0.0, kind, place), shape)), 1, 0).source
            for place in range(count)
        ]
        missed = sources.count(Source.PERSISTENT)
        until = costs.repair(kind) + costs.restart
        shares[kind] = missed / count
        missed_seconds[kind] = missed * (until + costs.persistent_restore) / count
        hits = [until + restore_seconds(s, costs) for s in sources if s is not Source.PERSISTENT]
        hit_seconds[kind] = sum(hits) / count
    q = model.share(shape, shares)
    return TwoTiers(
        model.mean_seconds(shape),
        q,
        local_cost(policy, costs),
        persistent_cost(policy, costs),
        costs.local_lag,
        persistent_lag(policy, costs),
        model.share(shape, hit_seconds) / (1 - q) if q < 1 else 0.0,
        model.share(shape, missed_seconds) / q if q > 0 else 0.0,
    )
