"""The save pipeline of one generation: snapshot in the train loop, everything else in one thread behind it.

The train loop waits for the snapshot and, when no slot is free, for a bounded time (invariant 7). A save that
cannot be made is abandoned at once, so that no other process waits for it. Every save ends in one agreed
outcome, and the saves of a process end in their order.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from emergency_ckpt.agent.drain_worker import DrainWorker
from emergency_ckpt.agent.worker import Worker
from emergency_ckpt.core.checksums import ShardWriter, shard_seed
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.outcomes import OutcomeRecord
from emergency_ckpt.core.placement import extras_keepers
from emergency_ckpt.core.replicas import Fingerprints
from emergency_ckpt.core.schedule import Due
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import (
    CoordinationTimeoutError,
    EmergencyCheckpointError,
    LocalDirectoryError,
    PeerFailedError,
)
from emergency_ckpt.jaxio.binding import StateBinder
from emergency_ckpt.jaxio.device_copies import DeviceComparison
from emergency_ckpt.jaxio.outcome_agreement import OutcomeAgreement
from emergency_ckpt.jaxio.snapshot import Snapshot, take_snapshot
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.slot_views import OpenSlot
from emergency_ckpt.runtime.backups import Backups
from emergency_ckpt.runtime.copying import Copying
from emergency_ckpt.runtime.device_copies import DeviceCopies
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.runtime.replicas import Published, ReplicaComparison
from emergency_ckpt.telemetry.events import SaveEvent, SkippedSaveEvent
from emergency_ckpt.telemetry.metrics import Metric

# How often a save that waits long looks whether steps have come to wait for their drains, which make room.
_LOOK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class SaveContent:
    """What is to be saved.

    Attributes:
      state: the live state.
      extras: this process's extras as JSON text, None on all processes or on none.
      metadata: custom metadata and metrics, JSON.
    """

    state: Any
    extras: str | None
    metadata: Mapping[str, Any]


@dataclasses.dataclass
class _Task:
    """A save on its way through the writer thread."""

    ordinal: int
    step: StepId
    due: Due
    called_at: float
    content: SaveContent | None = None
    slot: OpenSlot | None = None
    snapshot: Snapshot | None = None
    checksums: tuple[tuple[int, ...], ...] | None = None
    fingerprints: tuple[Fingerprints, ...] = ()
    published: Published | None = None
    devices: DeviceComparison | None = None
    abandon_reason: str = ""
    sealed: bool = False
    succeeded: bool = False  # sealed, and its copies are in place
    blocked_seconds: float = 0.0
    outcome: Outcome | None = None
    done: threading.Event = dataclasses.field(default_factory=threading.Event)


class SavePipeline(Worker[_Task]):
    """Saves of one process in one generation. All processes make the same calls in the same order."""

    def __init__(
        self,
        job: Job,
        binder: StateBinder,
        drain: DrainWorker | None,
        promised: StepId | None,
        backups: Backups | None = None,
    ) -> None:
        """`promised`: the newest step that is restorable now; told in manifests."""
        self._job = job
        self._binder = binder
        self._drain = drain
        self._backups = backups
        self._agreement = OutcomeAgreement(job.coordinator, job.generation.number)
        self._keepers = extras_keepers(job.topology.process_slice)
        self._replicas = ReplicaComparison(
            job.coordinator,
            job.saved_layout,
            job.topology,
            job.log,
            job.settings.coordination_timeout,
            job.settings.on_replica_divergence,
        )
        self._device_copies = DeviceCopies(
            job.settings.compare_device_copies, job.log, job.settings.on_replica_divergence
        )
        self._seeds = {
            shard: shard_seed(job.generation.number, job.layout, shard)
            for shard in job.saved_layout.process_shards[job.process]
        }
        own = set(job.saved_layout.process_shards[job.process])
        entries = job.layout.slot_entries(job.process)
        self._targets = {entry.shard: entry for entry in entries if entry.shard in own}
        # Places among the entries, of the shards that this process stores for others.
        self._copies = tuple(place for place, entry in enumerate(entries) if entry.shard not in own)
        self._copying = Copying(job)
        self._next_ordinal = 0
        self._newest_complete: StepId | None = None
        self._promised = promised
        self._unresolved: list[_Task] = []
        self._in_progress: list[_Task] = []  # added to by the train loop, taken from by the writer thread
        super().__init__("save", self._do)

    @property
    def newest_complete(self) -> StepId | None:
        """The newest step of this generation that all processes agreed to be complete."""
        return self._newest_complete

    def save(
        self,
        step: int,
        due: Due,
        prepare: Callable[[], SaveContent],
        slot_wait: timedelta,
        limit: timedelta | None = None,
    ) -> bool:
        """Takes the snapshot and returns; the rest follows in the background. False when the save was skipped.

        Where saves are synchronous it returns when the outcome is known: whether the step is complete; or when
        `limit` is over, if there is one: whether it is complete by then.
        Raises what `prepare` raises, and StateMismatchError or UnsupportedStateError for a state that does not
        fit; the save is then abandoned on all processes, and this one stays in step with the others.
        """
        job = self._job
        task = _Task(self._next_ordinal, StepId(job.generation.number, step), due, time.monotonic())
        self._in_progress.append(task)
        self._next_ordinal += 1
        try:
            task.content = prepare()
            task.snapshot = take_snapshot(self._binder, task.content.state)
            # The pin keeps the slot for the drain, which begins when the outcome is known.
            pins = 1 if due.persistent else 0
            task.slot, task.abandon_reason = self._take_slot(task, slot_wait, pins)
            if task.slot is not None:
                job.log.metrics.add(Metric.SAVES_STARTED)
                task.devices = self._device_copies.ask(task.step, task.content.state)
                if not task.snapshot.may_defer:
                    task.checksums = self._fill(task.slot, task.snapshot)
        except BaseException as error:
            task.abandon_reason = f"{type(error).__name__}: {error}"
            self._give_up_slot(task)
            if not isinstance(error, LocalDirectoryError) or not job.local.usable:
                self.submit(task)
                raise
            # The ramdisk fails, which is no fault of the training: it goes on, and `check_for_errors` tells.
            self._report_error(error, task)
        if task.slot is None:
            self._give_up_slot(task)
        # The snapshot has what is needed; holding on to the state would keep its memory.
        task.content = dataclasses.replace(task.content, state=None) if task.content else None
        task.blocked_seconds = time.monotonic() - task.called_at
        self.submit(task)
        if task.slot is not None and not job.settings.asynchronous:
            self._await_end(task, limit)
            return task.outcome is Outcome.COMPLETE
        return task.slot is not None

    def _take_slot(self, task: _Task, slot_wait: timedelta, pins: int) -> tuple[OpenSlot | None, str]:
        """A slot, for which steps that wait to be drained make room if need be.

        The step of a preemption is the last one: it is worth a longer wait, for a drain that runs, or for the
        outcome of the save before. Others wait for its outcome longer than that. `finish` says how long itself.
        """
        local, drain, settings = self._job.local, self._drain, self._job.settings
        first = min(slot_wait, settings.slot_wait)
        slot, reason = local.begin(task.step, first, pins)
        patience = max(slot_wait - first, settings.coordination_timeout / 2 * task.due.before_end)
        deadline = time.monotonic() + patience.total_seconds()
        while slot is None:
            made = drain is not None and drain.make_room()
            left = deadline - time.monotonic()
            if not made and left <= 0:
                break
            slot, reason = local.begin(task.step, timedelta(seconds=min(max(left, 0.0), _LOOK_SECONDS)), pins)
        return slot, reason

    def _await_end(self, task: _Task, limit: timedelta | None) -> None:
        if limit is not None:
            task.done.wait(max(0.0, task.called_at + limit.total_seconds() - time.monotonic()))
            return
        # Each part of a save has a limit of its own; this one is for a thread that died.
        if not task.done.wait(4 * self._job.settings.coordination_timeout.total_seconds()):
            raise CoordinationTimeoutError(f"{task.step} had no outcome within four coordination time-outs")

    def in_progress(self) -> Due:
        """The tiers for which a save has no outcome yet."""
        tasks = tuple(self._in_progress)
        return Due(any(t.due.local for t in tasks), any(t.due.persistent for t in tasks), "in progress")

    @property
    def next_ordinal(self) -> int:
        """The number of the next save of this generation; the same on all processes."""
        return self._next_ordinal

    def forget(self, step: int, newest: StepId | None) -> None:
        """`step` was deleted, and `newest` is the newest restorable step now."""
        if self._newest_complete is not None and self._newest_complete.step == step:
            self._newest_complete = None
        self._promised = newest

    def release_unresolved(self) -> None:
        """Gives up the saves whose outcome could not be learnt, so that no drain is waited for in vain.

        Call when nothing is under way and no further save follows.
        """
        for task in self._unresolved:
            if task.due.persistent and task.slot is not None:
                self._job.local.unpin(task.slot.index)
        self._unresolved.clear()

    # In the writer thread.

    def _do(self, task: _Task) -> None:
        try:
            self._finish(task)
        except Exception as error:
            self._report_error(_as_ours(error, task.step), task)
        finally:
            self._in_progress.remove(task)
            task.done.set()

    def _finish(self, task: _Task) -> None:
        job = self._job
        sealed_seconds = None
        if task.slot is not None:
            try:
                self._seal(task, task.slot)
                sealed_seconds = time.monotonic() - task.called_at
                job.log.metrics.add(Metric.SAVES_SEALED)
                prefix = self._agreement.keys_of(task.ordinal)
                self._copying.tell(prefix)
                self._copying.fetch(prefix, task.step)
                task.succeeded = True
            except Exception as error:  # Whatever it is, the others must not wait for this process.
                task.abandon_reason = str(error)
                if not task.sealed:
                    self._give_up_slot(task)
                if not isinstance(error, PeerFailedError):  # The peer notes its own error.
                    self._report_error(_as_ours(error, task.step), task)
        self._unresolved.append(task)
        # A report on this save is only allowed once the outcomes of all earlier ones are known.
        for earlier in list(self._unresolved[:-1]):
            self._resolve(earlier, report=False, sealed_seconds=None)
        self._resolve(task, report=True, sealed_seconds=sealed_seconds)

    def _resolve(self, task: _Task, *, report: bool, sealed_seconds: float | None) -> None:
        """Reports on a save and learns its outcome. Where that fails, the save stays unresolved."""
        if report and task.succeeded:
            task.published = self._replicas.publish(self._agreement.keys_of(task.ordinal), task.fingerprints)
            if self._backups is not None and self._job.leads:
                self._backups.choose(
                    self._agreement.keys_of(task.ordinal), task.step, is_persistent=task.due.persistent
                )
            self._agreement.report_sealed(task.ordinal)
        elif report:
            self._withhold_extras(task)
            self._copying.withhold(self._agreement.keys_of(task.ordinal))
            self._agreement.abandon(task.ordinal, f"process {self._job.process}: {task.abandon_reason}")
        record = self._agreement.await_outcome(task.ordinal, self._job.settings.coordination_timeout)
        self._unresolved.remove(task)
        self._settle(task, record.outcome)
        self._report(task, record, sealed_seconds)
        if record.outcome is Outcome.COMPLETE and task.published is not None:
            self._compare_replicas(task.step, task.published)
        if task.devices is not None and (divergence := self._device_copies.compare(task.step, task.devices)):
            self.note(divergence)

    def _compare_replicas(self, step: StepId, published: Published) -> None:
        try:
            divergence = self._replicas.compare(step, published)
        except EmergencyCheckpointError as error:
            self._job.log.warning("replicas", step.step, f"replicas could not be compared: {error}")
            return
        if divergence is not None:
            self.note(divergence)

    def _seal(self, task: _Task, slot: OpenSlot) -> None:
        job = self._job
        if task.checksums is None:
            assert task.snapshot is not None
            task.checksums = self._fill(slot, task.snapshot)
        snapshot, task.snapshot = task.snapshot, None
        assert snapshot is not None
        manifest = Manifest(
            run=job.run,
            nonce=job.generation.nonce,
            step=task.step,
            layout=job.layout.hash,
            position=job.process,
            process_count=job.topology.process_count,
            checksums=task.checksums,
            values=snapshot.values,
            extras=self._exchange_extras(task),
            listed=task.due.local,
            activations=job.local.activations,
            promised=self._newest_complete or self._promised,
            metadata=task.content.metadata if task.content else {},
            missing=self._copies,
            place=job.place,
        )
        job.local.seal(slot, manifest)
        task.sealed = True
        task.fingerprints = self._replicas.fingerprints(manifest, job.layout)

    def _fill(self, slot: OpenSlot, snapshot: Snapshot) -> tuple[tuple[int, ...], ...]:
        slot.wait_ready()
        writers = {
            shard: ShardWriter(slot.data[entry.offset : entry.offset + entry.nbytes], self._seeds[shard])
            for shard, entry in self._targets.items()
        }
        snapshot.write(lambda shard, data: writers[shard].write(data))
        found = {shard: writer.finish() for shard, writer in writers.items()}
        return tuple(found.get(shard, ()) for shard in self._job.layout.process_shards[self._job.process])

    def _exchange_extras(self, task: _Task) -> dict[int, str]:
        """This process's extras and those it keeps for others. The keys go with the save's own."""
        own = task.content.extras if task.content else None
        if own is None:
            return {}
        job = self._job
        prefix = f"{self._agreement.keys_of(task.ordinal)}/extras"
        kept = {job.process: own}
        if self._keepers[job.process]:
            job.coordinator.put(f"{prefix}/{job.process}", own.encode())
        for ward, keepers in enumerate(self._keepers):
            if job.process in keepers:
                try:
                    found = job.coordinator.get(f"{prefix}/{ward}", job.settings.coordination_timeout)
                except CoordinationTimeoutError as error:
                    raise CoordinationTimeoutError(
                        f"process {ward} gave no extras for {task.step} ({error}). Extras and items are given "
                        "on all processes or on none"
                    ) from error
                if found == _WITHHELD:
                    raise PeerFailedError(f"process {ward} abandoned {task.step} and gives no extras")
                kept[ward] = found.decode()
        return kept

    def _withhold_extras(self, task: _Task) -> None:
        """Tells the processes that keep our extras not to wait for them."""
        if self._keepers[self._job.process]:
            prefix = f"{self._agreement.keys_of(task.ordinal)}/extras"
            # Extras that were given before the save failed may stand: they are as good as these.
            self._job.coordinator.put_once(f"{prefix}/{self._job.process}", _WITHHELD)

    def _settle(self, task: _Task, outcome: Outcome) -> None:
        job = self._job
        task.outcome = outcome
        drains = task.due.persistent and task.slot is not None
        if outcome is Outcome.COMPLETE:
            self._newest_complete = task.step
            job.local.settle(task.step, outcome)
            if drains and task.slot is not None and self._drain is not None:
                self._drain.drain(task.step, task.slot.index)
            elif self._drain is not None and self._is_chosen(task):
                self._drain.drain(task.step, self._pin(task.step))
            return
        if drains and task.slot is not None:
            job.local.unpin(task.slot.index)
        job.local.settle(task.step, outcome)

    def _pin(self, step: StepId) -> int | None:
        """The slot of the newest complete step, which nobody overwrites before it is pinned; None if gone.

        All processes take part in its drain all the same.
        """
        try:
            slot = self._job.local.pin(step)
        except LocalDirectoryError as error:
            self._job.log.error("backup", step.step, str(error))
            return None
        return slot.index if slot else None

    def _is_chosen(self, task: _Task) -> bool:
        """Whether a step that is complete, and not due for the persistent tier, is to be backed up."""
        if self._backups is None or not task.due.local or task.due.persistent:
            return False
        return self._backups.chosen(self._agreement.keys_of(task.ordinal))

    def _give_up_slot(self, task: _Task) -> None:
        if task.slot is not None:
            self._job.local.discard(task.slot)
            task.slot = None
        if task.snapshot is not None:
            task.snapshot.release()
            task.snapshot = None

    def _report(self, task: _Task, record: OutcomeRecord, sealed_seconds: float | None) -> None:
        job = self._job
        if task.slot is None:
            job.log.emit(
                SkippedSaveEvent(
                    step=task.step.step,
                    blocked_seconds=task.blocked_seconds,
                    reason=task.abandon_reason,
                )
            )
            return
        job.log.emit(
            SaveEvent(
                step=task.step.step,
                bytes=sum(entry.nbytes for entry in self._targets.values()),
                blocked_seconds=task.blocked_seconds,
                sealed_seconds=sealed_seconds,
                outcome="complete" if record.outcome is Outcome.COMPLETE else "abandoned",
                outcome_seconds=time.monotonic() - task.called_at,
                reason="" if record.outcome is Outcome.COMPLETE else record.reason,
            )
        )

    def _report_error(self, error: EmergencyCheckpointError, task: _Task) -> None:
        self.note(error)
        self._job.log.error("save", task.step.step, str(error))


_WITHHELD = b"withheld"


def _as_ours(error: Exception, step: StepId) -> EmergencyCheckpointError:
    if isinstance(error, EmergencyCheckpointError):
        return error
    wrapped = LocalDirectoryError(f"{step} could not be sealed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
