"""The restore session: all processes restore one step together, or raise together.

Rounds of: process 0 plans; each process makes its slot whole; bytes are broadcast where slices lack them; each
assembles and verifies its arrays. A bad source found in any of these is struck and the next round plans without
it. Only when every process holds the state do the steps left behind become void (invariants 1, 4, 5).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from typing import Any

import jax

from emergency_ckpt.core.inventory import Inventory
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.restore_plan import RestorePlan, SourceKind, Strike
from emergency_ckpt.errors import NoRestorableStepError, StateMismatchError
from emergency_ckpt.persistent.store import Generation
from emergency_ckpt.runtime.agreement import agree, tell
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.runtime.layout_exchange import fetch_layouts, publish_layouts
from emergency_ckpt.runtime.restore_attempt import Attempt, Held, persistent_mismatch
from emergency_ckpt.runtime.survey import Survey, own_inventory, take_survey
from emergency_ckpt.telemetry.events import RejectedStepEvent, RestoreEvent, SourceBytes


@dataclasses.dataclass(frozen=True)
class RestoreReport:
    """What a restore did.

    Attributes:
      step: the restored step. generation: the generation that saved it (0: another program).
      reason: why this step and these sources.
      source: where this process's shards came from, in words.
      seconds: from the call until the arrays were ready. bytes: shards of this process.
    """

    step: int
    generation: int
    reason: str
    source: str
    seconds: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class Restored:
    """The state, this process's extras as JSON text (or why there are none), and the report."""

    state: Any
    extras: str | None
    why_no_extras: str
    report: RestoreReport


class Restorer:
    """Surveys and restores of one manager. All processes make the same calls in the same order."""

    def __init__(self, job: Job, abstract_state: Any, mesh: jax.sharding.Mesh) -> None:
        self._job = job
        self._abstract_state = abstract_state
        self._mesh = mesh
        axis = job.settings.replica_axis
        self._replica_axis = str(axis if isinstance(axis, str) else mesh.axis_names[axis])
        self._sessions = itertools.count()
        self.remaining: tuple[StepId, ...] = ()  # what the last failed restore left restorable, oldest first

    def survey(self) -> Survey:
        """Finds out what can be restored now. Collective."""
        job, timeout = self._job, self._job.settings.coordination_timeout
        key = f"survey/{next(self._sessions)}"
        surveyed: list[Survey] = []

        def decide(inventories: list[Any]) -> Any:
            parsed = [Inventory.from_bytes(json.dumps(raw).encode()) for raw in inventories]
            others = fetch_layouts(job.coordinator, f"{key}/layouts", parsed, job.layout, timeout)
            survey = take_survey(parsed, job.persistent, job.layout, job.topology, job.settings, others)
            surveyed.append(survey)
            return survey.to_json()

        def mine() -> Any:
            inventory = own_inventory(job.local, job.process, job.topology.process_count)
            publish_layouts(job.coordinator, f"{key}/layouts", job.local, inventory.holdings)
            return json.loads(inventory.to_bytes())

        answer = agree(job.coordinator, key, mine, decide, timeout)
        survey = Survey.from_json(answer, surveyed[0].planner if surveyed else None)
        job.local.activate(survey.activations)
        return survey

    def restore(self, survey: Survey, wanted: int | None, generation: Generation) -> Restored:
        """Restores the newest restorable step, or step `wanted`, as the beginning of `generation`. Collective.

        Raises NoRestorableStepError, with the reasons, when there is none, and StateMismatchError, with every
        leaf that differs, when the persistent step to be read is one of another state; both on all processes.
        """
        job = self._job
        session = f"restore/{next(self._sessions)}"
        started = time.monotonic()
        strikes: set[Strike] = set()
        for round_number in itertools.count():
            key = f"{session}/{round_number}"
            plan = self._plan(f"{key}/plan", survey, wanted, strikes)
            attempt = Attempt(job, plan, self._abstract_state, self._mesh, self._replica_axis)
            try:
                found = attempt.run(key)
                if not found:
                    restored = attempt.finish(f"{key}/held", Activation(generation.number, plan.step.step))
                    if not isinstance(restored, list):
                        return self._report(restored, plan, started)
                    found = restored
            finally:
                attempt.close()
            strikes.update(found)
            for strike in found:
                where = "the persistent tier" if strike.process is None else f"process {strike.process}"
                job.log.emit(
                    RejectedStepEvent(
                        step=strike.step.step,
                        saved_generation=strike.step.generation,
                        reason=f"the copy of {where} is damaged",
                    )
                )
        raise AssertionError("unreachable: every round restores, raises or strikes a source")

    def _plan(self, key: str, survey: Survey, wanted: int | None, strikes: set[Strike]) -> RestorePlan:
        job = self._job

        def make() -> Any:
            assert survey.planner is not None
            plan, reason = survey.planner.plan(wanted, strikes)
            remaining = [] if plan else survey.planner.restorable(strikes)
            return {
                "plan": plan.to_json() if plan else None,
                "reason": reason,
                "remaining": [[step.generation, step.step] for step in remaining],
                "mismatch": persistent_mismatch(job, plan) if plan else "",
            }

        answer = tell(job.coordinator, key, make, job.settings.coordination_timeout)
        if answer["mismatch"]:
            raise StateMismatchError(answer["mismatch"])
        if answer["plan"] is None:
            self.remaining = tuple(StepId(g, s) for g, s in answer["remaining"])
            newest = self.remaining[-1].step if self.remaining else None
            asked = "No step can be restored" if wanted is None else f"Step {wanted} cannot be restored"
            other = "" if newest is None else f" The newest restorable step is {newest}."
            raise NoRestorableStepError(f"{asked}: {answer['reason']}.{other}")
        return RestorePlan.from_json(answer["plan"])

    def _report(self, restored: Held, plan: RestorePlan, started: float) -> Restored:
        job = self._job
        nbytes = sum(entry.nbytes for entry in job.layout.slot_entries(job.process))
        source = _source_name(job, plan)
        event = RestoreEvent(
            step=plan.step.step,
            saved_generation=plan.step.generation,
            plan=source,
            reason=plan.reason,
            sources=(SourceBytes(source, len(job.layout.process_shards[job.process]), nbytes),),
            seconds=time.monotonic() - started,
        )
        job.log.emit(event)
        report = RestoreReport(plan.step.step, plan.step.generation, plan.reason, source, event.seconds, nbytes)
        return Restored(restored.state, restored.extras, restored.why_no_extras, report)


def _source_name(job: Job, plan: RestorePlan) -> str:
    source = plan.sources[job.process]
    if source.kind is SourceKind.BROADCAST and source.process is not None:
        return f"broadcast from slice {job.layout.process_slice[source.process]}"
    return source.kind.value
