"""Filling: this process's part of a restore plan, carried out over as many rounds as it takes.

What was gathered and verified in one round is not fetched again in the next: only the shards of a source that
was struck come from elsewhere. The result is a whole slot, or memory that becomes one.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from emergency_ckpt.agent.gather import Target, gather
from emergency_ckpt.agent.slot_source import OwnSlot, SlotSource
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.part import Part
from emergency_ckpt.core.placement import extras_keepers
from emergency_ckpt.core.restore_plan import ProcessPlan, Take
from emergency_ckpt.core.values import Value
from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.runtime.hydrate import Hydrated, Hydration, Repair, fitted, make_manifest
from emergency_ckpt.runtime.job import Job, open_peer_slot
from emergency_ckpt.runtime.setbacks import NONE, Setbacks
from emergency_ckpt.telemetry.events import SourceBytes
from emergency_ckpt.telemetry.metrics import Metric

OWN, PERSISTENT, PEER = "own slot", "persistent", "process "


class Filling:
    """One step on its way into this process's memory. Close it in the end, whatever became of it."""

    def __init__(self, job: Job, step: StepId, part: Part) -> None:
        self.step = step
        self._job = job
        self._part = part
        self._needed = {entry.shard for entry in part.entries(job.process)}
        self._room: Hydration | Repair | None = None
        # Block checksums by shard. Of shards without elements there is nothing to get.
        nbytes = job.layout.shard_nbytes
        self._done: dict[int, tuple[int, ...]] = {shard: () for shard in self._needed if not nbytes[shard]}
        self._kept: SealedSlot | None = None  # the own slot, where it has all that is needed
        self._described: _Described | None = None
        self._kept_extras: dict[int, str] = {}
        keepers = extras_keepers(job.topology.process_slice)
        self._wards = {process for process, by in enumerate(keepers) if job.process in by}
        self._read: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])

    @property
    def saved_by(self) -> Manifest | None:
        """A manifest of the job that saved the step, where one was read."""
        return self._described.manifest if self._described else None

    @property
    def sources(self) -> tuple[SourceBytes, ...]:
        """How many shards and bytes came from where."""
        return tuple(SourceBytes(name, shards, nbytes) for name, (shards, nbytes) in self._read.items())

    def carry_out(self, plan: ProcessPlan, open_reader: Callable[[], StepReader]) -> Setbacks:
        """Gets what the plan says and this process does not have yet; returns the sources that failed.

        Raises PersistentStoreError, StateMismatchError; CorruptDataError of the persistent tier is a strike.
        """
        takes = list(plan.takes)
        if plan.in_place:
            slot = self._job.local.sealed(self.step)
            if slot is None:
                return Setbacks.of(self.step, self._job.process, "it was given up meanwhile")
            self._described = _Described.by(slot.manifest)
            missing = self._missing_in(slot)
            if not missing:
                self._kept = slot
                self._count(OWN, self._needed)
                return NONE
            if not self._repairs():
                takes.append(self._own_take(slot, missing))
        elif isinstance(self._room, Repair):
            self.close()  # Its own slot is no source any more.
        self._kept = None
        setbacks = self._gather(takes)
        persistent = [s for s in plan.persistent if s in self._needed and s not in self._done]
        if not setbacks and (persistent or self._described is None):
            setbacks = self._read_persistent(persistent, open_reader)
        return setbacks or self._count_repaired()

    def finish(self, extras: Mapping[int, str]) -> Hydrated:
        """The step as a slot, with these extras of this process. Call when nothing is missing any more.

        Raises LocalDirectoryError; CorruptDataError where something is missing all the same.
        """
        job, layout, process = self._job, self._job.layout, self._job.process
        if isinstance(self._room, Repair):
            self._room.end()
            self._kept = job.local.sealed(self.step)
        if self._kept is not None:
            return Hydrated(fitted(self._kept, layout, process), job.local)
        lacking = sorted(self._needed - set(self._done))
        if lacking or self._described is None:
            named = ", ".join(str(layout.shards[shard]) for shard in lacking[:5])
            raise CorruptDataError(f"the plan for {self.step} gave process {process} no {named or 'values'}")
        room = self._the_room()
        assert isinstance(room, Hydration)
        checksums = tuple(self._done.get(entry.shard, ()) for entry in layout.slot_entries(process))
        described = self._described
        manifest = make_manifest(
            job,
            self.step,
            checksums,
            described.values,
            {**self._kept_extras, **extras},
            described.metadata,
        )
        sealed = room.seal(manifest)
        self._room = None
        return sealed

    def forget(self) -> None:
        """What was gathered cannot be relied on."""
        self._done = {shard: checksums for shard, checksums in self._done.items() if not checksums}
        self._kept = self._described = None

    def close(self) -> None:
        """Gives back the memory of what was not finished. Repeating it is fine."""
        room, self._room = self._room, None
        if isinstance(room, Repair):
            room.end()
        elif room is not None:
            room.discard()

    # The parts.

    def _gather(self, takes: Collection[Take]) -> Setbacks:
        wanted = self._needed - set(self._done)
        if isinstance(self._room, Repair):
            wanted &= set(self._room.missing)
        # Where replicas have different values, a take without shards says whose count.
        describing = next((take for take in takes if not take.shards), None)
        if not wanted:
            takes = [describing] if describing and self._described is None else []
        if not takes:
            return NONE
        target = Target(self.step, self._job.layout, wanted, self._the_room().place)
        gathered = gather(target, takes, self._open_source)
        self._job.peers.forget(gathered.unreachable)
        self._done.update(gathered.checksums)
        for process, manifest in sorted(gathered.manifests.items()):
            if describing is None or process == describing.process:
                self._described = self._described or _Described.by(manifest)
            self._keep_extras(manifest)
        fetched = 0
        for process, (shards, nbytes) in gathered.sources.items():
            own = process == self._job.process
            self._add(OWN if own else f"{PEER}{process}", shards, nbytes)
            fetched += 0 if own else nbytes
        self._job.log.metrics.add(Metric.FETCHED_BYTES, fetched)
        return Setbacks(gathered.strikes, gathered.unreachable)

    def _keep_extras(self, manifest: Manifest) -> None:
        """A slot that is made anew has the extras that this process keeps for others, if its sources do."""
        count, wards = self._job.topology.process_count, self._wards
        if manifest.process_count == count:
            self._kept_extras |= {p: text for p, text in manifest.extras.items() if p in wards}

    def _open_source(self, take: Take) -> SlotSource:
        job = self._job
        if take.process == job.process:
            slot = job.local.sealed(self.step)
            if slot is None or (slot.manifest.layout, slot.manifest.position) != (take.layout, take.position):
                raise CorruptDataError(f"{self.step} is not on this ramdisk any more")
            return OwnSlot(job.process, slot)
        return open_peer_slot(job, self.step, take)

    def _read_persistent(self, shards: Collection[int], open_reader: Callable[[], StepReader]) -> Setbacks:
        """Only what is proven to be damaged may cost a step; a store that fails is an error of the restore."""
        try:
            reader = open_reader()
            if self._described is None:
                self._described = _Described.of_persistent(reader, self._part)
            self._done.update(self._the_room().read_persistent(reader, shards))
        except CorruptDataError as error:
            self._job.log.error("restore", self.step.step, str(error))
            return Setbacks.of(self.step, None, str(error))
        if shards:
            self._count(PERSISTENT, shards)
        return NONE

    def _count_repaired(self) -> Setbacks:
        """Bytes that other replicas agree on, and that are not what this slot had, leave the slot useless."""
        if not isinstance(self._room, Repair):
            return NONE
        lacking = set(self._room.missing)
        refused = self._room.count({shard: self._done[shard] for shard in lacking & set(self._done)})
        if not refused and not set(self._room.missing) & self._needed:
            return NONE
        named = ", ".join(str(self._job.layout.shards[shard]) for shard in (refused or self._room.missing)[:5])
        self._room.end()
        self._room = None
        self.forget()
        return Setbacks.of(self.step, self._job.process, f"its slot cannot be repaired: {named}")

    def _repairs(self) -> bool:
        """Whether what is missing goes into the own slot itself."""
        if isinstance(self._room, Repair):
            return True
        if self._room is not None or not self._part.is_whole:
            return False
        slot = self._job.local.begin_repair(self.step)
        if slot is None:
            return False
        self._room = Repair(self._job, slot)
        self._count(OWN, self._needed - set(self._room.missing))
        return True

    def _the_room(self) -> Hydration | Repair:
        if self._room is None:
            self._room = Hydration(self._job, self.step, self._part)
        return self._room

    def _missing_in(self, slot: SealedSlot) -> set[int]:
        """The needed shards that the own slot lacks, as indices into the shards of the job's layout."""
        ours = self._job.layout
        return {ours.shard_index[slot.layout.shards[shard]] for shard in slot.missing} & self._needed

    def _own_take(self, slot: SealedSlot, missing: Collection[int]) -> Take:
        """What the own slot has, for memory in its place."""
        theirs, ours, manifest = slot.layout, self._job.layout, slot.manifest
        there = sorted(theirs.shard_index[ours.shards[shard]] for shard in self._needed - set(missing))
        return Take(self._job.process, manifest.layout, manifest.position, tuple(there))

    def _count(self, source: str, shards: Collection[int]) -> None:
        nbytes = self._job.layout.shard_nbytes
        self._add(source, len(shards), sum(nbytes[shard] for shard in shards))

    def _add(self, source: str, shards: int, nbytes: int) -> None:
        self._read[source][0] += shards
        self._read[source][1] += nbytes


@dataclasses.dataclass(frozen=True)
class _Described:
    """What is the same in all slots of a step."""

    values: Mapping[str, Value]
    metadata: Mapping[str, Any]
    manifest: Manifest | None

    @classmethod
    def by(cls, manifest: Manifest) -> _Described:
        return cls(manifest.values, manifest.metadata, manifest)

    @classmethod
    def of_persistent(cls, reader: StepReader, part: Part) -> _Described:
        side = reader.side
        metadata: dict[str, Any] = {}
        if side is not None:
            metadata = {"custom_metadata": dict(side.custom_metadata), "metrics": dict(side.metrics)}
        return cls(reader.values_of(part.value_leaves), metadata, None)
