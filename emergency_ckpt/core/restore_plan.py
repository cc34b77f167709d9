"""The restore plan: for one step, where every process gets its shards from, and why this step.

A step is chosen by coverage of verified shards, newest first. Any mix of survivors that covers the state is
enough: each group of processes with the same shards needs one member that has them, or the persistent tier.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import Activation, StepId, is_void
from emergency_ckpt.core.other_layouts import (
    OtherLayout,
    Unusable,
    covers_all,
    differing_briefly,
    shards_as_in,
)
from emergency_ckpt.errors import CorruptDataError

_DAMAGED = "is damaged"


class SourceKind(enum.Enum):
    OWN_SLOT = "own slot"
    BROADCAST = "broadcast"
    PERSISTENT = "persistent"


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where one process gets all its shards from; `process` is the sender of a broadcast."""

    kind: SourceKind
    process: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Strike:
    """A source that turned out bad: a process's slot for a step, or the persistent step (`process` None).

    `why` says what was found; it is one strike whatever it says.
    """

    step: StepId
    process: int | None
    why: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class RestorePlan:
    """How to restore one step.

    Attributes:
      step: the step that all processes restore.
      sources: per process, the source of its shards.
      extras_from: per process, the process whose ramdisk has its extras; None where they come from the
        persistent tier or where the step has none.
      reason: why this step and these sources, in words.
    """

    step: StepId
    sources: tuple[Source, ...]
    extras_from: tuple[int | None, ...]
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {
            "step": [self.step.generation, self.step.step],
            "sources": [[source.kind.value, source.process] for source in self.sources],
            "extras_from": list(self.extras_from),
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, raw: Any) -> RestorePlan:
        try:
            return cls(
                StepId(int(raw["step"][0]), int(raw["step"][1])),
                tuple(Source(SourceKind(k), None if p is None else int(p)) for k, p in raw["sources"]),
                tuple(None if p is None else int(p) for p in raw["extras_from"]),
                str(raw["reason"]),
            )
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise CorruptDataError(
                f"a restore plan cannot be read: {error}: {json.dumps(raw)[:200]}"
            ) from error


@dataclasses.dataclass(frozen=True)
class Planner:
    """Everything that planning needs to know; `plan` is a pure function of it.

    Attributes:
      layout: the layout of the job that restores.
      groups: processes that lie at the same place in different slices and hold the same shards, so that
        one can send its slot to the others over the mesh. A process that has no counterpart is alone.
      inventories: per process.
      persistent: committed steps of the persistent tier.
      activations: the restores that happened before (see `core.lineage`).
      single_replica: let one slice read the persistent tier and broadcast to the others.
      others: by hash, the layouts of other job shapes and states that the inventories name.
    """

    layout: Layout
    groups: tuple[tuple[int, ...], ...]
    inventories: tuple[Inventory, ...]
    persistent: tuple[StepId, ...]
    activations: tuple[Activation, ...] = ()
    single_replica: bool = False
    others: Mapping[str, OtherLayout] = dataclasses.field(default_factory=dict[str, OtherLayout])

    def candidates(self) -> list[StepId]:
        """Steps that anybody holds something of, newest first, void ones left out."""
        found = {h.step for inventory in self.inventories for h in inventory.holdings} | set(self.persistent)
        return sorted((s for s in found if not is_void(s, self.activations)), reverse=True)

    def plan(
        self, wanted: int | None = None, strikes: Collection[Strike] = ()
    ) -> tuple[RestorePlan | None, str]:
        """The plan for the newest restorable step, or for step number `wanted`.

        Returns the plan (None if there is none) and the reason: what was chosen, and why newer steps were not.
        """
        passed_over: list[str] = []
        changed: dict[tuple[str, ...], None] = {}
        for step in self.candidates():
            if wanted is not None and step.step != wanted:
                continue
            plan, reason = self._plan_step(step, strikes)
            changed |= dict.fromkeys(self._differences(step))
            if plan is not None:
                reason = "; ".join([plan.reason, *passed_over, *_other_states(changed)])
                return dataclasses.replace(plan, reason=reason), reason
            passed_over.append(reason)
        if passed_over:
            return None, "; ".join([*passed_over, *_other_states(changed)])
        where = "on any ramdisk or in the persistent tier"
        return None, f"no step was found {where}" if wanted is None else f"step {wanted} was not found {where}"

    def restorable(self, strikes: Collection[Strike] = ()) -> list[StepId]:
        """Every step that could be restored now, oldest first."""
        return [s for s in reversed(self.candidates()) if self._plan_step(s, strikes)[0] is not None]

    def unusable(self) -> Unusable | None:
        """The newest step, if newer than all restorable ones, of which every shard is there but does not fit.

        It was saved with another state, by another job shape, or hosts changed places since.
        """
        for step in self.candidates():
            if self._plan_step(step, ())[0] is not None:
                return None
            if not self._uncovered(self._holders(step, {})[0]):
                continue  # The shards fit: something else is missing.
            by_layout: dict[str, list[int]] = collections.defaultdict(list)
            for inventory in self.inventories:
                for holding in inventory.holdings:
                    if holding.step == step and not holding.missing:
                        by_layout[holding.layout].append(holding.position)
            for layout_hash, positions in by_layout.items():
                saved = self._layout(layout_hash)
                if saved is not None and covers_all(saved.layout, positions):
                    return Unusable(step, saved.shape, saved.differences)
        return None

    def _plan_step(self, step: StepId, strikes: Collection[Strike]) -> tuple[RestorePlan | None, str]:
        struck = {strike.process: strike.why for strike in strikes if strike.step == step}
        persistent = step in self.persistent and None not in struck
        holders, notes = self._holders(step, struck)
        if None in struck:
            notes.append(_because("the persistent tier is unusable", struck[None]))
        if step.generation == 0 and persistent:
            # Another program may have written this step number anew since it was copied to the ramdisks.
            holders = {}
        if not holders and not persistent:
            return None, f"step {step.step}: {'; '.join(notes) or 'no usable copy'}"
        extras_from, lost_extras = self._extras(step, holders, struck)
        if lost_extras and (persistent or not self._uncovered(holders)):
            # Data position and arrays belong together: half a step is no step.
            notes.append(f"extras of {_processes(lost_extras)} have no survivor")
            holders, extras_from = {}, (None,) * self.layout.process_count
        uncovered = [] if persistent else self._uncovered(holders)
        if uncovered:
            lost = "; ".join(f"the shards of {_processes(group)} have no survivor" for group in uncovered)
            tier = [] if None in struck else ["the persistent tier lacks it"]
            return None, f"step {step.step}: {'; '.join([lost, *tier, *notes])}"
        chosen = self._sources(holders)
        reason = f"step {step.step}: {self._summary(chosen)}"
        if notes:
            reason += f" ({'; '.join(notes)})"
        return RestorePlan(step, tuple(chosen), extras_from, reason), reason

    def _uncovered(self, holders: Collection[int]) -> list[tuple[int, ...]]:
        """Groups of processes whose shards nobody holds."""
        return [group for group in self.groups if not any(p in holders for p in group)]

    def _sources(self, holders: Collection[int]) -> list[Source]:
        """Per process its source; groups that nobody holds read the persistent tier."""
        sources = [Source(SourceKind.OWN_SLOT)] * self.layout.process_count
        for group in self.groups:
            have = [p for p in group if p in holders]
            first = have[0] if have else min(group, key=lambda p: (self.layout.process_slice[p], p))
            for p in group:
                if p in holders:
                    continue
                reads = not have and (p == first or not self.single_replica)
                sources[p] = Source(SourceKind.PERSISTENT) if reads else Source(SourceKind.BROADCAST, first)
        return sources

    def _holders(self, step: StepId, struck: Mapping[int | None, str]) -> tuple[dict[int, Holding], list[str]]:
        """Processes whose own slot is usable for this step; and what speaks against the others."""
        notes: list[str] = []
        usable: dict[int, Holding] = {}
        misfits: dict[str, list[int]] = collections.defaultdict(list)
        for inventory in self.inventories:
            for holding in inventory.holdings:
                if holding.step != step:
                    continue
                if inventory.process in struck:
                    damaged = f"the copy of process {inventory.process} is damaged"
                    notes.append(_because(damaged, struck[inventory.process]))
                elif not self._fits(inventory.process, holding):
                    misfits[self._misfit(holding)].append(inventory.process)
                else:
                    usable[inventory.process] = holding
        for why, processes in misfits.items():
            why = "are damaged" if why == _DAMAGED and len(processes) > 1 else why
            notes.append(f"the {'copy' if len(processes) == 1 else 'copies'} of {_processes(processes)} {why}")
        for group in self.groups:
            digests = collections.Counter(usable[p].digest for p in group if p in usable)
            if len(digests) > 1:
                best = max(digests.values())
                leading = {digest for digest, count in digests.items() if count == best}
                winner = next(usable[p].digest for p in group if p in usable and usable[p].digest in leading)
                losers = [p for p in group if p in usable and usable[p].digest != winner]
                notes.append(f"replicas differ: {_processes(losers)} take the bytes of the majority")
                for p in losers:
                    del usable[p]
        return usable, notes

    def _fits(self, process: int, holding: Holding) -> bool:
        """Whether what it holds is exactly what the process needs."""
        held = self._held.get(holding.layout, ())
        if holding.missing or not 0 <= holding.position < len(held):
            return False
        return held[holding.position] == self.layout.process_shards[process]

    def _misfit(self, holding: Holding) -> str:
        """Why a holding does not fit the process that has it."""
        if holding.missing:
            return _DAMAGED
        saved = self._layout(holding.layout)
        if saved is None:
            return "cannot be read: their layout is unknown"
        if saved.differences:
            return "cannot be used: another state was saved"
        held = self._held[holding.layout]
        if 0 <= holding.position < len(held) and held[holding.position] in self.layout.process_shards:
            return "cannot be used: the shards in them are those of other processes now, hosts changed places"
        return f"cannot be used: {saved.shape} cut the state in other pieces"

    def _layout(self, layout_hash: str) -> OtherLayout | None:
        own = OtherLayout(self.layout) if layout_hash == self.layout.hash else None
        return own or self.others.get(layout_hash)

    @functools.cached_property
    def _held(self) -> Mapping[str, tuple[tuple[int, ...] | None, ...]]:
        """By hash of a layout with the same leaves: per process in it, its shards as indices of our layout."""
        same = {h: other.layout for h, other in self.others.items() if not other.differences}
        return {
            h: shards_as_in(layout, self.layout)
            for h, layout in {**same, self.layout.hash: self.layout}.items()
        }

    def _differences(self, step: StepId) -> list[tuple[str, ...]]:
        """How the states differ that were saved as this step: once per kind of difference."""
        named = {h.layout for i in self.inventories for h in i.holdings if h.step == step}
        found = [self.others[h].differences for h in sorted(named) if h in self.others]
        return [differences for differences in found if differences]

    def _extras(
        self, step: StepId, holders: dict[int, Holding], struck: Collection[int | None]
    ) -> tuple[tuple[int | None, ...], list[int]]:
        """Per process who has its extras, and the processes whose extras nobody has.

        Extras are kept apart from the shards: a ramdisk whose shards do not fit here still serves them.
        """
        keepers: dict[int, list[int]] = collections.defaultdict(list)
        expected = False
        for inventory in self.inventories:
            for holding in inventory.holdings:
                if holding.step != step or inventory.process in struck:
                    continue
                saved = self._layout(holding.layout)
                if saved is None or saved.layout.process_count != self.layout.process_count:
                    continue  # Extras belong to a process of a job of one size.
                expected = expected or bool(holding.extras_of)
                for owner in holding.extras_of:
                    keepers[owner].append(inventory.process)
        if not expected or not holders:
            return (None,) * self.layout.process_count, []
        found = [
            p if p in keepers[p] else min(keepers[p], default=None) for p in range(self.layout.process_count)
        ]
        return tuple(found), [p for p, keeper in enumerate(found) if keeper is None]

    def _summary(self, sources: Sequence[Source]) -> str:
        by_kind = collections.Counter(source.kind for source in sources)
        total = len(sources)
        parts: list[str] = []
        if count := by_kind[SourceKind.OWN_SLOT]:
            parts.append(f"{count} of {total} processes have it on their own ramdisk")
        if by_kind[SourceKind.BROADCAST]:
            receivers = [p for p, s in enumerate(sources) if s.kind is SourceKind.BROADCAST]
            senders = sorted({s.process for s in sources if s.process is not None})
            named = self._named(receivers)
            gets = "gets" if named.startswith(("slice ", "process ")) else "get"
            parts.append(f"{named} {gets} it by broadcast from {self._named(senders)}")
        if by_kind[SourceKind.PERSISTENT]:
            readers = [p for p, s in enumerate(sources) if s.kind is SourceKind.PERSISTENT]
            everyone = "all processes" if len(readers) == total else self._named(readers)
            parts.append(f"{everyone} read the persistent tier")
        return ", ".join(parts)

    def _named(self, processes: Sequence[int]) -> str:
        """'slice 1' where these are whole slices, the process numbers otherwise."""
        slices = sorted({self.layout.process_slice[p] for p in processes})
        members = [p for p, s in enumerate(self.layout.process_slice) if s in slices]
        if self.layout.slice_count > 1 and members == sorted(processes):
            return ("slice " if len(slices) == 1 else "slices ") + ", ".join(map(str, slices))
        return _processes(processes)


def _because(what: str, why: str) -> str:
    return f"{what} ({why})" if why else what


def _other_states(changed: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"another state was saved, {differing_briefly(differences)}" for differences in changed]


def _processes(processes: Iterable[int]) -> str:
    numbers = sorted(processes)
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"
