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
from collections.abc import Sequence
from typing import Any

import jax

from emergency_ckpt.core.inventory import Inventory
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.restore_plan import RestorePlan, SourceKind, Strike
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import (
    CorruptDataError,
    NoRestorableStepError,
    PersistentStoreError,
)
from emergency_ckpt.jaxio.assemble import StoredShard, assemble
from emergency_ckpt.jaxio.broadcast import Transfer, broadcast_regions
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.persistent.store import Generation
from emergency_ckpt.runtime.agreement import agree, tell
from emergency_ckpt.runtime.hydrate import Hydrated, Hydration, make_manifest
from emergency_ckpt.runtime.job import Job
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

    def survey(self) -> Survey:
        """Finds out what can be restored now. Collective."""
        job = self._job
        key = f"survey/{next(self._sessions)}"
        surveyed: list[Survey] = []

        def decide(inventories: list[Any]) -> Any:
            parsed = [Inventory.from_bytes(json.dumps(raw).encode()) for raw in inventories]
            survey = take_survey(parsed, job.persistent, job.layout, job.topology, job.settings)
            surveyed.append(survey)
            return survey.to_json()

        def mine() -> Any:
            inventory = own_inventory(job.local, job.process, job.topology.process_count)
            return json.loads(inventory.to_bytes())

        answer = agree(job.coordinator, key, mine, decide, job.settings.coordination_timeout)
        survey = Survey.from_json(answer, surveyed[0].planner if surveyed else None)
        job.local.activate(survey.activations)
        return survey

    def restore(self, survey: Survey, wanted: int | None, generation: Generation) -> Restored:
        """Restores the newest restorable step, or step `wanted`, as the beginning of `generation`. Collective.

        Raises NoRestorableStepError, with the reasons, when there is none.
        """
        job = self._job
        session = f"restore/{next(self._sessions)}"
        started = time.monotonic()
        strikes: set[Strike] = set()
        for round_number in itertools.count():
            key = f"{session}/{round_number}"
            plan = self._plan(f"{key}/plan", survey, wanted, strikes)
            attempt = _Attempt(job, plan, self._abstract_state, self._mesh, self._replica_axis)
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
            newest = max((s.step for s in survey.planner.restorable(strikes)), default=None)
            return {"plan": plan.to_json() if plan else None, "reason": reason, "newest": newest}

        answer = tell(job.coordinator, key, make, job.settings.coordination_timeout)
        if answer["plan"] is None:
            asked = "No step can be restored" if wanted is None else f"Step {wanted} cannot be restored"
            other = "" if answer["newest"] is None else f" The newest restorable step is {answer['newest']}."
            raise NoRestorableStepError(f"{asked}: {answer['reason']}.{other}")
        return RestorePlan.from_json(answer["plan"])

    def _report(self, restored: _Held, plan: RestorePlan, started: float) -> Restored:
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


@dataclasses.dataclass(frozen=True)
class _Held:
    """The restored state of this process, before anything is reported."""

    state: Any
    extras: str | None
    why_no_extras: str


class _Attempt:
    """One round: one plan carried out by this process."""

    def __init__(
        self, job: Job, plan: RestorePlan, abstract_state: Any, mesh: jax.sharding.Mesh, replica_axis: str
    ) -> None:
        self._job = job
        self._plan = plan
        self._abstract_state = abstract_state
        self._mesh = mesh
        self._replica_axis = replica_axis
        self._source = plan.sources[job.process]
        self._whole: Hydrated | None = None
        self._receiving: Hydration | None = None
        self._extras: str | None = None
        self._why_no_extras = f"{plan.step} was saved without any"

    def run(self, key: str) -> list[Strike]:
        """Makes this process's slot whole. Returns the sources that turned out bad, alike on all processes."""
        found = self._agree(f"{key}/hydrated", lambda: self._hydrate(key))
        if not found and any(source.kind is SourceKind.BROADCAST for source in self._plan.sources):
            found = self._agree(f"{key}/received", lambda: self._broadcast(key))
        return found

    def finish(self, key: str, activation: Activation) -> _Held | list[Strike]:
        """Assembles the state; once all processes hold it, what it leaves behind is void."""
        job = self._job
        held: list[_Held] = []

        def mine() -> list[Strike]:
            try:
                held.append(self._assemble())
            except CorruptDataError as error:
                job.log.error("restore", self._plan.step.step, str(error))
                return [self._own_strike()]
            return []

        found = self._agree(key, mine, activation)
        if found:
            return found
        job.local.activate([activation])
        job.local.settle(self._plan.step, Outcome.COMPLETE)
        assert self._whole is not None
        self._whole.settle()
        return held[0]

    def close(self) -> None:
        """Gives back the slot of a broadcast that was not received."""
        receiving, self._receiving = self._receiving, None
        if receiving is not None:
            receiving.discard()

    def _agree(self, key: str, work: Any, activation: Activation | None = None) -> list[Strike]:
        """Does this process's part; all learn of every source that anybody struck."""
        job = self._job

        def decide(answers: list[Any]) -> Any:
            found = sorted({tuple(strike) for answer in answers for strike in answer}, key=str)
            if not found and activation is not None:
                job.persistent.record_activation(activation)
            return [list(strike) for strike in found]

        answer = agree(
            job.coordinator,
            key,
            lambda: [_strike_json(strike) for strike in work()],
            decide,
            job.settings.drain_timeout + job.settings.coordination_timeout,
        )
        return [Strike(StepId(g, s), p) for g, s, p in answer]

    # Getting the bytes.

    def _hydrate(self, key: str) -> list[Strike]:
        """Everything but receiving a broadcast: the own slot, or the persistent tier."""
        job, step = self._job, self._plan.step
        self._give_extras(key)
        if self._source.kind is SourceKind.OWN_SLOT:
            slot = job.local.sealed(step)
            if slot is None:
                return [Strike(step, job.process)]
            self._whole = Hydrated(slot, job.local)
        elif self._source.kind is SourceKind.PERSISTENT:
            try:
                self._whole = self._from_persistent()
            except (CorruptDataError, PersistentStoreError) as error:
                job.log.error("restore", step.step, str(error))
                return [Strike(step, None)]
        else:
            # Made before anybody enters the broadcast, so that an error here is agreed on first.
            self._receiving = Hydration(job, step)
        if self._whole is not None and self._receivers(job.process):
            job.coordinator.put(f"{key}/manifest/{job.process}", self._whole.slot.manifest.to_bytes())
        return []

    def _from_persistent(self) -> Hydrated:
        job, step = self._job, self._plan.step
        reader = self._reader()
        reader.check_leaves(job.layout.leaves)
        if not reader.verified:
            job.log.warning(
                "restore", step.step, f"{reader.path} was written by another program: its bytes are unverified"
            )
        hydration = Hydration(job, step)
        try:
            checksums = hydration.read_persistent(reader)
        except BaseException:
            hydration.discard()
            raise
        self._take_persistent_extras(reader)
        own = {job.process: self._extras} if self._extras is not None else {}
        metadata = {}
        if reader.side is not None:
            metadata = {
                "custom_metadata": dict(reader.side.custom_metadata),
                "metrics": dict(reader.side.metrics),
            }
        values = {name: value for name, value in reader.values().items() if name in job.layout.value_leaves}
        return hydration.seal(make_manifest(job, step, checksums, values, own, metadata))

    def _reader(self) -> StepReader:
        step = self._plan.step
        for held in self._job.persistent.steps():
            if held.step_id == step:
                return StepReader(held.path, held.item)
        raise PersistentStoreError(
            f"{step} disappeared from {self._job.persistent.root} since it was listed; was it deleted by hand?"
        )

    def _broadcast(self, key: str) -> list[Strike]:
        """Sends or receives slot bytes over the device network; what arrives is verified before it counts."""
        hydration, self._receiving = self._receiving, None
        sent = self._whole.slot.data if self._whole else None
        try:
            broadcast_regions(
                self._mesh,
                self._replica_axis,
                self._transfers(),
                read_window=lambda offset, length: sent[offset : offset + length],  # type: ignore[index]
                write_window=lambda offset, data: hydration.write(offset, data),  # type: ignore[union-attr]
            )
            return self._verify_received(key, hydration) if hydration is not None else []
        except BaseException:
            if hydration is not None:
                hydration.discard()
            raise

    def _verify_received(self, key: str, hydration: Hydration) -> list[Strike]:
        job, step = self._job, self._plan.step
        sender = self._source.process
        assert sender is not None
        where = f"{key}/manifest/{sender}"
        sent = Manifest.from_bytes(job.coordinator.get(where, job.settings.coordination_timeout), where)
        extras = {**sent.extras}
        if self._plan.extras_from[job.process] is not None:
            extras[job.process] = self._receive_extras(key)
        elif self._plan.sources[sender].kind is SourceKind.PERSISTENT:
            self._take_persistent_extras(self._reader())
            if self._extras is not None:
                extras[job.process] = self._extras
        manifest = make_manifest(job, step, sent.checksums, sent.values, extras, sent.metadata)
        damage = hydration.sealed_as(manifest).find_damage()
        if damage:
            job.log.error("restore", step.step, f"what process {sender} sent does not verify: {damage}")
            hydration.discard()
            from_store = self._plan.sources[sender].kind is SourceKind.PERSISTENT
            return [Strike(step, None if from_store else sender)]
        self._whole = hydration.seal(manifest)
        return []

    def _transfers(self) -> list[Transfer]:
        layout = self._job.layout
        senders = sorted({s.process for s in self._plan.sources if s.process is not None})
        return [Transfer(p, self._receivers(p), 0, layout.data_bytes(p)) for p in senders]

    def _receivers(self, sender: int) -> tuple[int, ...]:
        return tuple(
            p
            for p, source in enumerate(self._plan.sources)
            if source.kind is SourceKind.BROADCAST and source.process == sender
        )

    # Extras.

    def _give_extras(self, key: str) -> None:
        """Sends the extras that this process keeps for those that lost theirs."""
        job = self._job
        wards = [p for p, keeper in enumerate(self._plan.extras_from) if keeper == job.process and p != keeper]
        slot = job.local.sealed(self._plan.step) if wards else None
        for ward in wards:
            text = slot.manifest.extras.get(ward) if slot else None
            if text is None:
                raise CorruptDataError(
                    f"process {job.process} no longer has the extras of process {ward} for {self._plan.step}"
                )
            job.coordinator.put(f"{key}/extras/{ward}", text.encode())

    def _take_persistent_extras(self, reader: StepReader) -> None:
        """Extras belong to a process of a job of one size; those of another size fit nobody."""
        saved, count = reader.extras, self._job.topology.process_count
        if len(saved) == count:
            self._extras = saved[str(self._job.process)].decode()
        elif saved:
            self._why_no_extras = (
                f"{self._plan.step} was saved by {len(saved)} processes and this job has {count}, so that no "
                "process can tell which of them are its own"
            )

    def _receive_extras(self, key: str) -> str:
        job = self._job
        found = job.coordinator.get(f"{key}/extras/{job.process}", job.settings.coordination_timeout)
        self._extras = found.decode()
        return self._extras

    # Arrays.

    def _assemble(self) -> _Held:
        assert self._whole is not None
        job, slot = self._job, self._whole.slot
        if self._source.kind is SourceKind.OWN_SLOT:
            self._extras = slot.manifest.extras.get(job.process)
        state = assemble(
            self._abstract_state,
            job.layout,
            job.process,
            slot.manifest.step.generation,
            lambda shard: StoredShard(slot.shard(shard), slot.checksums(shard)),
            slot.manifest.values,
        )
        return _Held(state, self._extras, self._why_no_extras)

    def _own_strike(self) -> Strike:
        """The source that this process's bytes came from."""
        step, job = self._plan.step, self._job
        job.local.give_up(step)
        if self._source.kind is SourceKind.OWN_SLOT:
            return Strike(step, job.process)
        if self._source.kind is SourceKind.BROADCAST:
            sender = self._plan.sources[self._source.process or 0]
            return Strike(step, self._source.process if sender.kind is SourceKind.OWN_SLOT else None)
        return Strike(step, None)


def _source_name(job: Job, plan: RestorePlan) -> str:
    source = plan.sources[job.process]
    if source.kind is SourceKind.BROADCAST and source.process is not None:
        return f"broadcast from slice {job.layout.process_slice[source.process]}"
    return source.kind.value


def _strike_json(strike: Strike) -> Sequence[int | None]:
    return [strike.step.generation, strike.step.step, strike.process]
