"""What of one step is left on the ramdisks and good: the sources of a restore, alike ones together.

All replicas of a shard take the bytes of the majority, else of the lowest slice (`core.replica_votes`); what
differs is no source.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

import numpy as np

from emergency_ckpt.core.box_table import Numbers
from emergency_ckpt.core.inventory import Holding
from emergency_ckpt.core.other_layouts import OtherLayout
from emergency_ckpt.core.plan_words import because, is_one, processes_named, shards_counted
from emergency_ckpt.core.replica_votes import Outvoted, SlotOf
from emergency_ckpt.core.restore_plan import Strike
from emergency_ckpt.core.universe import Universe, among

_NOTED_STRIKES = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """Slots of one layout that hold the same shards and miss the same.

    Attributes:
      layout: its number in the universe.
      shards: the set of shards, by the universe's number of it.
      good: universe numbers of the shards that are good in these slots, ascending.
      indices: the same shards as indices of the layout.
      slots: (process, position) of each, ascending.
      is_outvoted: whether shards of them are wrong by what other replicas hold. Such a slot gives the others,
        but is not kept: its manifest stands for all of it.
    """

    layout: int
    shards: int
    good: Numbers
    indices: Numbers
    slots: tuple[tuple[int, int], ...]
    is_outvoted: bool = False


@dataclasses.dataclass(frozen=True)
class Survivors:
    """The sources on ramdisks, and what speaks against the others.

    Attributes:
      kinds: all slots that may be used, in a fixed order.
      of_process: per process that has any, (index into kinds, position).
      slots: equal where the same shards are good in the same slots.
      notes: in words, what cannot be used and why.
      losers: the processes whose bytes differ from what most have, ascending.
      describers: where values differ, the slots that have the right ones and can be fetched from.
    """

    kinds: tuple[Kind, ...]
    of_process: Mapping[int, tuple[tuple[int, int], ...]]
    slots: Hashable
    notes: tuple[str, ...]
    losers: tuple[int, ...] = ()
    describers: tuple[SlotOf, ...] = ()

    def none(self) -> Survivors:
        """The same where no slot may be used."""
        return Survivors((), {}, (), self.notes)


def find_survivors(
    universe: Universe,
    others: Mapping[str, OtherLayout],
    holdings: Sequence[tuple[int, Holding]],
    strikes: Collection[Strike],
    outvoted: Mapping[SlotOf, Outvoted] | None = None,
    served: Collection[int] | None = None,
) -> Survivors:
    """What of `holdings` (process, holding) of one step may be used.

    Args:
      outvoted: of slots that should be equal to others and are not known to be, what is not what most have.
      served: the processes that others can fetch from; None: all.
      others: the layouts that the universe may lack: those of other states.
      strikes: those of this step.
    """
    struck = _Struck(strikes)
    notes: list[str] = []
    misfits: dict[str, list[int]] = collections.defaultdict(list)
    usable: list[_Usable] = []
    beaten: set[int] = set()
    misspoken: list[SlotOf] = []
    describers: list[SlotOf] = []
    layout_numbers = {layout_hash: number for number, layout_hash in enumerate(universe.hashes)}
    for process, holding in sorted(holdings, key=_order):
        if process in struck.whole:
            continue
        number = layout_numbers.get(holding.layout)
        if number is None:
            why = "cannot be used: another state was saved" if holding.layout in others else _UNKNOWN
            misfits[why].append(process)
        elif not 0 <= holding.position < universe.layouts[number].process_count:
            misfits["cannot be read: their layout has no such place"].append(process)
        else:
            shards = universe.set_number(number, holding.position)
            known = range(len(universe.numbers[number]))
            missing = frozenset(i for i in holding.missing if i in known)
            missing |= struck.indices(universe, number, process)
            slot = SlotOf(holding.step, process, holding.layout, holding.position)
            wrong = (outvoted or {}).get(slot)
            if wrong is not None:
                (misspoken if wrong.values else describers).append(slot)
                beaten |= {process} if wrong else set()
                missing |= wrong.shards
            if wrong and missing.issuperset(universe.layouts[number].process_shards[holding.position]):
                continue  # Nothing of it is left.
            usable.append(_Usable(process, number, shards, holding.position, missing, bool(wrong)))
    describers = [slot for slot in describers if misspoken and (served is None or slot.process in served)]
    if misspoken and not describers:
        # Nobody can give those that need them the right values: then these slots are none.
        processes = {slot.process for slot in misspoken}
        usable = [each for each in usable if each.process not in processes]
    notes += struck.notes({process for process, _ in holdings})
    for why, processes in misfits.items():
        notes.append(f"the {'copy' if len(processes) == 1 else 'copies'} of {processes_named(processes)} {why}")
    if beaten:
        named = processes_named(beaten)
        notes.append(
            f"replicas differ: {named} {'takes' if is_one(named) else 'take'} the bytes of the majority"
        )
    gathered = _gathered(universe, usable, tuple(notes))
    return dataclasses.replace(gathered, losers=tuple(sorted(beaten)), describers=tuple(describers))


_UNKNOWN = "cannot be read: their layout is unknown"


@dataclasses.dataclass(frozen=True)
class _Usable:
    process: int
    layout: int
    shards: int
    position: int
    missing: frozenset[int]
    is_outvoted: bool


class _Struck:
    """The strikes of one step against slots."""

    def __init__(self, strikes: Collection[Strike]) -> None:
        ordered = sorted((s for s in strikes if s.process is not None), key=lambda s: (s.process or 0, s.why))
        self.whole = {s.process: s.why for s in reversed(ordered) if s.shards is None}
        self._partly: dict[int, list[Strike]] = collections.defaultdict(list)
        for strike in ordered:
            if strike.process is not None and strike.process not in self.whole:
                self._partly[strike.process].append(strike)

    def indices(self, universe: Universe, layout: int, process: int) -> frozenset[int]:
        """The struck shards of a process's slot of this layout."""
        table = universe.layouts[layout].table
        named = [shard for strike in self._partly.get(process, ()) for shard in strike.shards or ()]
        return frozenset(i for shard in named if (i := table.find(shard)) is not None)

    def notes(self, holders: Collection[int]) -> list[str]:
        noted = [
            because(f"the copy of process {process} is damaged", why)
            for process, why in sorted(self.whole.items(), key=lambda item: item[0] or 0)
            if process in holders
        ]
        for process, strikes in self._partly.items():
            named = frozenset(shard for strike in strikes for shard in strike.shards or ())
            if process in holders and named:
                why = next((strike.why for strike in strikes if strike.why), "")
                what = f"{shards_counted(len(named))} in the copy of process {process}"
                noted.append(because(f"{what} {'is' if len(named) == 1 else 'are'} damaged", why))
        more = len(noted) - _NOTED_STRIKES
        return noted if more <= 1 else [*noted[:_NOTED_STRIKES], f"{more} more copies are damaged"]


def _order(item: tuple[int, Holding]) -> tuple[int, str, int, str]:
    process, holding = item
    return process, holding.layout, holding.position, holding.digest


def _gathered(universe: Universe, usable: Iterable[_Usable], notes: tuple[str, ...]) -> Survivors:
    slots: dict[tuple[int, int, bool, tuple[int, ...]], list[_Usable]] = collections.defaultdict(list)
    for each in usable:
        list_number = universe.layouts[each.layout].held.kinds[each.position]
        slots[each.layout, list_number, each.is_outvoted, tuple(sorted(each.missing))].append(each)
    kinds: list[Kind] = []
    named: list[Hashable] = []
    of_process: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
    for (layout, list_number, is_outvoted, missing), alike in slots.items():
        good, indices = universe.ordered(layout, alike[0].position)
        if missing:
            kept = ~among(indices, np.array(missing, np.int64))
            good, indices = good[kept], indices[kept]
        for each in alike:
            of_process[each.process].append((len(kinds), each.position))
        places = tuple((each.process, each.position) for each in alike)
        named.append((layout, list_number, is_outvoted, missing, places))
        kinds.append(Kind(layout, alike[0].shards, good, indices, places, is_outvoted))
    by_process = {process: tuple(found) for process, found in of_process.items()}
    return Survivors(tuple(kinds), by_process, tuple(named), notes)
