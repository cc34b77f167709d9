"""What slots that should be equal give to a restore, shard by shard: the bytes of the majority.

Each shard is voted on by itself: slots that are wrong in different places make each other good. Most slots win;
of equal numbers the version that is good somewhere, then that of the lowest slice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.replicas import Comparison, Divergence, Fingerprints, find_divergences
from emergency_ckpt.core.values import Value

MOST_VERSIONS = 32
"""Slots with more different contents are not compared shard by shard."""

NOT_THERE = 0
"""In place of the fingerprint of a shard that a slot never got: it has no vote."""


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class SlotOf:
    """One slot of one process, as an inventory names it."""

    step: StepId
    process: int
    layout: str
    position: int


@dataclasses.dataclass(frozen=True, slots=True)
class Replica:
    """A slot that should be equal to others. `missing`: shards that are not good in it, as in `Holding`."""

    slot: SlotOf
    digest: str
    missing: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Outvoted:
    """What of a slot is not what most have.

    Attributes:
      shards: indices into its layout. values: whether its leaves that are no arrays are not.
    """

    shards: frozenset[int] = frozenset()
    values: bool = False

    def __bool__(self) -> bool:
        return bool(self.shards) or self.values


@dataclasses.dataclass(frozen=True)
class DifferingReplicas:
    """Slots of the same shards and one step whose digests differ; ascending."""

    replicas: tuple[Replica, ...]

    @property
    def step(self) -> StepId:
        return self.replicas[0].slot.step

    @property
    def versions(self) -> list[list[Replica]]:
        """Those with equal digests together."""
        found: dict[str, list[Replica]] = {}
        for each in self.replicas:
            found.setdefault(each.digest, []).append(each)
        return list(found.values())

    @property
    def asked(self) -> tuple[SlotOf, ...]:
        """One slot of each version, whose fingerprints tell of all."""
        return tuple(version[0].slot for version in self.versions)


@dataclasses.dataclass(frozen=True)
class Vote:
    """What came of comparing slots.

    Attributes:
      outvoted: of every slot that was compared.
      divergences: the leaves that differ, by name.
    """

    outvoted: Mapping[SlotOf, Outvoted]
    divergences: tuple[Divergence, ...]


def slot_fingerprints(
    layout: Layout, position: int, checksums: Sequence[Sequence[int]], values: Mapping[str, Value]
) -> Fingerprints:
    """One number per shard of a slot, in its order, and one per value.

    `checksums`: of each shard those of its blocks; none where the slot never got it.
    """
    shards = layout.process_shards[position]
    all_of_it = Comparison((), shards, layout.value_leaves)
    found = all_of_it.fingerprints(dict(zip(shards, checksums, strict=True)), values)
    sizes = layout.shard_nbytes
    for place, (shard, blocks) in enumerate(zip(shards, checksums, strict=True)):
        if not blocks and sizes[shard]:
            found[place] = NOT_THERE
    return found


def vote(
    differing: DifferingReplicas,
    layouts: Mapping[str, Layout],
    fingerprints: Mapping[SlotOf, Fingerprints],
    process_slice: Sequence[int],
) -> Vote:
    """Which shards of which slots are not what most have.

    Args:
      layouts: by hash, those that the slots name. They have the same leaves, so that slots of the same shards
        have them in the same order.
      fingerprints: of the slots that were asked, as `slot_fingerprints` gives them.
      process_slice: per process of this job, its slice.

    Raises ValueError for fingerprints that are not of these slots.
    """
    versions = differing.versions
    first = layouts[versions[0][0].slot.layout]
    shards = first.process_shards[versions[0][0].slot.position]
    columns = len(shards) + len(first.value_leaves)
    rows = [fingerprints[version[0].slot] for version in versions]
    if any(row.shape != (columns,) for row in rows):
        raise ValueError(f"fingerprints of {differing.step} are not of {columns} shards and values")
    table = np.stack(rows)
    good = np.stack([_good_in_any(version, layouts, columns) for version in versions])
    ballots = _Ballots(table, good, versions, process_slice)
    lost = ballots.outvoted
    of_values = lost[:, len(shards) :].any(axis=1)
    if of_values.all():  # Each is wrong in another value: values belong together, so one slot's are taken.
        of_values[ballots.best] = False
    outvoted: dict[SlotOf, Outvoted] = {}
    for version, row, values_differ in zip(versions, lost, of_values.tolist(), strict=True):
        places = np.flatnonzero(row[: len(shards)]).tolist()
        for each in version:
            held = layouts[each.slot.layout].process_shards[each.slot.position]
            outvoted[each.slot] = Outvoted(frozenset(held[place] for place in places), values_differ)
    # What a slot never got is no difference.
    shown = np.where(table == NOT_THERE, ballots.winning, table)
    found = {each.slot.process: row for version, row in zip(versions, shown, strict=True) for each in version}
    compared = Comparison(tuple(sorted(found)), shards, first.value_leaves)
    return Vote(outvoted, find_divergences(compared, first, found))


class _Ballots:
    """The versions of each shard or value (columns), and which of them wins.

    Attributes:
      outvoted: per version and column, whether it loses there.
      winning: per column the fingerprint that wins.
      best: the version that most slots have, of several that of the lowest slice.
    """

    def __init__(
        self,
        table: Fingerprints,
        good: npt.NDArray[np.bool_],
        versions: Sequence[Sequence[Replica]],
        process_slice: Sequence[int],
    ) -> None:
        self._weights = [len(version) for version in versions]
        self._lowest = [min(_rank(each, process_slice) for each in version) for version in versions]
        numbers = range(len(versions))
        self.best = min(numbers, key=lambda v: (-self._weights[v], self._lowest[v]))
        # Of each column, per version the first one of the same fingerprint: very few patterns occur.
        same = _first_alike(table)
        patterns = np.concatenate([same, (table == NOT_THERE).astype(np.int8), good.astype(np.int8)])
        unique, inverse = np.unique(patterns, axis=1, return_inverse=True)
        winners = np.array([self._winner(unique[:, i]) for i in range(unique.shape[1])], np.int64)
        winner = winners[inverse.reshape(-1)]
        self.winning = np.take_along_axis(table, winner[None, :], axis=0)[0]
        self.outvoted = (table != self.winning) & (table != NOT_THERE)

    def _winner(self, pattern: npt.NDArray[np.int8]) -> int:
        alike, absent, good = pattern.reshape(3, -1).tolist()
        parties: dict[int, list[int]] = {}
        for version, leader in enumerate(alike):
            if not absent[version]:
                parties.setdefault(leader, []).append(version)
        if not parties:
            return 0

        def standing(leader: int) -> tuple[int, bool, tuple[int, int]]:
            members = parties[leader]
            weight = sum(self._weights[v] for v in members)
            return -weight, not any(good[v] for v in members), min(self._lowest[v] for v in members)

        return min(parties, key=standing)


def _first_alike(table: Fingerprints) -> npt.NDArray[np.int8]:
    first = np.zeros(table.shape, np.int8)
    for version in range(len(table)):
        equal = table[: version + 1] == table[version]
        first[version] = equal.argmax(axis=0)
    return first


def _good_in_any(
    version: Iterable[Replica], layouts: Mapping[str, Layout], columns: int
) -> npt.NDArray[np.bool_]:
    """Per column, whether any slot of a version has it whole."""
    found = np.zeros(columns, np.bool_)
    for each in version:
        held = layouts[each.slot.layout].held.of_process(each.slot.position)
        here = np.ones(columns, np.bool_)
        here[: len(held)] = ~np.isin(held, np.array(each.missing, np.int64))
        found |= here
    return found


def _rank(replica: Replica, process_slice: Sequence[int]) -> tuple[int, int]:
    return process_slice[replica.slot.process], replica.slot.process
