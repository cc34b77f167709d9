"""A world around the slot state machine: processes, ramdisks, a lossy coordination service, an adversary.

`SlotTable` is the one that runs in production; what is modelled is its surroundings: the caller that obeys
the table, and everything that may go wrong. `tests/core/explorer.py` visits every reachable world.

Not modelled, because it adds no behaviour:

* *Dead processes.* When a process dies the whole job starts again, and a process that is dead until then
  cannot be told from one that makes no move until then. So a crash at any instruction is: a restart may
  follow every world, with the memory of all processes lost.
* *Lost messages, processes that never learn.* No move is ever forced.
* *Bytes without a manifest.* Nobody reads them, so a slot half written equals one whose manifest is not yet in
  place. Whose bytes they are matters only while somebody is writing.
* *The report of a sealed step.* A process that has sealed and not reported differs from one that has reported
  only in what the coordinator may do next, and the coordinator is never forced to do it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import TypeVar

from emergency_ckpt.core.lineage import Activation, StepId, is_void
from emergency_ckpt.core.slots import Outcome, Slot, SlotTable

T = TypeVar("T")


class Violation(AssertionError):
    """A reachable world breaks an invariant."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """What exists and what the adversary may do.

    Attributes:
      shards: one letter per process, equal letters for processes that hold the same shards. A crash may wipe
        ramdisks, as long as what is promised can be restored from the others.
      slots: slots per process.
      max_to_keep: as in `SlotTable`.
      crashes: how often the job may restart or go back to an older step; None for any number of times.
      saves: how many saves the job may begin in all generations together; None for any number.
      lead: how many saves one process may be ahead of another. 1 is what training does: the arrays of a step
        exist only when all processes have taken part in it.
      restore_older: a restart may choose any restorable step, not just the newest.
      live_restore: the running job may go back to a restorable step, with its memory and its writers alive.
      drains: sealed slots may be pinned for any time, from `begin` on too, and across a restart.
      repairs: sealed slots may be repaired for any time.
      outside: another process, of which the table knows nothing, may drain a sealed slot for any time, across
        restarts, and when the step has been given up since. The caller names that slot as unusable.
      promises: how many of the newest complete steps must stay restorable.
      in_order: each process hears the outcomes of the steps in its slots oldest first.
      late_messages: outcomes of older generations still arrive, at any time.
      activate_early: a mistake, to test the tests: a restore counts as soon as one process holds its state.
      listen_in_restore: another: a process hears old outcomes while it restores.
      save_early: another: a process saves before it has heard that its generation's restore is done.
      keep_manifest: another: the manifest stays when its slot is reused.
      overlook_outside: another: the caller does not look whether another process drains a slot.
    """

    shards: str = "AB"
    slots: int = 2
    max_to_keep: int = 1
    crashes: int | None = None
    saves: int | None = None
    lead: int = 1
    restore_older: bool = False
    live_restore: bool = False
    drains: bool = False
    repairs: bool = False
    outside: bool = False
    promises: int = 1
    in_order: bool = False
    late_messages: bool = False
    activate_early: bool = False
    listen_in_restore: bool = False
    save_early: bool = False
    keep_manifest: bool = False
    overlook_outside: bool = False

    @property
    def processes(self) -> int:
        return len(self.shards)


@dataclasses.dataclass(frozen=True, slots=True)
class SlotOnDisk:
    """What one slot file holds: the step in its manifest, and the step whose bytes are, or will be, in it."""

    manifest: StepId | None = None
    bytes_of: StepId | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
    """A write that goes on; in a restore the others are not told how it ends."""

    slot: int
    step: StepId
    reported: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """Memory and ramdisk of one process.

    Attributes:
      begun: the last step number that it saved, or restored.
      ready: it holds the state of its generation.
      writing: what its writer has to do, oldest first.
      drained: the slot that a drain reads, with the step that the drain was started for. The table says that
        it is pinned, or being repaired; or nothing, where the drain is another process's.
      restored: the step that its generation began from, until it has heard that all processes hold it.
    """

    table: SlotTable
    disk: tuple[SlotOnDisk, ...]
    begun: int = 0
    ready: bool = True
    writing: tuple[Write, ...] = ()
    drained: tuple[int, StepId] | None = None
    restored: StepId | None = None

    def manifests(self) -> list[StepId]:
        return [slot.manifest for slot in self.disk if slot.manifest]

    def offered(self) -> list[StepId]:
        """What it offers when the running job looks for a step to go back to: nothing that is given up."""
        return list(self.table.sealed_steps())

    def unknown(self) -> list[StepId]:
        """Steps in its slots whose outcome it does not know."""
        known = self.table.complete | self.table.abandoned
        return [slot.step for slot in self.table.slots if slot.step and slot.step not in known]

    @property
    def drained_outside(self) -> int | None:
        """The slot that another process drains."""
        if self.drained is None or self.table.slots[self.drained[0]].in_use:
            return None
        return self.drained[0]

    def in_order(self) -> Process:
        """The same process with its slots sorted by what is in them.

        The table prefers one slot to another for what is in them, never for their place, so the order of the
        slots changes nothing but the order.
        """
        order = sorted(range(len(self.disk)), key=lambda i: _content(self.table.slots[i], self.disk[i]))
        if order == list(range(len(order))):
            return self
        return dataclasses.replace(
            self,
            table=dataclasses.replace(self.table, slots=tuple(self.table.slots[i] for i in order)),
            disk=tuple(self.disk[i] for i in order),
            writing=tuple(dataclasses.replace(write, slot=order.index(write.slot)) for write in self.writing),
            drained=(order.index(self.drained[0]), self.drained[1]) if self.drained else None,
        )

    def __str__(self) -> str:
        table = self.table
        slots = [
            short(s.step)
            + " being written" * bool(s.step and not s.sealed)
            + " pinned" * bool(s.pins)
            + " repaired" * s.repairing
            for s in table.slots
        ]
        known = [f"{short(step)} complete" for step in sorted(table.complete)]
        known += [f"{short(step)} abandoned" for step in sorted(table.abandoned)]
        known += [f"generation {a.generation} began from step {a.step}" for a in sorted(table.activations)]
        state = f"at step {self.begun}" if self.ready else "restoring"
        state += f" (restored {short(self.restored)})" * bool(self.restored)
        return f"{state}, slots [{', '.join(slots)}], knows [{', '.join(known)}]"


@dataclasses.dataclass(frozen=True, slots=True)
class Common:
    """What no single process owns.

    Attributes:
      progress: every process's `begun`, ascending.
      sealed: steps without an outcome, and how many processes sealed them.
      outcomes: the written outcomes that may still arrive somewhere.
      activations: the durable record of restores that all processes hold.
      restoring: the step being restored, while not all processes hold it; `holders` counts those that do.
      promised: the newest complete steps, newest first. They must stay restorable (a
        restore promises the first of them only).
    """

    progress: tuple[int, ...]
    generation: int = 1
    sealed: tuple[tuple[StepId, int], ...] = ()
    outcomes: tuple[tuple[StepId, Outcome], ...] = ()
    activations: frozenset[Activation] = frozenset()
    restoring: StepId | None = None
    holders: int = 0
    promised: tuple[StepId, ...] = ()
    crashes: int = 0
    saves: int = 0

    def __str__(self) -> str:
        steps = [f"{short(step)} sealed by {count}" for step, count in self.sealed]
        steps += [f"{short(step)} {outcome.value}" for step, outcome in self.outcomes]
        steps += [f"generation {a.generation} began from step {a.step}" for a in sorted(self.activations)]
        state = f"generation {self.generation}"
        if self.restoring:
            state += f" restores {short(self.restoring)}, {self.holders} hold it"
        promised = ", ".join(map(short, self.promised))
        return f"{state}, outcomes [{', '.join(steps)}], promised [{promised}]"


@dataclasses.dataclass(frozen=True, slots=True)
class Situation:
    """The part of `Common` that decides what a process does next, messages apart."""

    generation: int
    restoring: StepId | None
    front: int  # it may save up to this step number


class Deed(enum.Enum):
    """What a move of one process means to the others."""

    NOTHING = "-"
    BEGINS = "begins"
    SKIPS = "skips"
    SEALS = "seals"
    FAILS = "fails"
    HOLDS = "holds"


@dataclasses.dataclass(frozen=True, slots=True)
class Effect:
    """A deed, its step, and the step whose sealed copy the process gave up by it."""

    deed: Deed = Deed.NOTHING
    step: StepId | None = None
    gave_up: StepId | None = None


Move = tuple[str, Process, Effect]


def first_world(rules: Rules, table_type: type[SlotTable]) -> tuple[Process, Common]:
    """Every process (they are equal) and the common part, before the first save."""
    table = table_type((Slot(),) * rules.slots, rules.max_to_keep)
    return Process(table, (SlotOnDisk(),) * rules.slots), Common((0,) * rules.processes)


# Moves of one process.


def situation(rules: Rules, common: Common) -> Situation:
    front = common.progress[0] + rules.lead
    if rules.saves is not None:
        front = min(front, common.progress[-1] + rules.saves - common.saves)
    return Situation(common.generation, common.restoring, front)


def process_moves(rules: Rules, process: Process, seen: Situation) -> Iterator[Move]:
    """Everything that this process may do next, and may have happen to it, messages and crashes apart."""
    if seen.restoring is None:
        if process.restored is None or rules.save_early:
            yield from _save(rules, process, seen)
        if process.restored is not None:
            yield from _set_out(rules, process, process.restored, seen)
    elif not process.ready:
        yield from _restore(rules, process, seen.restoring)
    yield from _write(process)
    yield from _empty(process)
    if rules.drains or rules.repairs or rules.outside:
        yield from _drain(rules, process)


def _save(rules: Rules, process: Process, seen: Situation) -> Iterator[Move]:
    """The train loop calls save(); the writer may still be busy with the saves before."""
    step = StepId(seen.generation, process.begun + 1)
    if step.step > seen.front:
        return
    called = dataclasses.replace(process, begun=step.step)
    for pins in (0, 1) if rules.drains and not process.drained else (0,):
        begun = _begin(rules, called, step, reported=True, pins=pins)
        if begun is None:
            yield f"save {step} is skipped", called, Effect(Deed.SKIPS, step)
            return
        after, gave_up = begun
        yield f"save {step} begins, {pins} pins", after, Effect(Deed.BEGINS, step, gave_up)


def _begin(
    rules: Rules, process: Process, step: StepId, reported: bool, pins: int = 0
) -> tuple[Process, StepId | None] | None:
    """Takes a slot as the caller in production does: the manifest goes, then the bytes are overwritten.

    Returns the process with the step that the slot held, or None where no slot may be taken.
    """
    outside = None if rules.overlook_outside else process.drained_outside
    unusable = {} if outside is None else {outside: "another process drains it"}
    table, index, _ = process.table.begin(step, pins, unusable)
    if index is None:
        return None
    held = process.disk[index].manifest
    after = dataclasses.replace(
        process,
        table=table,
        disk=_replaced(process.disk, index, SlotOnDisk(held if rules.keep_manifest else None, step)),
        writing=(*process.writing, Write(index, step, reported)),
        drained=(index, step) if pins else process.drained,
    )
    return after, held


def _write(process: Process) -> Iterator[Move]:
    """The oldest write ends: the manifest appears, or writing failed."""
    if not process.writing:
        return
    write, rest = process.writing[0], process.writing[1:]
    index, step = write.slot, write.step
    sealed = dataclasses.replace(
        process,
        table=process.table.seal(index),
        disk=_replaced(process.disk, index, SlotOnDisk(step, process.disk[index].bytes_of)),
        writing=rest,
    )
    yield f"{step} is sealed", sealed, Effect(Deed.SEALS, step) if write.reported else Effect()
    failed = dataclasses.replace(
        process,
        table=process.table.fail(index),
        disk=_replaced(process.disk, index, SlotOnDisk()),
        writing=rest,
        drained=None if process.drained == (index, step) else process.drained,
    )
    yield f"writing {step} failed", failed, Effect(Deed.FAILS, step) if write.reported else Effect()


def _empty(process: Process) -> Iterator[Move]:
    """The slot of an abandoned or void step is emptied on disk, some time after the process learned it."""
    listed = process.table.sealed_steps()
    for index, slot in enumerate(process.table.slots):
        if slot.sealed and not slot.in_use and slot.step not in listed:
            read = slot.step if index == process.drained_outside else None
            disk = _replaced(process.disk, index, SlotOnDisk(None, read))
            emptied = dataclasses.replace(process, table=process.table.empty(index), disk=disk)
            yield f"slot {index} is emptied", emptied, Effect(gave_up=slot.step)


def _drain(rules: Rules, process: Process) -> Iterator[Move]:
    """One drain, repair or drain of another process at a time begins or ends."""
    table = process.table
    if process.drained is None:
        for index, slot in enumerate(table.slots):
            if not slot.sealed or not slot.step:
                continue
            begins = dataclasses.replace(process, drained=(index, slot.step))
            if rules.drains:
                pinned = dataclasses.replace(begins, table=table.pin(index))
                yield f"a drain of slot {index} begins", pinned, Effect()
            if rules.repairs:
                repaired = dataclasses.replace(begins, table=table.begin_repair(index))
                yield f"a repair of slot {index} begins", repaired, Effect()
            if rules.outside:
                yield f"another process begins to drain slot {index}", begins, Effect()
        return
    index, slot, ends = process.drained[0], table.slots[process.drained[0]], "the drain ends"
    if slot.pins and slot.sealed:
        yield ends, dataclasses.replace(process, table=table.unpin(index), drained=None), Effect()
    elif slot.repairing:
        ended = dataclasses.replace(process, table=table.end_repair(index), drained=None)
        yield "the repair ends", ended, Effect()
    elif not slot.pins:
        disk = _replaced(process.disk, index, _unread(process.disk[index]))
        yield f"outside, {ends}", dataclasses.replace(process, disk=disk, drained=None), Effect()


def _unread(slot: SlotOnDisk) -> SlotOnDisk:
    """Nobody reads bytes without a manifest."""
    return slot if slot.manifest else SlotOnDisk()


def _restore(rules: Rules, process: Process, step: StepId) -> Iterator[Move]:
    """Makes its slot for the restored step whole where there is room, then says that it holds the state."""
    if any(write.step == step for write in process.writing):
        return
    if step not in process.offered():
        begun = _begin(rules, process, step, reported=False)
        if begun is not None:
            yield f"hydrates {step}", begun[0], Effect(gave_up=begun[1])
            return
    yield f"holds {step}", dataclasses.replace(process, ready=True), Effect(Deed.HOLDS, step)


def _set_out(rules: Rules, process: Process, step: StepId, seen: Situation) -> Iterator[Move]:
    """Hears that all processes hold the restored step: what it left behind is void, and saves may begin.

    A process that had no slot for the step until now takes one.
    """
    table = process.table.activate(Activation(seen.generation, step.step)).settle(step, Outcome.COMPLETE)
    heard = dataclasses.replace(process, table=table, restored=None)
    begun = None if table.find(step) is not None else _begin(rules, heard, step, reported=False)
    if begun is None:
        yield f"hears that all hold {step}", heard, Effect()
    else:
        yield f"hears that all hold {step}, hydrates", begun[0], Effect(gave_up=begun[1])


# Messages.


def hear_outcome(rules: Rules, process: Process, step: StepId, outcome: Outcome) -> Process:
    if process.restored is not None and not rules.listen_in_restore:
        return process
    if rules.in_order and any(older < step for older in process.unknown()):
        return process
    return dataclasses.replace(process, table=process.table.settle(step, outcome))


def hear_activation(process: Process, activation: Activation) -> Process:
    return dataclasses.replace(process, table=process.table.activate(activation))


# What the moves do to the common part.


def after_effect(rules: Rules, common: Common, effect: Effect) -> Common:
    """The common part after a move of one process. Raises Violation if it gave up what must be kept."""
    if effect.gave_up in common.promised:
        raise Violation(f"a process gives up {effect.gave_up}, one of the newest complete steps")
    step = effect.step
    if step is None:
        return common
    if effect.deed in (Deed.BEGINS, Deed.SKIPS):
        progress = list(common.progress)
        saves = common.saves + (rules.saves is not None and step.step > progress[-1])
        progress[progress.index(step.step - 1)] = step.step
        common = dataclasses.replace(common, progress=tuple(sorted(progress)), saves=saves)
    counts = dict(common.sealed)
    if effect.deed is Deed.BEGINS:
        if step in counts or step in dict(common.outcomes):
            return common
        return dataclasses.replace(common, sealed=tuple(sorted({**counts, step: 0}.items())))
    if effect.deed is Deed.SEALS:
        if step not in counts:
            return common
        return dataclasses.replace(common, sealed=tuple(sorted({**counts, step: counts[step] + 1}.items())))
    if effect.deed is Deed.HOLDS:
        return _one_more_holds(rules, common, step)
    return _decide(rules, common, step, Outcome.ABANDONED)


def _one_more_holds(rules: Rules, common: Common, step: StepId) -> Common:
    holders = common.holders + 1
    activations = common.activations
    if holders == rules.processes or rules.activate_early:
        activations |= {Activation(common.generation, step.step)}
    if holders < rules.processes:
        return dataclasses.replace(common, holders=holders, activations=activations)
    return dataclasses.replace(
        common,
        restoring=None,
        holders=0,
        activations=activations,
        promised=(step,)[: rules.promises],
        progress=(step.step,) * rules.processes,
    )


def coordinator_moves(rules: Rules, common: Common) -> Iterator[tuple[str, Common]]:
    """A time-out abandons any step without an outcome; one that all processes sealed may become complete."""
    for step, count in common.sealed:
        yield f"time-out: {step} is abandoned", _decide(rules, common, step, Outcome.ABANDONED)
        if count == rules.processes:
            yield f"{step} is complete", _decide(rules, common, step, Outcome.COMPLETE)


def _decide(rules: Rules, common: Common, step: StepId, outcome: Outcome) -> Common:
    """Writes the outcome of a step once: the first writer wins."""
    if step in dict(common.outcomes):
        return common
    promised = common.promised
    news = step.generation == common.generation or not promised or step > promised[0]
    if outcome is Outcome.COMPLETE and news and not is_void(step, common.activations):
        promised = tuple(sorted({*promised, step}, reverse=True))[: rules.promises]
    return dataclasses.replace(
        common,
        sealed=tuple(item for item in common.sealed if item[0] != step),
        outcomes=tuple(sorted((*common.outcomes, (step, outcome)), key=lambda item: item[0])),
        promised=promised,
    )


# Crashes and restores.


def without_job(rules: Rules, common: Common) -> Common:
    """The common part when the job has died: what a restart begins from."""
    common = dataclasses.replace(common, progress=(0,), restoring=None, holders=0)
    if not rules.late_messages:
        return dataclasses.replace(common, sealed=(), outcomes=())
    for step, count in common.sealed:
        if count < rules.processes:  # nobody is left to seal it, so nothing else can be written
            common = _decide(rules, common, step, Outcome.ABANDONED)
    return common


def restarted(rules: Rules, common: Common, choice: StepId | None) -> Common:
    """The common part after all have agreed on what to restore (None: nothing is left, from scratch)."""
    generation = common.generation + 1
    fresh = {Activation(generation, None)} if choice is None else set()
    return dataclasses.replace(
        common,
        generation=generation,
        restoring=choice,
        activations=common.activations | fresh,
        crashes=common.crashes + (rules.crashes is not None),
        progress=(choice.step if choice else 0,) * rules.processes,
        promised=common.promised[:1],  # which older steps are complete is forgotten with the tables
    )


def recovered(
    rules: Rules, process: Process, common: Common, table_type: type[SlotTable], wiped: bool, drained: bool
) -> Process:
    """A process in the `restarted` job: what its ramdisk says, and the plan that all agreed on."""
    disk = (SlotOnDisk(),) * rules.slots if wiped else process.disk
    disk = tuple(SlotOnDisk(slot.manifest, slot.manifest) for slot in disk)
    table = table_type.recovered([slot.manifest for slot in disk], rules.max_to_keep, common.activations)
    drain = process.drained if drained and not wiped else None
    if drain and rules.outside:
        disk = _replaced(disk, drain[0], SlotOnDisk(disk[drain[0]].manifest, drain[1]))
    elif drain:
        table = table.pin(drain[0])
    ready = common.restoring is None
    return Process(table, disk, common.progress[0], ready, drained=drain, restored=common.restoring)


def drain_outlives_crash(rules: Rules, process: Process) -> bool:
    """Whether an agent may still drain a slot when the process comes back. A repair ends with the process."""
    if process.drained is None or process.table.slots[process.drained[0]].repairing:
        return False
    return rules.outside or process.disk[process.drained[0]].manifest is not None


def went_back(rules: Rules, common: Common, choice: StepId) -> Common:
    """The common part when the running job starts to restore `choice`."""
    return dataclasses.replace(
        common,
        generation=common.generation + 1,
        restoring=choice,
        crashes=common.crashes + (rules.crashes is not None),
        progress=(choice.step,) * rules.processes,
        promised=common.promised[:1],
    )


def going_back(process: Process, common: Common, choice: StepId) -> Process:
    """A process of the running job when it starts to restore `choice`: memory and writers live on.

    The survey of what there is has told it of all earlier restores.
    """
    table = process.table
    for activation in common.activations:
        table = table.activate(activation)
    return dataclasses.replace(process, table=table, begun=choice.step, ready=False, restored=choice)


# What must hold.


def check_process(process: Process) -> None:
    """Invariant 3, the drains, and that table and ramdisk agree."""
    for index, (slot, disk) in enumerate(zip(process.table.slots, process.disk, strict=True)):
        if disk.manifest and disk.manifest != disk.bytes_of:
            raise Violation(f"slot {index}: the manifest says {disk.manifest}, the bytes are {disk.bytes_of}'s")
        if disk.manifest != (slot.step if slot.sealed else None):
            raise Violation(f"slot {index}: the table says {slot}, the manifest says {disk.manifest}")
    if process.drained:
        index, step = process.drained
        if process.disk[index].bytes_of != step:
            raise Violation(f"slot {index} was overwritten while {step} was drained from it")
    if len(process.manifests()) != len(set(process.manifests())):
        raise Violation("two slots hold the same step")


def check_progress(rules: Rules, process: Process, common: Common, outcomes: Mapping[StepId, Outcome]) -> None:
    """The progress side of invariant 2: what happens when nothing goes wrong from here on.

    Writes end, steps get their `outcomes`, a restore that has begun ends, everything said is heard, drains
    end. Then this process must accept its next save; so all processes do, one after another, and a new step
    becomes complete.
    """
    if rules.slots < rules.max_to_keep + 1:
        return
    table = process.table
    for write in process.writing:
        table = table.seal(write.slot)
    for step, outcome in outcomes.items():
        table = table.settle(step, outcome)
    for activation in common.activations:
        table = table.activate(activation)
    if process.restored:
        table = table.activate(Activation(common.generation, process.restored.step))
        table = table.settle(process.restored, Outcome.COMPLETE)
    if process.drained and table.slots[process.drained[0]].pins:
        table = table.unpin(process.drained[0])
    elif process.drained and table.slots[process.drained[0]].repairing:
        table = table.end_repair(process.drained[0])
    _, index, reason = table.begin(StepId(common.generation, process.begun + 1))
    if index is None:
        raise Violation(f"all is known, nothing is written or drained, and yet: {reason}")


# Small things.


def short(step: StepId | None) -> str:
    return f"{step.generation}/{step.step}" if step else "-"


def _content(slot: Slot, disk: SlotOnDisk) -> tuple[StepId, ...]:
    """Sort key of a slot: equal for equal slots only."""
    none = StepId(-1, -1)
    flags = StepId(int(slot.sealed) + 2 * slot.repairing, slot.pins)
    return (slot.step or none, flags, disk.manifest or none, disk.bytes_of or none)


def _replaced(items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    return (*items[:index], item, *items[index + 1 :])
