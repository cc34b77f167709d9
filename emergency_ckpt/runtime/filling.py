"""Filling: this process's part of a restore plan, carried out over as many rounds as it takes.

What was gathered and verified in one round is not fetched again in the next: only the shards of a source that
was struck come from elsewhere. The result is a whole slot, or memory that becomes one.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from emergency_ckpt.agent.gather import Course, Target, gather
from emergency_ckpt.agent.slot_source import OwnSlot, SlotSource
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.part import Part
from emergency_ckpt.core.placement import extras_keepers
from emergency_ckpt.core.restore_plan import ProcessPlan, Strike, Take
from emergency_ckpt.core.shards import Shard
from emergency_ckpt.core.values import Value
from emergency_ckpt.errors import CorruptDataError, LocalDirectoryError
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.runtime.hydrate import (
    Hydrated,
    Hydration,
    OwnPart,
    Repair,
    fitted,
    make_manifest,
    read_shards,
)
from emergency_ckpt.runtime.job import Job, open_peer_slot
from emergency_ckpt.runtime.setbacks import NONE, Setbacks
from emergency_ckpt.runtime.streaming import Stream, Streamed
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
        self._stream: Stream | None = None  # in place of a room
        # Block checksums by shard. Of shards without elements there is nothing to get.
        nbytes = job.needed_layout.shard_nbytes
        self._done: dict[int, tuple[int, ...]] = {shard: () for shard in self._needed if not nbytes[shard]}
        self._from_slots: set[int] = set()  # those of them that came from slots
        self._kept: SealedSlot | None = None  # the own slot, where it has all that is needed
        self._own: OwnPart | None = None  # the same where it has this process's part of what slices share
        self._described: _Described | None = None
        self._kept_extras: dict[int, str] = {}
        keepers = extras_keepers(job.topology.process_slice)
        self._wards = {process for process, by in enumerate(keepers) if job.process in by}
        self._read: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        self.from_persistent = False  # whether the persistent tier was read
        self._is_abandoned = False
        self._left: Repair | None = None  # the own slot, where a thread may still write after `abandon`

    @property
    def saved_by(self) -> Manifest | None:
        """A manifest of the job that saved the step, where one was read."""
        return self._described.manifest if self._described else None

    @property
    def sources(self) -> tuple[SourceBytes, ...]:
        """How many shards and bytes came from where."""
        return tuple(SourceBytes(name, shards, nbytes) for name, (shards, nbytes) in self._read.items())

    def carry_out(
        self,
        plan: ProcessPlan,
        open_reader: Callable[[], StepReader],
        streams: Callable[[], Stream] | None = None,
    ) -> Setbacks:
        """Gets what the plan says and this process does not have yet; returns the sources that failed.

        `streams`: makes the way to the devices that is taken where no slot is free; None: plain memory is used.
        Raises PersistentStoreError, StateMismatchError; CorruptDataError of the persistent tier is a strike.
        """
        takes = list(plan.takes)
        if not plan.in_place and not takes and self._from_slots:
            self.forget()  # Nothing that slots gave is to meet what the persistent tier gives.
        if self._stream is not None and (streams is None or plan.in_place):
            self.forget()
        if plan.in_place:
            slot = self._whole_cut()
            if slot is None:
                return Setbacks.of(self.step, self._job.process, "it was given up meanwhile")
            self._described = _Described.by(slot.manifest)
            missing = self._missing_in(slot)
            if not missing:
                self._kept = slot
                self._count(OWN, self._needed)
                return NONE
            if not self._repairs(slot):
                takes.append(self._own_take(slot, missing))
        elif isinstance(self._room, Repair):
            self.give_back()  # Its own slot is no source any more.
        self._kept = None
        streams_whole = self._part.is_whole and self._job.stores_all
        if self._room is None and self._stream is None and streams is not None and streams_whole:
            self._room = Hydration.in_slot(self._job, self.step, self._part)
            if self._room is None:
                self._stream = streams()
        if self._stream is not None:
            return self._get_in_windows(self._stream, takes, plan, open_reader)
        setbacks = self._keep_own(plan.takes) or self._get(self._to_be_copied(takes), plan, open_reader)
        return setbacks or self._count_repaired() or self._repair_own()

    def fetch_ahead(self, plan: ProcessPlan, open_reader: Callable[[], StepReader], course: Course) -> bool:
        """Before a restore was called: gets what fits into the own slot or a free one, and seals nothing.

        What fails is left to `carry_out`, which goes on from here. False where there is no such slot, and where
        slots hold a part of the state only. Call `close` or `abandon` once `course` was stopped. Raises what
        `carry_out` does.
        """
        if not self._job.stores_all:
            return False
        if plan.in_place:
            slot = self._whole_cut()
            if slot is None or not self._missing_in(slot) or not self._repairs(slot):
                return False
            self._described = _Described.by(slot.manifest)
        else:
            self._room = room = Hydration.begin_unasked(self._job, self.step, self._part)
            if room is None or not room.has_slot():
                return False
        self._get(plan.takes, plan, open_reader, course)
        return True

    def _get_in_windows(
        self, stream: Stream, takes: Collection[Take], plan: ProcessPlan, open_reader: Callable[[], StepReader]
    ) -> Setbacks:
        """All that can be got now, whatever fails on the way."""
        readers: list[StepReader] = []

        def reader() -> StepReader:
            if not readers:
                readers.append(open_reader())
            return readers[0]

        found = NONE
        for places in stream.windows(self._needed - stream.placed):
            left = [take for take in takes if not found.names(take.process)]
            setbacks = self._gather(left, None, places)
            persistent = [s for s in plan.persistent if s in places and s not in self._done]
            if persistent and not found.names(None):
                setbacks = setbacks.joined(self._read_persistent(persistent, reader, None, places))
            found = found.joined(setbacks)
            there = {shard: self._done[shard] for shard in places if shard in self._done}
            try:
                stream.put(places, there)
            except CorruptDataError as error:
                self._job.log.error("restore", self.step.step, str(error))
                self._done = {s: sums for s, sums in self._done.items() if not sums or s not in there}
                why = f"what it gathered was damaged in its own memory: {error}"
                return found.joined(Setbacks.of(self.step, self._job.process, why))
        if not found and self._described is None:
            found = self._read_persistent([], reader, None, {})
        return found

    def _get(
        self,
        takes: Collection[Take],
        plan: ProcessPlan,
        open_reader: Callable[[], StepReader],
        course: Course | None = None,
    ) -> Setbacks:
        setbacks = self._gather(takes, course)
        persistent = [s for s in plan.persistent if s in self._needed and s not in self._done]
        if setbacks or not (persistent or self._described is None):
            return setbacks
        if course is not None and course.is_stopped:
            return setbacks
        return self._read_persistent(persistent, open_reader, course)

    def finish(self, extras: Mapping[int, str], *, sends: bool = False) -> Hydrated | Streamed:
        """The step as a slot, or on the devices, with these extras of this process.

        `sends`: all of it is to lie in one memory, to be sent to others.

        Call when nothing is missing any more. Raises LocalDirectoryError; CorruptDataError where something is
        missing all the same.
        """
        job, layout, process = self._job, self._job.needed_layout, self._job.process
        if isinstance(self._room, Repair):
            index = self._room.index
            self._room.end()
            self._kept = next((s for s in job.local.sealed_slots(self.step) if s.index == index), None)
        if self._stream is not None:
            return Streamed(job, self._stream, self._manifest(extras))
        if self._kept is not None:
            return Hydrated(fitted(self._kept, layout, process), job.local)
        manifest = self._manifest(extras)
        room = self._the_room()
        assert isinstance(room, Hydration)
        if sends and self._own is not None:
            for shard in self._own.shards:
                np.copyto(room.place(shard), self._own.slot.shard(shard))
        sealed = room.seal(manifest, self._own)
        self._room = None
        return sealed

    @property
    def keeps_own(self) -> bool:
        """Whether some of it stayed in the own slot, which has a part of what is needed."""
        return self._own is not None

    def _manifest(self, extras: Mapping[int, str]) -> Manifest:
        job, layout, process, described = self._job, self._job.needed_layout, self._job.process, self._described
        lacking = sorted(self._needed - set(self._done))
        if lacking or described is None:
            named = ", ".join(str(layout.shards[shard]) for shard in lacking[:5])
            raise CorruptDataError(f"the plan for {self.step} gave process {process} no {named or 'values'}")
        checksums = tuple(self._done.get(entry.shard, ()) for entry in layout.slot_entries(process))
        kept = {**self._kept_extras, **extras}
        return make_manifest(job, self.step, checksums, described.values, kept, described.metadata)

    def forget(self) -> None:
        """What was gathered cannot be relied on."""
        self._stream = None
        self._done = {shard: checksums for shard, checksums in self._done.items() if not checksums}
        self._kept = self._described = self._own = None
        self._from_slots.clear()

    def close(self) -> None:
        """Gives back the memory of what was not finished. Repeating it is fine."""
        self._stream = None
        room, self._room = self._room, None
        if isinstance(room, Repair):
            room.end()
        elif room is not None:
            room.discard()

    def give_back(self) -> None:
        """Gives the memory back in between: what was gathered is gathered anew, should it be wanted again."""
        self.close()
        self.forget()

    def abandon(self) -> None:
        """Like `close`, where a thread that does not end may still write: a free slot gets other memory.

        The own slot, of which missing shards are written, stays as it is until that thread calls `leave`.
        """
        self._is_abandoned = True
        room, self._room = self._room, None
        if isinstance(room, Repair):
            self._left = room
        elif room is not None:
            room.discard(still_written=True)

    def leave(self) -> None:
        """Nobody writes any more what was abandoned. Repeating it is fine."""
        left, self._left = self._left, None
        if left is not None:
            left.end()

    # The parts.

    def _keep_own(self, takes: Collection[Take]) -> Setbacks:
        """Where slices share the state, the part that this process keeps stays in its slot."""
        job = self._job
        before = frozenset[int]() if self._own is None else self._own.shards
        self._own = None
        for shard in before:  # They are in no other place.
            self._done.pop(shard, None)
        slot = None if job.stores_all else job.local.sealed(self.step)
        if slot is None or (slot.manifest.layout, slot.manifest.position) != (job.layout.hash, job.process):
            return NONE
        shards = frozenset(shard for take in takes if self._is_own_part(take) for shard in take.shards)
        bad = shards & set(slot.missing)
        if bad:
            why = "it was found damaged meanwhile"
            named = frozenset(job.layout.shards[shard] for shard in bad)
            return Setbacks((Strike(self.step, job.process, named, why),))
        there = {entry.shard for entry in job.layout.slot_entries(job.process) if entry.nbytes}
        describing = self._describing(takes)
        if there - set(slot.missing) - shards or (describing and describing.process != job.process):
            return NONE  # It is no source any more, or not of all: what other replicas outvoted is not kept.
        self._own = OwnPart(slot, shards & self._needed)
        self._described = _Described.by(slot.manifest)
        if fresh := [s for s in self._own.shards if s not in self._done and s not in before]:
            self._count(OWN, fresh)
        self._done.update((shard, slot.checksums(shard)) for shard in self._own.shards)
        return NONE

    def _to_be_copied(self, takes: Collection[Take]) -> Collection[Take]:
        return takes if self._own is None else [take for take in takes if not self._is_own_part(take)]

    def _describing(self, takes: Collection[Take]) -> Take | None:
        """The take that says whose values count, where replicas have different ones."""
        return next((take for take in takes if not take.shards), None)

    def _is_own_part(self, take: Take) -> bool:
        job = self._job
        return (take.process, take.layout, take.position) == (job.process, job.layout.hash, job.process)

    def _repair_own(self) -> Setbacks:
        """Puts what the own slot lacks of its part there; it is in memory by now."""
        job = self._job
        if self._own is None or not self._own.slot.missing or not self._part.is_whole:
            return NONE
        slot = job.local.begin_repair(self.step)
        if slot is None:
            job.log.warning("restore", self.step.step, "the slot of this process cannot be repaired now")
            return NONE
        try:
            missing = slot.missing
            for shard in missing:
                if self._done[shard]:
                    np.copyto(slot.shard(shard), self._the_room().place(shard))
            refused = job.local.repaired(slot, missing, {shard: self._done[shard] for shard in missing})
        finally:
            job.local.end_repair(slot)
        return self._unusable_own(refused) if refused else NONE

    def _unusable_own(self, shards: Collection[int]) -> Setbacks:
        """Bytes that other replicas agree on, and that are not what this slot had, leave the slot useless."""
        named = ", ".join(str(self._job.layout.shards[shard]) for shard in tuple(shards)[:5])
        self.forget()
        return Setbacks.of(self.step, self._job.process, f"its slot cannot be repaired: {named}")

    def _gather(
        self,
        takes: Collection[Take],
        course: Course | None = None,
        places: Mapping[int, np.ndarray] | None = None,
    ) -> Setbacks:
        """Into these places, those of the room by default."""
        wanted = self._needed - set(self._done)
        if places is not None:
            wanted &= {shard for shard, place in places.items() if place.nbytes}
        if isinstance(self._room, Repair):
            wanted &= set(self._room.missing)
        describing = self._describing(takes)
        if not wanted:
            takes = [describing] if describing and self._described is None else []
        if not takes:
            return NONE
        place = self._the_room().place if places is None else places.__getitem__
        target = Target(self.step, self._job.needed_layout, wanted, place)
        gathered = gather(target, takes, self._open_source, course=course)
        self._job.peers.forget(gathered.unreachable)
        self._done.update(gathered.checksums)
        self._from_slots.update(gathered.checksums)
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
            for slot in job.local.sealed_slots(self.step):
                if (slot.manifest.layout, slot.manifest.position) == (take.layout, take.position):
                    return OwnSlot(job.process, slot)
            raise CorruptDataError(f"{self.step} is not on this ramdisk any more")
        return open_peer_slot(job, self.step, take)

    def _read_persistent(
        self,
        shards: Collection[int],
        open_reader: Callable[[], StepReader],
        course: Course | None,
        places: Mapping[int, np.ndarray] | None = None,
    ) -> Setbacks:
        """Only what is proven to be damaged may cost a step; a store that fails is an error of the restore."""
        try:
            reader = open_reader()
            self.from_persistent = True
            if self._described is None:
                self._described = _Described.of_persistent(reader, self._part)
            is_stopped = None if course is None else lambda: course.is_stopped
            if places is None:
                self._done.update(self._the_room().read_persistent(reader, shards, is_stopped))
            else:
                wanted = {shard: places[shard] for shard in shards}
                self._done.update(read_shards(self._job, self.step, reader, wanted, is_stopped))
        except CorruptDataError as error:
            self._job.log.error("restore", self.step.step, str(error))
            return Setbacks.of(self.step, None, str(error))
        if shards:
            nbytes = self._count(PERSISTENT, shards)
            if course is not None:
                course.arrived(nbytes)
        return NONE

    def _count_repaired(self) -> Setbacks:
        if not isinstance(self._room, Repair):
            return NONE
        lacking = set(self._room.missing)
        refused = self._room.count({shard: self._done[shard] for shard in lacking & set(self._done)})
        if not refused and not set(self._room.missing) & self._needed:
            return NONE
        useless = refused or self._room.missing
        self._room.end()
        self._room = None
        return self._unusable_own(useless)

    def _whole_cut(self) -> SealedSlot | None:
        """The own slot that holds what this process needs, no more and no less; of several the planner's."""
        job = self._job
        slots = job.local.sealed_slots(self.step)
        if len(slots) < 2:
            return next(iter(slots), None)
        needed = {job.needed_layout.shards[shard] for shard in job.needed_layout.process_shards[job.process]}

        def held(slot: SealedSlot) -> set[Shard]:
            return {slot.layout.shards[shard] for shard in slot.layout.process_shards[slot.manifest.position]}

        alike = [slot for slot in slots if held(slot) == needed]
        return min(alike, key=lambda slot: (len(slot.missing), slot.manifest.layout), default=None)

    def _repairs(self, own: SealedSlot) -> bool:
        """Whether what is missing goes into the own slot itself."""
        if isinstance(self._room, Repair):
            return True
        if self._room is not None or not self._part.is_whole:
            return False
        slot = self._job.local.begin_repair(self.step, own.index)
        if slot is None:
            return False
        self._room = Repair(self._job, slot)
        self._count(OWN, self._needed - set(self._room.missing))
        return True

    def _the_room(self) -> Hydration | Repair:
        if self._is_abandoned:
            raise LocalDirectoryError(f"{self.step} is not wanted any more")
        if self._room is None:
            self._room = Hydration.begin(self._job, self.step, self._part)
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

    def _count(self, source: str, shards: Collection[int]) -> int:
        nbytes = sum(self._job.layout.shard_nbytes[shard] for shard in shards)
        self._add(source, len(shards), nbytes)
        return nbytes

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
