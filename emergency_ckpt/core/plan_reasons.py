"""Why a plan is as it is, or why there is none, in a few words, however many processes and shards there are."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.plan_words import is_one, processes_named, shards_counted, slices_or_processes
from emergency_ckpt.core.restore_plan import ProcessPlan
from emergency_ckpt.core.step_needs import StepNeeds
from emergency_ckpt.core.universe import distinct, joined

_CLAUSES = 3


def describe_sources(processes: Sequence[ProcessPlan], layout: Layout, stored: Layout | None = None) -> str:
    """Where all processes get their shards from.

    `stored`: what slots hold, where that is not what processes need.
    """
    total = len(processes)
    parts: list[str] = []
    if count := sum(plan.is_whole for plan in processes):
        parts.append(f"{count} of {total} processes have it on their own ramdisk")
    parts += _from_slots(processes, layout, stored.hash if stored is not None else "")
    receivers = [p for p, plan in enumerate(processes) if plan.sender is not None]
    if receivers:
        senders = {plan.sender for plan in processes if plan.sender is not None}
        named = slices_or_processes(receivers, layout.process_slice)
        gets = "gets" if is_one(named) else "get"
        sent = slices_or_processes(senders, layout.process_slice)
        parts.append(f"{named} {gets} it by broadcast from {sent}")
    parts += _from_persistent(processes, layout)
    return ", ".join(parts) or "no process needs any shard"


def describe_lost(needs: StepNeeds, layout: Layout) -> str:
    """Which shards nobody can give."""
    lost = distinct(joined(tuple(needs.lost.values())))
    gone = lost[~needs.survive[lost]]
    shown, what = (
        (gone, "have no survivor") if len(gone) else (lost, "survive only where nobody can fetch them")
    )
    first = int(shown[0])
    count = shards_counted(len(shown))
    some = f"{layout.shards[first]}" if len(shown) == 1 else f"{count}, {layout.shards[first]} the first"
    of_these = ~needs.survive if len(gone) else np.ones(len(needs.survive), np.bool_)
    named = processes_named(p for p, numbers in needs.lost.items() if of_these[numbers].any())
    return f"the shards of {named} {what} ({some})"


def _from_slots(processes: Sequence[ProcessPlan], layout: Layout, stored: str) -> list[str]:
    """Who takes how many shards from whom: those with the same givers together."""
    own, recut = (
        {
            p: count
            for p, plan in enumerate(processes)
            if (
                count := sum(
                    len(t.shards) for t in plan.takes if t.process == p and (t.layout == stored) is same
                )
            )
        }
        for same in (True, False)
    )
    parts: list[str] = []
    if own:
        some = shards_counted(sum(own.values()))
        parts.append(f"{len(own)} of {len(processes)} processes have {some} on their own ramdisk")
    if recut:
        named = slices_or_processes(recut, layout.process_slice)
        takes = "takes" if is_one(named) else "take"
        parts.append(
            f"{named} {takes} {shards_counted(sum(recut.values()))} from slots of their own that are not kept"
        )
    takers: dict[frozenset[int], list[int]] = collections.defaultdict(list)
    counts: collections.Counter[frozenset[int]] = collections.Counter()
    for process, plan in enumerate(processes):
        givers = frozenset(take.process for take in plan.takes if take.process != process and take.shards)
        if givers:
            takers[givers].append(process)
            counts[givers] += sum(len(take.shards) for take in plan.takes if take.process != process)
    if len(takers) > _CLAUSES:
        everyone, all_givers = [p for each in takers.values() for p in each], frozenset[int]().union(*takers)
        takers, counts = {all_givers: everyone}, collections.Counter({all_givers: counts.total()})
    for givers, who in takers.items():
        named = slices_or_processes(who, layout.process_slice)
        gets = "gets" if is_one(named) else "get"
        everybody = len(givers) > 1 and givers == frozenset(who)
        sources = "each other" if everybody else slices_or_processes(givers, layout.process_slice)
        parts.append(f"{named} {gets} {shards_counted(counts[givers])} from {sources}")
    return parts


def _from_persistent(processes: Sequence[ProcessPlan], layout: Layout) -> list[str]:
    """Who reads the persistent tier: for everything, or for what nobody has."""
    readers = [p for p, plan in enumerate(processes) if plan.persistent]
    only = [p for p in readers if not processes[p].takes and not processes[p].in_place]
    some = sorted(set(readers) - set(only))
    parts: list[str] = []
    if only:
        everyone = len(only) == len(processes)
        named = "all processes" if everyone else slices_or_processes(only, layout.process_slice)
        parts.append(f"{named} {'reads' if is_one(named) else 'read'} the persistent tier")
    if some:
        named = slices_or_processes(some, layout.process_slice)
        count = shards_counted(sum(len(processes[p].persistent) for p in some))
        parts.append(f"{named} {'reads' if is_one(named) else 'read'} {count} from the persistent tier")
    return parts
