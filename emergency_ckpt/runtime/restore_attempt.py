"""One round of a restore session: this process carries out one plan together with all others.

Each makes its slot whole, bytes are broadcast where slices lack them, arrays are assembled from verified bytes.
After each part all processes agree, so that nobody enters a device collective that another has left.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.restore_plan import PlanOfOne, Strike
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import (
    CoordinationTimeoutError,
    CorruptDataError,
    EmergencyCheckpointError,
    PersistentStoreError,
    StateMismatchError,
)
from emergency_ckpt.jaxio.assemble import StoredShard, assemble
from emergency_ckpt.jaxio.broadcast import Transfer, broadcast_regions
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.runtime.agreement import agree
from emergency_ckpt.runtime.early import EarlyHydration
from emergency_ckpt.runtime.extras import ReceivedExtras
from emergency_ckpt.runtime.extras_exchange import ExtrasExchange
from emergency_ckpt.runtime.filling import Filling
from emergency_ckpt.runtime.hydrate import Hydrated, Hydration, make_manifest
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.runtime.loading import read_state
from emergency_ckpt.runtime.setbacks import NONE, Setbacks
from emergency_ckpt.runtime.streaming import Stream, Streamed
from emergency_ckpt.runtime.wanted import Wanted

_READ_PAUSES_SECONDS = (0.5, 2.0, 5.0)
_Read = TypeVar("_Read")


@dataclasses.dataclass(frozen=True)
class Held:
    """The restored leaves of this process by name, before anything is reported."""

    leaves: Mapping[str, Any]
    received: ReceivedExtras


class Attempt:
    """One round: one plan carried out by this process."""

    def __init__(
        self,
        job: Job,
        plan: PlanOfOne,
        wanted: Wanted,
        filling: Filling,
        begun: EarlyHydration | None,
        mesh: jax.sharding.Mesh,
        replica_axis: str,
        is_trusted: bool,
    ) -> None:
        """`filling`: what the rounds before have of this step; `begun`: what may still be filling it.

        `is_trusted`: whether what this process had of the step before may be a source at the next restore.
        """
        self._job = job
        self._plan = plan
        self._wanted = wanted
        self._filling = filling
        self._begun = begun
        self._mesh = mesh
        self._replica_axis = replica_axis
        self._is_trusted = is_trusted
        self._whole: Hydrated | Streamed | None = None
        self._receiving: Hydration | None = None
        self._boxes: Mapping[str, Any] = {}
        self._extras = ExtrasExchange(job, plan.common, wanted.beside)

    def run(self, key: str) -> Setbacks:
        """Makes this process's slot whole, or reads the wanted part of it.

        Returns the sources that failed, alike on all processes.
        """
        found = self._agree(f"{key}/hydrated", lambda: self._hydrate(key))
        if not found and self._plan.common.has_broadcast:
            found = self._agree(f"{key}/received", lambda: self._broadcast(key))
        return found

    def finish(self, key: str, activation: Activation) -> Held | Setbacks:
        """Assembles the state; once all processes hold it, what it leaves behind is void."""
        held = self.hold(key, activation)
        if isinstance(held, Held):
            self._job.local.activate([activation])
            self._job.local.settle(self._plan.step, Outcome.COMPLETE)
            self._settle(held.leaves)
        return held

    def hold(self, key: str, activation: Activation | None = None) -> Held | Setbacks:
        """Assembles what is wanted; once all processes hold it, `activation` is recorded if there is one.

        Where the extras of one process cannot be put in their place, no process restores: data position and
        arrays belong together.
        """
        job = self._job
        held: list[Held] = []

        def mine() -> Setbacks:
            self._extras.give_items(key)
            try:
                leaves = self._assemble()
            except CorruptDataError as error:
                job.log.error("restore", self._plan.step.step, str(error))
                return Setbacks((self._own_strike(str(error)),))
            saved = self._extras.saved(key)
            held.append(Held(leaves, self._wanted.beside.receive(self._plan.step.step, saved)))
            return NONE

        return self._agree(key, mine, activation) or held[0]

    def _settle(self, leaves: Mapping[str, Any]) -> None:
        """Everybody holds the state by now: that this ramdisk cannot take it is no reason to fail."""
        assert self._whole is not None
        try:
            self._whole.settle({name: leaves[name] for name in self._wanted.slots})
            if not self._is_trusted:
                self._job.local.keep_own(self._plan.step)
        except (EmergencyCheckpointError, OSError) as error:
            self._job.log.warning(
                "restore", self._plan.step.step, f"not on this ramdisk until the next save: {error}"
            )

    def close(self) -> None:
        """Gives back the slot of a broadcast that was not received."""
        receiving, self._receiving = self._receiving, None
        if receiving is not None:
            receiving.discard()

    def _agree(self, key: str, work: Callable[[], Setbacks], activation: Activation | None = None) -> Setbacks:
        """Does this process's part; all learn of every source that failed anybody."""
        job = self._job

        def decide(answers: list[Any]) -> Any:
            found = Setbacks.merged(answers)
            if not Setbacks.from_json(found) and activation is not None:
                job.persistent.record_activation(activation)
            return found

        answer = agree(
            job.coordinator,
            key,
            lambda: work().to_json(),
            decide,
            job.settings.drain_timeout + job.settings.coordination_timeout,
        )
        return Setbacks.from_json(answer)

    # Getting the bytes.

    def _hydrate(self, key: str) -> Setbacks:
        """Everything but receiving a broadcast: own slot, other processes' slots, the persistent tier."""
        job, step, own = self._job, self._plan.step, self._plan.own
        self._extras.give(key)
        self._extras.collect(key)
        try:
            if self._wanted.boxes:
                self._boxes = self._read_persistent(self._boxes_from_persistent)
        except CorruptDataError as error:
            # Only what is proven to be damaged may cost a step: a store that fails is asked again, and if it
            # fails for good, the restore fails and nothing becomes void.
            job.log.error("restore", step.step, str(error))
            return Setbacks.of(step, None, str(error))
        self._await_begun()
        if own.sender is not None:
            self._filling.give_back()  # What came in an earlier round takes no slot, and no memory, any more.
            # Made before anybody enters the broadcast, so that an error here is agreed on first.
            self._receiving = Hydration.begin(job, step, self._wanted.part)
            return NONE
        sends = self._plan.common.sends_broadcast(job.process)
        # Who sends needs the bytes, and so does a slot with copies, whose sources may be gone later.
        keeps_copies = job.layout.process_shards[job.process] != job.device_layout.process_shards[job.process]
        streams = None if sends or keeps_copies else self._make_stream
        setbacks = self._read_persistent(lambda: self._filling.carry_out(own, self._checked_reader, streams))
        if setbacks:
            return setbacks
        if self._filling.from_persistent and self._plan.common.extras_from[job.process] is None:
            self._read_persistent(lambda: self._extras.take_persistent(self._checked_reader()))
        if self._filling.saved_by is not None:
            self._extras.note_saved_by(self._filling.saved_by)
        self._whole = self._filling.finish(self._extras.own, sends=sends)
        if sends:
            assert isinstance(self._whole, Hydrated)
            job.coordinator.put(f"{key}/manifest/{job.process}", self._whole.slot.manifest.to_bytes())
        return NONE

    def _make_stream(self) -> Stream:
        job, step = self._job, self._plan.step
        job.log.info("restore", step.step, "no slot is free: shards go to the devices through a window")
        return Stream(job, self._wanted.slots, step.generation)

    def _await_begun(self) -> None:
        limit = self._job.settings.drain_timeout
        if self._begun is not None and not self._begun.wait(limit):
            raise CoordinationTimeoutError(
                f"what was begun to be fetched of {self._plan.step} when the manager was made has not ended "
                f"within {limit.total_seconds():.0f} s: look whether the agents and the persistent tier answer"
            )

    def _read_persistent(self, read: Callable[[], _Read]) -> _Read:
        for pause_seconds in _READ_PAUSES_SECONDS:
            try:
                return read()
            except PersistentStoreError as error:
                self._job.log.warning(
                    "restore", self._plan.step.step, f"reading is tried again in {pause_seconds} s: {error}"
                )
                time.sleep(pause_seconds)
        return read()

    def _boxes_from_persistent(self) -> Mapping[str, Any]:
        """The leaves that are wanted otherwise than the slots have them."""
        settings, reader = self._job.settings, self._checked_reader()
        seconds = settings.drain_timeout.total_seconds()
        return read_state(reader, self._wanted.boxes, self._job.topology, settings.read_bytes, seconds)

    def _checked_reader(self) -> StepReader:
        """The step in the persistent tier, known to have every wanted leaf."""
        reader = self._job.open_persistent(self._plan.step)
        reader.check_leaves(self._wanted.leaves, self._wanted.values, self._wanted.keys)
        if not reader.verified:
            self._job.log.warning(
                "restore",
                self._plan.step.step,
                f"{reader.path} was written by another program: its bytes are unverified",
            )
        elif self._plan.step.generation == 0:
            self._job.log.warning("restore", self._plan.step.step, f"{reader.path} is a step of another run")
        return reader

    def _broadcast(self, key: str) -> Setbacks:
        """Sends or receives slot bytes over the device network; what arrives is verified before it counts."""
        hydration, self._receiving = self._receiving, None
        sent = self._whole.slot.data if isinstance(self._whole, Hydrated) else None
        try:
            broadcast_regions(
                self._mesh,
                self._replica_axis,
                self._transfers(),
                read_window=lambda offset, length: sent[offset : offset + length],  # type: ignore[index]
                write_window=lambda offset, data: hydration.write(offset, data),  # type: ignore[union-attr]
            )
            return self._verify_received(key, hydration) if hydration is not None else NONE
        except BaseException:
            if hydration is not None:
                hydration.discard()
            raise

    def _verify_received(self, key: str, hydration: Hydration) -> Setbacks:
        job, step = self._job, self._plan.step
        sender = self._plan.own.sender
        assert sender is not None
        where = f"{key}/manifest/{sender}"
        sent = Manifest.from_bytes(job.coordinator.get(where, job.settings.coordination_timeout), where)
        self._extras.note_saved_by(sent)
        from_store = sender in self._plan.common.readers
        if not self._extras.own and from_store:
            self._extras.take_persistent(job.open_persistent(step))
        kept = sent.extras if sent.process_count == job.topology.process_count else {}
        extras = {**kept, **self._extras.own}
        manifest = make_manifest(job, step, sent.checksums, sent.values, extras, sent.metadata)
        damage = hydration.find_damage(manifest)
        if damage:
            why = f"what process {sender} sent does not verify: {damage}"
            job.log.error("restore", step.step, why)
            hydration.discard()
            return Setbacks.of(step, None if from_store else sender, why)
        self._whole = hydration.seal(manifest)
        return NONE

    def _transfers(self) -> list[Transfer]:
        common, ranges = self._plan.common, self._wanted.part.ranges
        senders = sorted({sender for sender in common.senders if sender is not None})
        return [
            Transfer(p, common.receivers(p), offset, nbytes) for p in senders for offset, nbytes in ranges(p)
        ]

    # Arrays.

    def _assemble(self) -> Mapping[str, Any]:
        assert self._whole is not None
        if isinstance(self._whole, Streamed):
            return dict(self._whole.stream.finish(self._whole.manifest.values))
        job, whole = self._job, self._whole

        def stored(shard: int) -> StoredShard:
            source = whole.source_of(shard)
            return StoredShard(source.shard(shard), source.checksums(shard))

        leaves = assemble(
            self._wanted.slots,
            job.needed_layout,
            job.process,
            whole.slot.manifest.step.generation,
            stored,
            whole.slot.manifest.values,
        )
        return {**leaves, **self._boxes}

    def _own_strike(self, why: str) -> Strike:
        """The source that this process's bytes came from, which have changed since they were verified."""
        step, job, own = self._plan.step, self._job, self._plan.own
        if own.sender is not None:
            return Strike(step, None if own.sender in self._plan.common.readers else own.sender, None, why)
        keeps_own = self._filling.keeps_own
        if not own.in_place:
            self._filling.forget()
        if not own.in_place and not keeps_own:
            return Strike(step, job.process, None, f"what it gathered was damaged in its own memory: {why}")
        held = job.local.verify_step(step)
        if held is None or not held.missing:
            return Strike(step, job.process, None, why)
        layout = job.local.saved_layout(held.layout)
        return Strike(step, job.process, frozenset(layout.shards[shard] for shard in held.missing), why)


def persistent_mismatch(job: Job, step: StepId, reads: bool, wanted: Wanted) -> str:
    """Every leaf in which the persistent step of a plan differs from what is wanted; empty if none does.

    Process 0 asks before anybody reads, so that all processes raise the same error. A step that cannot be read
    is none of its business: whoever is to read it finds out, and says so. `reads`: whether anybody reads it.
    """
    if not wanted.boxes and not reads:
        return ""
    try:
        job.open_persistent(step).check_leaves(wanted.leaves, wanted.values, wanted.keys)
    except StateMismatchError as error:
        return str(error)
    except (CorruptDataError, PersistentStoreError) as error:
        job.log.warning("restore", step.step, f"its leaves could not be looked at before it is read: {error}")
    return ""
