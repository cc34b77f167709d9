"""Which slots hold the same shards, and which of these are not known to be equal.

Slots need not hold the same sets: what several have in common is a *piece*, the shards that the same lists of
shards have. Two slots are known to be equal in it if the digests of the parts that it lies in are.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np

from emergency_ckpt.core.holders import ShardBlocks
from emergency_ckpt.core.inventory import Holding
from emergency_ckpt.core.parts import MOST_PARTS, part_numbers
from emergency_ckpt.core.replica_votes import DifferingReplicas, Replica, SlotOf, Version
from emergency_ckpt.core.universe import Universe, distinct

_Kind = tuple[int, int]  # Slots of the same shards: the number of their layout, and of the list there.


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """What a kind of slots has in common with others.

    Attributes:
      number: equal for the same shards.
      part: which part of the slot it lies in. whole: the pieces of that part, by their numbers.
    """

    number: int
    part: int
    whole: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    slot: SlotOf
    holding: Holding
    kind: _Kind

    def version(self, piece: _Piece, pieces: Sequence[_Piece]) -> Version:
        """Equal where the shards of a piece are known to be."""
        if self._tells_parts(pieces):
            return Version(piece.whole, self.holding.parts[piece.part])
        return self._of_all(pieces)

    def version_of_values(self, pieces: Sequence[_Piece]) -> Version:
        return Version("values", self.holding.parts[-1]) if self._tells_parts(pieces) else self._of_all(pieces)

    def _tells_parts(self, pieces: Sequence[_Piece]) -> bool:
        return len(self.holding.parts) == len({piece.part for piece in pieces}) + 1

    def _of_all(self, pieces: Sequence[_Piece]) -> Version:
        return Version(("all", *(piece.number for piece in pieces)), self.holding.digest)


class ReplicaGroups:
    """Finds the slots of a step that should be equal and may not be."""

    def __init__(self, universe: Universe) -> None:
        self._universe = universe
        self._layout_numbers = {layout_hash: number for number, layout_hash in enumerate(universe.hashes)}
        self._cuts: dict[frozenset[int], _Cut] = {}
        self._alone: dict[_Kind, tuple[int, ...]] = {}

    def differing(self, holdings: Collection[tuple[int, Holding]]) -> tuple[DifferingReplicas, ...]:
        """Of these holdings of one step, what is held by several and not known to be equal in all.

        What is known to differ comes first.
        """
        slots = self._slots(holdings)
        numbers = frozenset(each.kind[0] for each in slots)
        if numbers not in self._cuts:
            self._cuts[numbers] = _Cut(self._universe, numbers)
        cut = self._cuts[numbers]
        pieces = {kind: cut.pieces(kind) for kind in {each.kind: None for each in slots}}
        groups: dict[int, list[tuple[_Slot, Version]]] = collections.defaultdict(list)
        for each in slots:
            of_slot = pieces[each.kind]
            for piece in of_slot:
                groups[piece.number].append((each, each.version(piece, of_slot)))
        found = [
            DifferingReplicas(_replicas(group), cut.shards(number, {each.kind for each, _ in group}))
            for number, group in groups.items()
            if _versions(group) > 1
        ]
        found += [
            DifferingReplicas(_replicas(group), None)
            for group in self._by_values(slots, pieces)
            if _versions(group) > 1
        ]
        return tuple(sorted(found, key=lambda each: not each.is_certain))

    def _slots(self, holdings: Collection[tuple[int, Holding]]) -> list[_Slot]:
        found: list[_Slot] = []
        for process, holding in holdings:
            number = self._layout_numbers.get(holding.layout)
            if number is not None and 0 <= holding.position < self._universe.layouts[number].process_count:
                slot = SlotOf(holding.step, process, holding.layout, holding.position)
                kind = number, self._universe.layouts[number].held.kinds[holding.position]
                found.append(_Slot(slot, holding, kind))
        return sorted(found, key=lambda each: (each.slot.process, each.slot, each.holding.digest))

    def _by_values(
        self, slots: Sequence[_Slot], pieces: Mapping[_Kind, tuple[_Piece, ...]]
    ) -> list[list[tuple[_Slot, Version]]]:
        """Slots whose values should be equal: those of hosts that stand at the same place in their slices."""
        leaves = {kind: self._universe.layouts[kind[0]].value_leaves for kind in pieces}
        if not any(leaves.values()):
            return []
        # Counterparts have the same shards, or some that the same processes want, no two of them in a slice.
        leaders: dict[Hashable, Hashable] = {}

        def leader(of: Hashable) -> Hashable:
            while leaders.setdefault(of, of) != of:
                of = leaders[of]
            return of

        for kind, of_slot in pieces.items():
            same = tuple(sorted(piece.number for piece in of_slot))
            for each in (same, *self._wanted_alone(kind)):
                leaders[leader((leaves[kind], each))] = leader(kind)
        groups: dict[Hashable, list[tuple[_Slot, Version]]] = collections.defaultdict(list)
        for each in slots:
            if leaves[each.kind]:
                groups[leader(each.kind)].append((each, each.version_of_values(pieces[each.kind])))
        return list(groups.values())

    def _wanted_alone(self, kind: _Kind) -> tuple[int, ...]:
        """Of these slots' shards, the blocks in the wanted layout that no two processes of a slice want."""
        if kind not in self._alone:
            wanted = self._universe.wanted
            numbers = self._universe.numbers[kind[0]][self._universe.layouts[kind[0]].held.lists[kind[1]]]
            blocks: list[int] = distinct(
                wanted.shard_holders.blocks[numbers[numbers < len(wanted.shards)]]
            ).tolist()
            holders = {block: wanted.shard_holders.processes[block] for block in blocks}
            slices = {block: {wanted.process_slice[p] for p in by} for block, by in holders.items()}
            self._alone[kind] = tuple(b for b, by in holders.items() if len(slices[b]) == len(by))
        return self._alone[kind]


class _Cut:
    """The shards of some layouts, cut into pieces by all their lists."""

    def __init__(self, universe: Universe, numbers: Collection[int]) -> None:
        """`numbers`: of the layouts."""
        self._universe = universe
        self._pieces: dict[_Kind, tuple[_Piece, ...]] = {}
        if len(numbers) == 1:
            self._of = {number: universe.layouts[number].shard_holders.blocks for number in numbers}
            return
        blocks = ShardBlocks(len(universe))
        lists = [(n, held) for n in sorted(numbers) for held in universe.layouts[n].held.lists]
        for place, (number, held) in enumerate(lists):
            blocks.divide(place, universe.numbers[number][held])
        self._of = {number: blocks.of[universe.numbers[number]] for number in numbers}

    def pieces(self, kind: _Kind) -> tuple[_Piece, ...]:
        """What slots of this kind consist of; where that is too much to compare, one that is all of it."""
        if kind not in self._pieces:
            self._pieces[kind] = self._find(kind)
        return self._pieces[kind]

    def shards(self, piece: int, kinds: Collection[_Kind]) -> Mapping[str, tuple[int, ...]]:
        """The shards of a piece as indices of each layout that has slots of these kinds, by its hash."""
        found: dict[str, tuple[int, ...]] = {}
        for number, kind in sorted(kinds):
            held = self._universe.layouts[number].held.lists[kind]
            here = held if piece < 0 else held[self._of[number][held] == piece]
            found[self._universe.hashes[number]] = tuple(here.tolist())
        return found

    def _find(self, kind: _Kind) -> tuple[_Piece, ...]:
        layout = self._universe.layouts[kind[0]]
        held = layout.held.lists[kind[1]]
        numbers, first = np.unique(self._of[kind[0]][held], return_index=True)
        if len(numbers) > MOST_PARTS:
            alike = -1 - self._universe.set_number(kind[0], layout.held.kinds.index(kind[1]))
            return (_Piece(alike, 0, (alike,)),)
        parts = part_numbers(layout, kind[1])[first]
        return tuple(
            _Piece(number, part, tuple(numbers[parts == part].tolist()))
            for number, part in zip(numbers.tolist(), parts.tolist(), strict=True)
        )


def _versions(group: Sequence[tuple[_Slot, Version]]) -> int:
    return len({version for _, version in group})


def _replicas(group: Sequence[tuple[_Slot, Version]]) -> tuple[Replica, ...]:
    return tuple(Replica(each.slot, version, each.holding.missing) for each, version in group)
