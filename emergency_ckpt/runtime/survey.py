"""The survey: what all processes and the persistent tier have, and what can be restored from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from emergency_ckpt.core.index_runs import runs_from_json, runs_to_json
from emergency_ckpt.core.inventory import Inventory
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import Activation, StepId, begun_from, newest_promised
from emergency_ckpt.core.other_layouts import OtherLayout, Unusable
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.replica_votes import SlotOf
from emergency_ckpt.core.replicas import Fingerprints
from emergency_ckpt.core.restore_plan import RestorePlan
from emergency_ckpt.jaxio.topology import Topology
from emergency_ckpt.local.store import LocalStore
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.runtime.settings import Settings
from emergency_ckpt.telemetry.events import ReplicaDivergenceEvent


@dataclasses.dataclass(frozen=True)
class Survey:
    """What all processes agreed on after telling each other what they have.

    Attributes:
      activations: every restore that any process or the persistent tier knows of.
      restorable: steps that can be restored, oldest first.
      reason: why the newest of them, in words.
      highest_generation: the highest generation that anybody has seen.
      lost: the newest step that was complete once, where nothing is restorable any more.
      unusable: a step newer than all of these that the ramdisks hold whole and this job cannot use.
      persistent: steps of the persistent tier, void ones included, oldest first.
      fetching: the processes that get something from elsewhere when the newest of the restorable is restored.
      planner: on process 0 only, for planning the restore.
      plan: of the newest step, only where the survey was taken.
      asked: slots that may differ from others; their processes say more of them (see `replica_survey`).
      divergences: what came of that, leaf by leaf.
    """

    activations: tuple[Activation, ...]
    restorable: tuple[StepId, ...]
    reason: str
    highest_generation: int
    lost: StepId | None
    unusable: Unusable | None = None
    persistent: tuple[StepId, ...] = ()
    fetching: tuple[int, ...] = ()
    planner: Planner | None = None
    plan: RestorePlan | None = None
    asked: tuple[SlotOf, ...] = ()
    divergences: tuple[ReplicaDivergenceEvent, ...] = ()

    @property
    def newest(self) -> StepId | None:
        return self.restorable[-1] if self.restorable else None

    def with_divergences(self, divergences: tuple[ReplicaDivergenceEvent, ...]) -> Survey:
        """The same with what was asked for."""
        return dataclasses.replace(self, asked=(), divergences=divergences)

    def to_json(self) -> dict[str, Any]:
        return {
            "activations": [[a.generation, a.step] for a in self.activations],
            "restorable": [[s.generation, s.step] for s in self.restorable],
            "reason": self.reason,
            "highest_generation": self.highest_generation,
            "lost": [self.lost.generation, self.lost.step] if self.lost else None,
            "unusable": _unusable_json(self.unusable) if self.unusable else None,
            "persistent": [[s.generation, s.step] for s in self.persistent],
            "fetching": runs_to_json(self.fetching),
            "asked": [[s.step.generation, s.step.step, s.process, s.layout, s.position] for s in self.asked],
            "divergences": [
                [e.step, e.leaf, e.boxes, e.deviating, e.versions, e.slices] for e in self.divergences
            ],
        }

    @classmethod
    def from_json(cls, raw: Any) -> Survey:
        return cls(
            tuple(Activation(g, s) for g, s in raw["activations"]),
            tuple(StepId(g, s) for g, s in raw["restorable"]),
            raw["reason"],
            raw["highest_generation"],
            StepId(*raw["lost"]) if raw["lost"] else None,
            _parse_unusable(raw["unusable"]) if raw["unusable"] else None,
            tuple(StepId(g, s) for g, s in raw["persistent"]),
            runs_from_json(raw["fetching"]),
            None,
            None,
            tuple(SlotOf(StepId(g, s), *slot) for g, s, *slot in raw["asked"]),
            tuple(
                ReplicaDivergenceEvent(
                    step=step,
                    leaf=leaf,
                    boxes=tuple(boxes),
                    deviating=tuple(deviating),
                    versions=tuple(map(tuple, versions)),
                    slices=tuple(map(tuple, slices)),
                )
                for step, leaf, boxes, deviating, versions, slices in raw["divergences"]
            ),
        )


def own_inventory(local: LocalStore, process: int, process_count: int) -> Inventory:
    """What this process has, every block of it verified. Without a local tier: nothing."""
    return Inventory(
        process,
        local.verify() if local.directory else (),
        local.highest_generation(),
        local.activations,
        process_count,
        local.promised() if local.directory else None,
    )


def take_survey(
    inventories: Sequence[Inventory],
    persistent: PersistentStore,
    layout: Layout,
    topology: Topology,
    settings: Settings,
    others: Mapping[str, OtherLayout],
    served: frozenset[int],
    stored: Layout | None = None,
    fingerprints: Mapping[SlotOf, Fingerprints] | None = None,
) -> Survey:
    """Puts all inventories together. Process 0 calls it.

    Args:
      layout: what processes need.
      others: the layouts that they name beside ours. served: the processes whose slots can be fetched.
      stored: what slots hold, where that is something else.
      fingerprints: of slots that should be equal to others and were asked.
    """
    newest = persistent.newest_generation()
    known = {a for inventory in inventories for a in inventory.activations} | set(persistent.activations())
    activations = tuple(sorted(known, key=lambda a: (a.generation, -1 if a.step is None else a.step)))
    steps = tuple(step.step_id for step in persistent.steps())
    planner = Planner(
        layout,
        restore_groups(layout, topology),
        tuple(inventories),
        steps,
        activations,
        settings.single_replica_restore,
        others,
        served,
        stored,
        dict(fingerprints or {}),
    )
    plan, reason = planner.plan()
    generations = [i.highest_generation for i in inventories] + [s.generation for s in steps]
    restorable = tuple(planner.restorable())
    promises = [i.promised for i in inventories if i.promised]
    lost = None
    if not restorable:  # Read only where it matters.
        promises += begun_from(persistent.parents(), activations)
        lost = newest_promised(promises, activations, persistent.deletion())
    return Survey(
        activations,
        restorable,
        reason,
        max([*generations, newest.number if newest else 0]),
        lost,
        planner.unusable(),
        steps,
        fetching(plan) if plan is not None and restorable[-1:] == (plan.step,) else (),
        planner,
        plan,
    )


def fetching(plan: RestorePlan) -> tuple[int, ...]:
    """The processes that get something from elsewhere, ascending; those that a broadcast reaches do not."""
    return tuple(p for p, own in enumerate(plan.processes) if own.takes or own.persistent)


def restore_groups(layout: Layout, topology: Topology) -> tuple[tuple[int, ...], ...]:
    """Processes that can send each other their slots: counterparts in other slices with the same shards."""
    lone = tuple((p,) for p in range(layout.process_count))
    if topology.groups is None:
        return lone
    groups: list[tuple[int, ...]] = []
    for group in topology.groups:
        same = len({layout.process_shards[p] for p in group}) == 1
        groups += [group] if same else [(p,) for p in group]
    return tuple(groups)


def _unusable_json(unusable: Unusable) -> list[Any]:
    step = unusable.step
    return [step.generation, step.step, unusable.shape, list(unusable.differences)]


def _parse_unusable(raw: Any) -> Unusable:
    generation, step, shape, differences = raw
    return Unusable(StepId(generation, step), shape, tuple(differences))
