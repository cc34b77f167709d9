"""The planner: which step is restored, and why it and no newer one.

A step is chosen by coverage of verified shards, newest first. Any mix of survivors that covers the state is
enough: each shard needs one slot somewhere that has it, or slots whose boxes cover it, or the persistent tier.
Planning is a pure function of what is known, in whatever order it came.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Collection, Hashable, Iterable, Mapping

from emergency_ckpt.core.copies import survivable
from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import Activation, StepId, is_void
from emergency_ckpt.core.misplaced import Misplaced, find_misplaced
from emergency_ckpt.core.other_layouts import OtherLayout, Unusable, covers_all, differing_briefly
from emergency_ckpt.core.plan_reasons import describe_lost, describe_sources
from emergency_ckpt.core.plan_words import because, processes_named
from emergency_ckpt.core.replica_groups import ReplicaGroups
from emergency_ckpt.core.replica_votes import (
    DifferingReplicas,
    Outvoted,
    SlotOf,
    Vote,
    outvoted_in_any,
    vote,
)
from emergency_ckpt.core.replicas import Divergence, Fingerprints
from emergency_ckpt.core.restore_plan import RestorePlan, Strike
from emergency_ckpt.core.step_needs import StepNeeds
from emergency_ckpt.core.survivors import Survivors, find_survivors
from emergency_ckpt.core.universe import Universe


@dataclasses.dataclass(frozen=True)
class Planner:
    """Everything that planning needs to know; `plan` is a pure function of it.

    Attributes:
      layout: what each process of the job that restores has to get.
      groups: processes that lie at the same place in different slices and hold the same shards, so that
        one can send its slot to the others over the mesh. A process that has no counterpart is alone.
      inventories: per process.
      persistent: committed steps of the persistent tier.
      activations: the restores that happened before (see `core.lineage`).
      single_replica: let one slice get everything and broadcast it to the others.
      others: by hash, the layouts of other job shapes and states that the inventories name.
      served: the processes whose slots others can fetch from; None: all.
      stored: what slots of this job hold, where slices share the state; None: what processes have to get.
      fingerprints: of slots that may differ and were asked, one number per shard (see `core.replica_votes`).
    """

    layout: Layout
    groups: tuple[tuple[int, ...], ...]
    inventories: tuple[Inventory, ...]
    persistent: tuple[StepId, ...]
    activations: tuple[Activation, ...] = ()
    single_replica: bool = False
    others: Mapping[str, OtherLayout] = dataclasses.field(default_factory=dict[str, OtherLayout])
    served: frozenset[int] | None = None
    stored: Layout | None = None
    fingerprints: Mapping[SlotOf, Fingerprints] = dataclasses.field(default_factory=dict[SlotOf, Fingerprints])

    def candidates(self) -> list[StepId]:
        """Steps that anybody holds something of, newest first, void ones left out."""
        found = set(self._holdings) | set(self.persistent)
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
        known: dict[Hashable, bool] = {}
        return [s for s in reversed(self.candidates()) if self._is_restorable(s, strikes, known)]

    def differing_replicas(self, most_steps: int) -> tuple[DifferingReplicas, ...]:
        """Slots that should be equal and are not known to be, of the newest steps, newest first."""
        return tuple(
            each
            for step in self.candidates()[:most_steps]
            for each in self._groups.differing(self._holdings.get(step, ()))
        )

    def divergences(self, step: StepId) -> tuple[Divergence, ...]:
        """The leaves of a step that differ, as far as slots were asked."""
        return tuple(found for vote in self._votes(step) for found in vote.divergences)

    def saved_layout(self, layout_hash: str) -> Layout:
        """The layout of this hash, which is the job's or among the others."""
        known = self._layout(layout_hash)
        assert known is not None
        return known.layout

    def differing(self, step: StepId, strikes: Collection[Strike] = ()) -> tuple[int, ...]:
        """The processes whose copies of `step` are not what most have; these get the bytes of the others."""
        return self._survivors(step, strikes).losers

    def misplaced(self, plan: RestorePlan, strikes: Collection[Strike] = ()) -> Misplaced | None:
        """What travels only because hosts have changed places; None where nothing does."""
        return find_misplaced(self._universe, self._survivors(plan.step, strikes), plan.processes)

    def unusable(self) -> Unusable | None:
        """The newest step, if newer than all restorable ones, of which every shard is there but of no use.

        It was saved with another state, or those that need its shards cannot get them.
        """
        known: dict[Hashable, bool] = {}
        for step in self.candidates():
            if self._is_restorable(step, (), known):
                return None
            if not self._needs(step, self._survivors(step, ()), ()).lost:
                continue  # The shards fit: something else is missing.
            slots: dict[str, list[tuple[int, tuple[int, ...]]]] = collections.defaultdict(list)
            for _, holding in self._holdings.get(step, ()):
                slots[holding.layout].append((holding.position, holding.missing))
            for layout_hash, found in sorted(slots.items()):
                saved = self._layout(layout_hash)
                if saved is not None and covers_all(saved.layout, found):
                    return Unusable(step, saved.shape, saved.differences)
        return None

    def _plan_step(self, step: StepId, strikes: Collection[Strike]) -> tuple[RestorePlan | None, str]:
        strikes = [strike for strike in strikes if strike.step == step]
        survivors = self._survivors(step, strikes)
        notes = list(survivors.notes)
        dropped = [strike for strike in strikes if strike.process is None and strike.shards is None]
        if dropped:
            notes.append(because("the persistent tier is unusable", max(strike.why for strike in dropped)))
        if not survivors.kinds and not self._has_persistent(step, strikes):
            return None, f"step {step.step}: {'; '.join(notes) or 'no usable copy'}"
        needs = self._needs(step, survivors, strikes)
        extras_from, extras_kept, lost_extras = self._extras(step, survivors, strikes)
        if lost_extras and not needs.lost:
            # Data position and arrays belong together: half a step is no step.
            notes.append(f"extras of {processes_named(lost_extras)} have no survivor")
            extras_from, extras_kept = (None,) * self.layout.process_count, ()
            needs = self._needs(step, survivors.none(), strikes)
        elif self._mixes(step, needs):
            # Whose version a drain wrote is not known: some would get that, and others that of the majority.
            notes.append("all comes from the persistent tier: some need it for what replicas differ in")
            extras_from, extras_kept = (None,) * self.layout.process_count, ()
            needs = self._needs(step, survivors.none(), strikes)
        if needs.lost:
            tier = [] if dropped else [self._tier_lacks(step)]
            lost = describe_lost(needs, self.layout)
            return None, f"step {step.step}: {'; '.join([lost, *self._said_of_spread(step), *tier, *notes])}"
        processes = needs.processes()
        reason = f"step {step.step}: {describe_sources(processes, self.layout, self.stored)}"
        if notes:
            reason += f" ({'; '.join(notes)})"
        return RestorePlan(step, processes, extras_from, reason, extras_kept), reason

    def _is_restorable(self, step: StepId, strikes: Collection[Strike], known: dict[Hashable, bool]) -> bool:
        """`known`: the answers so far; steps that are left in the same slots have the same one."""
        strikes = [strike for strike in strikes if strike.step == step]
        struck = any(strike.process is None for strike in strikes)
        if step in self.persistent and not struck:
            return True
        survivors = self._survivors(step, strikes)
        if self._extras(step, survivors, strikes)[-1]:
            survivors = survivors.none()
        if struck or step in self.persistent:
            needs = self._needs(step, survivors, strikes)
            if self._mixes(step, needs):
                needs = self._needs(step, survivors.none(), strikes)
            return not needs.lost
        if survivors.slots not in known:
            known[survivors.slots] = not self._needs(step, survivors, strikes).lost
        return known[survivors.slots]

    def _needs(self, step: StepId, survivors: Survivors, strikes: Collection[Strike]) -> StepNeeds:
        lacking = [
            shard
            for strike in strikes
            if strike.step == step and strike.process is None
            for shard in strike.shards or ()
        ]
        return StepNeeds(
            self._universe,
            survivors,
            self.served,
            self.groups,
            self.single_replica,
            frozenset(lacking) if self._has_persistent(step, strikes) else None,
        )

    def _mixes(self, step: StepId, needs: StepNeeds) -> bool:
        """Whether the persistent tier would give some processes what ramdisks hold in several versions."""
        if needs.lost or needs.lacking is None or not (outvoted := self._outvoted(step)):
            return False
        layouts = dict(zip(self._universe.hashes, self._universe.layouts, strict=True))
        shards = {
            layouts[slot.layout].shards[shard] for slot, each in outvoted.items() for shard in each.shards
        }
        return needs.reads(shards, any(each.values for each in outvoted.values()))

    def _survivors(self, step: StepId, strikes: Collection[Strike]) -> Survivors:
        strikes = [strike for strike in strikes if strike.step == step]
        holdings = self._holdings.get(step, ())
        outvoted = self._outvoted(step)
        found = find_survivors(self._universe, self.others, holdings, strikes, outvoted, self.served)
        if step.generation == 0 and self._has_persistent(step, strikes):
            # Another program may have written this step number anew since it was copied to the ramdisks.
            return found.none()
        return found

    def _votes(self, step: StepId) -> tuple[Vote, ...]:
        """On what slots that should be equal may differ in. Strikes change nothing about it."""
        if step not in self._known_votes:
            layouts = dict(zip(self._universe.hashes, self._universe.layouts, strict=True))
            slices = self.layout.process_slice
            found = self._groups.differing(self._holdings.get(step, ()))
            self._known_votes[step] = tuple(vote(each, layouts, self.fingerprints, slices) for each in found)
        return self._known_votes[step]

    def _outvoted(self, step: StepId) -> Mapping[SlotOf, Outvoted]:
        if step not in self._known_outvoted:
            self._known_outvoted[step] = outvoted_in_any(self._votes(step))
        return self._known_outvoted[step]

    def _has_persistent(self, step: StepId, strikes: Collection[Strike]) -> bool:
        """Whether the persistent tier has this step, and not all of it was struck."""
        return step in self.persistent and not any(
            strike.step == step and strike.process is None and strike.shards is None for strike in strikes
        )

    def _said_of_spread(self, step: StepId) -> list[str]:
        """How often shards lie on ramdisks where slices share them: not in every slice, as one might think."""
        named = {holding.layout for _, holding in self._holdings.get(step, ())}
        if self.stored is None or self.stored.hash not in named:
            return []
        times = survivable(self.stored).slices + 1
        return [f"with local_checkpoint_spread each was in {times} slice{'s' if times > 1 else ''}"]

    def _tier_lacks(self, step: StepId) -> str:
        return "the persistent tier lacks " + ("some of it" if step in self.persistent else "it")

    def _extras(
        self, step: StepId, survivors: Survivors, strikes: Collection[Strike]
    ) -> tuple[tuple[int | None, ...], tuple[int | None, ...], list[int]]:
        """Per process who has its extras; the same for a job of another size; the processes whose nobody has.

        Extras are kept apart from the shards: a ramdisk whose shards do not fit here still serves them. Those
        of a job of another size are told where there are none of this one, or not all.
        """
        count = self.layout.process_count
        nobody: tuple[int | None, ...] = (None,) * count
        keepers = self._keepers(step, strikes)
        if not survivors.kinds or not keepers:
            return nobody, (), []
        others = [_first_of(by, size) for size, by in sorted(keepers.items()) if size != count]
        # The one of which most is left; a job of any size will do.
        kept = max(others, key=lambda each: (each.count(None) == 0, len(each) - each.count(None)), default=())
        mine = keepers.get(count)
        if mine is None:
            return nobody, kept, []
        found = tuple(p if p in mine[p] else min(mine[p], default=None) for p in range(count))
        lost = [p for p, keeper in enumerate(found) if keeper is None]
        if lost and kept and None not in kept:
            return nobody, kept, []
        return found, (), lost

    def _keepers(self, step: StepId, strikes: Collection[Strike]) -> dict[int, dict[int, list[int]]]:
        """Per size of the job that saved a step with extras, and process of it, who has its extras."""
        struck = {strike.process for strike in strikes if strike.step == step and strike.shards is None}
        found: dict[int, dict[int, list[int]]] = {}
        for process, holding in self._holdings.get(step, ()):
            saved = self._layout(holding.layout)
            if process in struck or saved is None or not holding.extras_of:
                continue
            size = saved.layout.process_count
            by = found.setdefault(size, collections.defaultdict(list))
            for owner in holding.extras_of:
                by[owner].append(process)
        return found

    def _layout(self, layout_hash: str) -> OtherLayout | None:
        for own in (self.layout, self.stored):
            if own is not None and layout_hash == own.hash:
                return OtherLayout(own)
        return self.others.get(layout_hash)

    def _differences(self, step: StepId) -> list[tuple[str, ...]]:
        """How the states differ that were saved as this step: once per kind of difference."""
        named = {holding.layout for _, holding in self._holdings.get(step, ())}
        found = [self.others[h].differences for h in sorted(named) if h in self.others]
        return [differences for differences in found if differences]

    @functools.cached_property
    def _holdings(self) -> Mapping[StepId, list[tuple[int, Holding]]]:
        """Per step who holds what."""
        found: dict[StepId, list[tuple[int, Holding]]] = collections.defaultdict(list)
        for inventory in self.inventories:
            for holding in inventory.holdings:
                found[holding.step].append((inventory.process, holding))
        return dict(found)

    @functools.cached_property
    def _groups(self) -> ReplicaGroups:
        return ReplicaGroups(self._universe)

    @functools.cached_property
    def _known_votes(self) -> dict[StepId, tuple[Vote, ...]]:
        return {}

    @functools.cached_property
    def _known_outvoted(self) -> dict[StepId, Mapping[SlotOf, Outvoted]]:
        return {}

    @functools.cached_property
    def _universe(self) -> Universe:
        """The shards of all layouts with the leaves that are wanted."""
        named = {holding.layout for found in self._holdings.values() for _, holding in found}
        same = {h: other.layout for h, other in self.others.items() if h in named and not other.differences}
        if self.stored is not None and self.stored.hash in named:
            same[self.stored.hash] = self.stored
        return Universe(self.layout, same)


def _first_of(keepers: Mapping[int, list[int]], size: int) -> tuple[int | None, ...]:
    """Per process of a job of this size, the first that has its extras."""
    return tuple(min(keepers.get(owner, ()), default=None) for owner in range(size))


def _other_states(changed: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"another state was saved, {differing_briefly(differences)}" for differences in changed]
