"""What slots that should be equal give to a restore, shard by shard: the bytes of the majority.

Each shard is voted on by itself, by all slots that hold it: those that are wrong in different places make each
other good, and slots need not hold the same shards. Most slots win;
of equal numbers the version that is good somewhere, then that of the lowest slice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.replicas import Comparison, Divergence, Fingerprints, find_divergences
from emergency_ckpt.core.values import Value

MOST_VERSIONS = 32
"""What has more different versions is not compared shard by shard."""

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
class Version:
    """What a digest is of, and the digest.

    Copies with both equal are equal; with other digests of the same, they differ; else nothing is known.
    """

    of: Hashable
    digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class Replica:
    """A slot that should be equal to others. `missing`: shards that are not good in it, as in `Holding`."""

    slot: SlotOf
    version: Version
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
    """Slots of one step that have something in common and are not known to be equal in it; ascending.

    Attributes:
      shards: what they have in common: by the hash of each layout that they name, ascending indices into its
        shards. The layouts have the same leaves, so that the same shards have the same order in all.
        None: their leaves that are no arrays.
    """

    replicas: tuple[Replica, ...]
    shards: Mapping[str, tuple[int, ...]] | None

    @property
    def step(self) -> StepId:
        return self.replicas[0].slot.step

    @functools.cached_property
    def versions(self) -> list[list[Replica]]:
        """Those that are known to be equal together."""
        found: dict[Version, list[Replica]] = {}
        for each in self.replicas:
            found.setdefault(each.version, []).append(each)
        return list(found.values())

    @property
    def asked(self) -> tuple[SlotOf, ...]:
        """One slot of each version, whose fingerprints tell of all."""
        return tuple(version[0].slot for version in self.versions)

    @functools.cached_property
    def is_certain(self) -> bool:
        """Whether it is known that some differ, in this or in what their digests are of beside it."""
        found = {each.version for each in self.replicas}
        return len({version.of for version in found}) < len(found)


@dataclasses.dataclass(frozen=True)
class Vote:
    """What came of comparing slots.

    Attributes:
      outvoted: of every slot that was compared.
      divergences: the leaves that differ, by name.
    """

    outvoted: Mapping[SlotOf, Outvoted]
    divergences: tuple[Divergence, ...] = ()


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
    """What of which slots is not what most have.

    Where a slot that was to be asked said nothing, versions count as wholes, if it is known that any differ.

    Args:
      layouts: by hash, those that the slots name.
      fingerprints: by slot, as `slot_fingerprints` gives them.
      process_slice: per process of this job, its slice.

    Raises ValueError for fingerprints that are not of these slots.
    """
    versions = differing.versions
    told = all(slot in fingerprints for slot in differing.asked)
    if not told and not differing.is_certain:
        return Vote({})
    first = layouts[versions[0][0].slot.layout]
    shards = () if differing.shards is None else differing.shards[first.hash]
    columns = len(first.value_leaves) if differing.shards is None else len(shards)
    if told:
        table = np.stack([_columns(differing, slot, layouts, fingerprints[slot]) for slot in differing.asked])
    else:
        table = np.repeat(np.arange(1, len(versions) + 1, dtype=np.uint64)[:, None], columns, axis=1)
    good = np.stack([_good_in_any(version, differing, columns) for version in versions])
    ballots = _Ballots(table, good, versions, process_slice)
    outvoted: dict[SlotOf, Outvoted] = {}
    if differing.shards is None:
        lost = ballots.outvoted.any(axis=1)
        if lost.all():  # Each is wrong in another value: values belong together, so one slot's are taken.
            lost[ballots.best] = False
        for version, is_lost in zip(versions, lost.tolist(), strict=True):
            outvoted.update((each.slot, Outvoted(values=is_lost)) for each in version)
    else:
        for version, row in zip(versions, ballots.outvoted, strict=True):
            places = np.flatnonzero(row).tolist()
            for each in version:
                held = differing.shards[each.slot.layout]
                outvoted[each.slot] = Outvoted(frozenset(held[place] for place in places))
    if not told:
        return Vote(outvoted)
    # What a slot never got is no difference.
    shown = np.where(table == NOT_THERE, ballots.winning, table)
    found = {each.slot.process: row for version, row in zip(versions, shown, strict=True) for each in version}
    values = first.value_leaves if differing.shards is None else ()
    return Vote(outvoted, find_divergences(Comparison(tuple(sorted(found)), shards, values), first, found))


def outvoted_in_any(votes: Iterable[Vote]) -> dict[SlotOf, Outvoted]:
    """Per slot all that was outvoted in it."""
    found: dict[SlotOf, Outvoted] = {}
    for each in votes:
        for slot, outvoted in each.outvoted.items():
            before = found.get(slot, Outvoted())
            found[slot] = Outvoted(before.shards | outvoted.shards, before.values or outvoted.values)
    return found


def _columns(
    differing: DifferingReplicas, slot: SlotOf, layouts: Mapping[str, Layout], fingerprints: Fingerprints
) -> Fingerprints:
    """Those of the fingerprints of a slot that are of what is compared."""
    layout = layouts[slot.layout]
    held = layout.held.of_process(slot.position)
    if fingerprints.shape != (len(held) + len(layout.value_leaves),):
        wanted = f"{len(held)} shards and {len(layout.value_leaves)} values"
        raise ValueError(f"fingerprints of {differing.step} are not of {wanted}")
    if differing.shards is None:
        return fingerprints[len(held) :]
    return fingerprints[np.searchsorted(held, np.array(differing.shards[slot.layout], np.int64))]


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
        # A process that holds the step in two cuts has one vote.
        self._voters = [frozenset(each.slot.process for each in version) for version in versions]
        self._lowest = [min(_rank(each, process_slice) for each in version) for version in versions]
        numbers = range(len(versions))
        self.best = min(numbers, key=lambda v: (-len(self._voters[v]), self._lowest[v]))
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
            weight = len(frozenset[int]().union(*(self._voters[v] for v in members)))
            return -weight, not any(good[v] for v in members), min(self._lowest[v] for v in members)

        return min(parties, key=standing)


def _first_alike(table: Fingerprints) -> npt.NDArray[np.int8]:
    first = np.zeros(table.shape, np.int8)
    for version in range(len(table)):
        equal = table[: version + 1] == table[version]
        first[version] = equal.argmax(axis=0)
    return first


def _good_in_any(
    version: Iterable[Replica], differing: DifferingReplicas, columns: int
) -> npt.NDArray[np.bool_]:
    """Per column, whether any slot of a version has it whole."""
    found = np.full(columns, differing.shards is None)
    for each in version:
        if differing.shards is not None:
            found |= ~np.isin(differing.shards[each.slot.layout], np.array(each.missing, np.int64))
    return found


def _rank(replica: Replica, process_slice: Sequence[int]) -> tuple[int, int]:
    return process_slice[replica.slot.process], replica.slot.process
