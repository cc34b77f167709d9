"""The restore session: all processes restore one step together, or raise together.

Rounds of: process 0 plans; each process makes its slot whole; bytes are broadcast where slices lack them; each
assembles and verifies its arrays. A bad source found in any of these is struck and the next round plans without
it. Only when every process holds the state do the steps left behind become void (invariants 1, 4, 5); where a
part of the state is restored, none do.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from emergency_ckpt.core.inventory import Inventory
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.plan_words import processes_named, shards_counted
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.replica_votes import SlotOf
from emergency_ckpt.core.replicas import Fingerprints
from emergency_ckpt.core.restore_plan import PlanOfOne, RestorePlan, Strike
from emergency_ckpt.errors import CorruptDataError, NoRestorableStepError, StateMismatchError
from emergency_ckpt.persistent.store import Generation
from emergency_ckpt.runtime.agreement import agree
from emergency_ckpt.runtime.early import EarlyHydration
from emergency_ckpt.runtime.extras import ReceivedExtras, WantedExtras
from emergency_ckpt.runtime.filling import PEER, PERSISTENT, Filling
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.runtime.layout_exchange import fetch_layouts, publish_layouts
from emergency_ckpt.runtime.replica_survey import compare_replicas, slots_to_ask
from emergency_ckpt.runtime.replicas import tell_divergences
from emergency_ckpt.runtime.restore_attempt import Attempt, Held, persistent_mismatch
from emergency_ckpt.runtime.setbacks import Setbacks
from emergency_ckpt.runtime.survey import Survey, own_inventory, take_survey
from emergency_ckpt.runtime.wanted import Wanted, whole_state
from emergency_ckpt.telemetry.events import RejectedStepEvent, RestoreEvent, SourceBytes
from emergency_ckpt.telemetry.metrics import Metric
from emergency_ckpt.telemetry.units import format_seconds


@dataclasses.dataclass(frozen=True)
class RestoreReport:
    """What a restore did.

    Attributes:
      step: the restored step. generation: the generation that saved it (0: another program).
      reason: why this step and these sources.
      source: where this process's shards came from, in words; sources: the same in numbers.
      seconds: from the call until the arrays were ready. bytes: shards of this process.
    """

    step: int
    generation: int
    reason: str
    source: str
    seconds: float
    bytes: int
    sources: tuple[SourceBytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Restored:
    """The state, what was saved beside it, and the report."""

    state: Any
    received: ReceivedExtras
    report: RestoreReport


class Restorer:
    """Surveys and restores of one manager. All processes make the same calls in the same order."""

    def __init__(self, job: Job, abstract_state: Any, mesh: jax.sharding.Mesh) -> None:
        self._job = job
        self._abstract_state = abstract_state
        self._mesh = mesh
        axis = job.settings.replica_axis
        self._replica_axis = str(axis if isinstance(axis, str) else mesh.axis_names[axis])
        self._told_differing: set[StepId] = set()
        self._told_misplaced: set[StepId] = set()
        self.remaining: tuple[StepId, ...] = ()  # what the last failed restore left restorable, oldest first
        self._plan_of_newest: RestorePlan | None = None  # on process 0, until it was told
        self.early: EarlyHydration | None = None  # what is fetched before a restore asks for it

    def survey(self, call: str) -> Survey:
        """Finds out what can be restored now. Collective; `call` names it and is the same on all processes."""
        self.end_early()
        job, timeout = self._job, self._job.settings.coordination_timeout
        key = f"{call}/survey"
        surveyed: list[Survey] = []
        takes: list[Callable[[Mapping[SlotOf, Fingerprints]], Survey]] = []

        def decide(said: list[Any]) -> Any:
            parsed = [Inventory.from_bytes(json.dumps(raw).encode()) for raw, _ in said]
            served = frozenset(process for process, (_, serves) in enumerate(said) if serves)
            others = fetch_layouts(job.coordinator, f"{key}/layouts", parsed, job.layout, timeout)
            needed, stored = job.needed_layout, None if job.stores_all else job.layout
            takes.append(
                functools.partial(
                    take_survey,
                    parsed,
                    job.persistent,
                    needed,
                    job.topology,
                    job.settings,
                    others,
                    served,
                    stored,
                )
            )
            survey = takes[0]({})
            assert survey.planner is not None
            surveyed.append(dataclasses.replace(survey, asked=slots_to_ask(survey.planner)))
            return surveyed[0].to_json()

        def mine() -> Any:
            inventory = own_inventory(job.local, job.process, job.topology.process_count)
            job.peers.renew()
            publish_layouts(job.coordinator, f"{key}/layouts", job.local, inventory.holdings)
            return json.loads(inventory.to_bytes()), job.peers.served

        answer = agree(job.coordinator, key, mine, decide, timeout)
        survey = surveyed[0] if surveyed else Survey.from_json(answer)
        survey = compare_replicas(job, f"{key}/replicas", survey, lambda numbers: takes[0](numbers))
        self._plan_of_newest = survey.plan
        job.local.activate(survey.activations)
        job.local.learn_restorable(survey.restorable)
        return survey

    def begin_early(self, survey: Survey, call: str) -> None:
        """Begins to fetch, in the background, what a restore of the newest step will need. Local.

        Where this process needs nothing from elsewhere nothing is begun. All processes call it with the survey
        that `call` made, or none does.
        """
        step, who = survey.newest, survey.fetching
        plan, self._plan_of_newest = self._plan_of_newest, None
        if step is None or not who or not (self._job.leads or self._job.process in who):
            return
        whole = whole_state(self._abstract_state, self._job.needed_layout, WantedExtras())
        self.early = EarlyHydration(self._job, whole, step, call, who, plan)

    def end_early(self) -> None:
        """Gives up what was begun early, within a second, and gives its slot back. Local."""
        early, self.early = self.early, None
        if early is not None:
            early.end()

    def restore(
        self, survey: Survey, wanted: int | None, begins: Generation | None, beside: WantedExtras, call: str
    ) -> Restored:
        """Restores the newest restorable step, or step `wanted`, as the beginning of a generation. Collective.

        With `begins` None no generation begins from it yet: nothing becomes void.

        Raises NoRestorableStepError, with the reasons, when there is none; StateMismatchError, with every leaf
        that differs, when the persistent step to be read is one of another state; ExtrasError when what is
        wanted beside the arrays is not there; all on all processes.
        """

        whole = whole_state(self._abstract_state, self._job.needed_layout, beside)

        def finish(attempt: Attempt, key: str, plan: PlanOfOne) -> Held | Setbacks:
            if begins is None:
                return attempt.hold(key)
            return attempt.finish(key, Activation(begins.number, plan.step.step))

        restored = self._restore(survey, wanted, whole, finish, call)
        self._job.log.emit(self._event(restored.report))
        return restored

    def restore_part(self, survey: Survey, wanted: int | None, part: Wanted, call: str) -> Restored:
        """Restores `part` of the newest restorable step, or of step `wanted`, and changes nothing. Collective.

        Raises NoRestorableStepError as `restore` does, and StateMismatchError for leaves that the step does not
        have as they are wanted.
        """

        def finish(attempt: Attempt, key: str, _: PlanOfOne) -> Held | Setbacks:
            return attempt.hold(key)

        restored = self._restore(survey, wanted, part, finish, call)
        report = restored.report
        self._job.log.info(
            "restore",
            report.step,
            f"{len(part.leaves) + len(part.values)} leaves of generation {report.generation} were read in "
            f"{format_seconds(report.seconds)}; {report.source}; {report.reason}",
        )
        return restored

    def _restore(
        self,
        survey: Survey,
        step: int | None,
        wanted: Wanted,
        finish: Callable[[Attempt, str, PlanOfOne], Held | Setbacks],
        call: str,
    ) -> Restored:
        job = self._job
        started = time.monotonic()
        strikes: set[Strike] = set()
        unreachable: dict[int, str] = {}
        filling: Filling | None = None
        begun: EarlyHydration | None = None
        if wanted.part.is_whole:
            begun, self.early = self.early, None
        ready_bytes = begun.ready_bytes if begun is not None else 0
        try:
            for round_number in itertools.count():
                key = f"{call}/{round_number}"
                plan, differing = self._plan(f"{key}/plan", survey, step, wanted, strikes, unreachable)
                if filling is None or filling.step != plan.step:
                    if filling is not None:
                        filling.close()
                    if begun is not None and begun.step == plan.step and filling is None:
                        filling = begun.adopt(ready_bytes)
                    else:
                        begun = _ended(begun)
                        filling = Filling(job, plan.step, wanted.part)
                is_trusted = (
                    job.process not in differing
                    and Strike(plan.step, job.process) not in strikes
                    and (plan.own.in_place or bool(plan.own.takes) or plan.own.sender is not None)
                )
                attempt = Attempt(job, plan, wanted, filling, begun, self._mesh, self._replica_axis, is_trusted)
                try:
                    found = attempt.run(key)
                    if not found:
                        restored = finish(attempt, f"{key}/held", plan)
                        if isinstance(restored, Held):
                            return self._restored(restored, plan, wanted, filling, started)
                        found = restored
                finally:
                    attempt.close()
                if strikes.issuperset(found.strikes) and unreachable.keys() >= found.unreachable.keys():
                    raise CorruptDataError(
                        f"{plan.step} fails again although its bad sources were left out: {_told(found)}. "
                        "Memory of a host may be damaged: see which process says so, and replace its host."
                    )
                strikes.update(found.strikes)
                unreachable |= found.unreachable
                self._tell(found)
        finally:
            _ended(begun)
            if filling is not None:
                filling.close()
        raise AssertionError("unreachable: every round restores, raises or learns of a source that failed")

    def _tell(self, found: Setbacks) -> None:
        log = self._job.log
        for strike in found.strikes:
            where = "the persistent tier" if strike.process is None else f"process {strike.process}"
            what = "the copy" if strike.shards is None else f"{shards_counted(len(strike.shards))} in the copy"
            verb = "are" if strike.shards is not None and len(strike.shards) > 1 else "is"
            log.emit(
                RejectedStepEvent(
                    step=strike.step.step,
                    saved_generation=strike.step.generation,
                    reason=f"{what} of {where} {verb} damaged: {strike.why}",
                )
            )
        for process, why in found.unreachable.items():
            log.warning("restore", None, f"shards of process {process} are taken from elsewhere: {why}")

    def _plan(
        self,
        key: str,
        survey: Survey,
        step: int | None,
        wanted: Wanted,
        strikes: set[Strike],
        unreachable: Mapping[int, str],
    ) -> tuple[PlanOfOne, Sequence[int]]:
        """The plan, and the processes whose copies of the step differ from those that are taken."""
        job = self._job
        count = job.topology.process_count

        def make() -> Any:
            planner = survey.planner
            assert planner is not None
            served = planner.served if planner.served is not None else frozenset(range(count))
            planner = dataclasses.replace(planner, served=served - unreachable.keys())
            if wanted.boxes and strikes:
                planner = _with_persistent_copy(planner, strikes)
            plan, reason = planner.plan(step, strikes)
            remaining = [] if plan else planner.restorable(strikes)
            if plan is not None:
                misplaced = planner.misplaced(plan, strikes)
                if misplaced is not None and plan.step not in self._told_misplaced:
                    self._told_misplaced.add(plan.step)
                    job.log.warning("restore", plan.step.step, misplaced.describe())
                for process in range(count):
                    own = json.dumps(plan.process_json(process)).encode()
                    job.coordinator.put(f"{key}/own/{process}", own)
            return {
                "plan": plan.common_json() if plan else None,
                "reason": reason,
                "remaining": [[step.generation, step.step] for step in remaining],
                "mismatch": self._mismatch(planner, plan, wanted) if plan else "",
                "differing": list(planner.differing(plan.step, strikes)) if plan else [],
            }

        # All say that they are here: nobody waits for a silent process as long as for one that reads.
        timeout = job.settings.coordination_timeout
        answer = agree(job.coordinator, key, lambda: None, lambda _: make(), timeout)
        if answer["mismatch"]:
            raise StateMismatchError(answer["mismatch"])
        if answer["plan"] is None:
            self.remaining = tuple(StepId(g, s) for g, s in answer["remaining"])
            newest = self.remaining[-1].step if self.remaining else None
            asked = "No step can be restored" if step is None else f"Step {step} cannot be restored"
            other = "" if newest is None else f" The newest restorable step is {newest}."
            raise NoRestorableStepError(f"{asked}: {answer['reason']}.{other}")
        self._tell_differing(survey, StepId(*answer["plan"]["step"]), answer["differing"])
        own = json.loads(job.coordinator.get(f"{key}/own/{job.process}", timeout))
        return PlanOfOne.from_json(job.process, answer["plan"], own), answer["differing"]

    def _tell_differing(self, survey: Survey, step: StepId, processes: list[int]) -> None:
        """Copies that differ are counted on all processes, once per leaf, step and manager."""
        if not processes or step in self._told_differing:
            return
        self._told_differing.add(step)
        log = self._job.log
        events = [event for event in survey.divergences if event.step == step.step]
        tell_divergences(log, events, self._job.leads)
        if not events:  # There were too many to be compared.
            log.metrics.add(Metric.REPLICA_DIVERGENCES)
            log.metrics.set(Metric.LAST_DIVERGENT_STEP, step.step)
        if self._job.leads:
            log.error(
                "restore",
                step.step,
                f"replicas differ: {processes_named(processes)} sealed other bytes than most of those with the "
                "same shards, or than the lowest slice where none are most, and get the bytes of these. A "
                "device or memory damaged data silently: lines of operation 'replicas' tell in which leaves",
            )

    def _mismatch(self, planner: Planner, plan: RestorePlan, wanted: Wanted) -> str:
        """Why the step of the plan cannot give every wanted leaf; empty if it can."""
        if wanted.boxes and plan.step not in planner.persistent:
            return _not_in_slots(planner, plan.step, wanted)
        return persistent_mismatch(self._job, plan.step, plan.uses_persistent, wanted)

    def _restored(
        self, held: Held, plan: PlanOfOne, wanted: Wanted, filling: Filling, started: float
    ) -> Restored:
        entries = wanted.part.entries(self._job.process)
        nbytes = sum(entry.nbytes for entry in entries)
        sources = filling.sources
        if plan.own.sender is not None:
            sender = self._job.layout.process_slice[plan.own.sender]
            sources = (SourceBytes(f"broadcast from slice {sender}", len(entries), nbytes),)
        report = RestoreReport(
            step=plan.step.step,
            generation=plan.step.generation,
            reason=plan.common.reason,
            source=_source_name(sources, wanted),
            seconds=time.monotonic() - started,
            bytes=nbytes,
            sources=sources,
        )
        return Restored(wanted.tree(held.leaves), held.received, report)

    def _event(self, report: RestoreReport) -> RestoreEvent:
        return RestoreEvent(
            step=report.step,
            saved_generation=report.generation,
            plan=report.source,
            reason=report.reason,
            sources=report.sources,
            seconds=report.seconds,
        )


def _ended(begun: EarlyHydration | None) -> None:
    if begun is not None:
        begun.end()


def _with_persistent_copy(planner: Planner, strikes: set[Strike]) -> Planner:
    """For walking back to steps that can give what only the persistent tier may have."""
    usable = {step for step in planner.persistent if Strike(step, None) not in strikes}
    return dataclasses.replace(
        planner,
        inventories=tuple(
            dataclasses.replace(each, holdings=tuple(h for h in each.holdings if h.step in usable))
            for each in planner.inventories
        ),
    )


def _not_in_slots(planner: Planner, step: StepId, wanted: Wanted) -> str:
    """Why `step`, which is not in the persistent tier, cannot give every wanted leaf, and what can."""
    others = [s.step for s in planner.restorable() if s in planner.persistent]
    instead = f"restore one of the steps {others}, which are there" if others else "there is no step there"
    return (
        f"{step} is on the ramdisks only, where shards lie as this manager's state is cut. These leaves are "
        "wanted otherwise and can only be read from the persistent tier:\n  "
        + "\n  ".join(wanted.reasons)
        + "\n"
        f"Ask for them with the shapes and shardings of this manager's state, or {instead}."
    )


def _source_name(sources: Sequence[SourceBytes], wanted: Wanted) -> str:
    """The sources in a few words; processes that gave something together."""
    names = [source.source for source in sources]
    peers = [int(name.removeprefix(PEER)) for name in names if name.startswith(PEER)]
    named = [name for name in names if not name.startswith(PEER)]
    named += [processes_named(peers)] if peers else []
    if not wanted.slots:
        return PERSISTENT
    boxes = [f"{len(wanted.boxes)} leaves {PERSISTENT}"] if wanted.boxes and named != [PERSISTENT] else []
    return ", ".join([*named, *boxes])


def _told(found: Setbacks) -> str:
    return "; ".join([*(strike.why for strike in found.strikes), *found.unreachable.values()])
