"""Breadth-first exploration of the slot state machine that runs in production.

A small world of processes, ramdisks, a coordination service and an adversary is explored completely: every
interleaving of begin, write, seal, report, time-out, learning an outcome (or never learning it), draining,
crash at any of these points, restart, restore of the newest or of an older step, and retraining of the same
step numbers. In every reachable state the invariants 1-3 must hold.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator

import pytest

from emergency_ckpt.core.lineage import Activation, StepId, is_void
from emergency_ckpt.core.slots import Outcome, Slot, SlotTable

TORN = "torn"


@dataclasses.dataclass(frozen=True)
class Disk:
    """One process's ramdisk: per slot the manifest's step and what the data region really holds."""

    manifests: tuple[StepId | None, ...]
    data: tuple[StepId | str | None, ...]

    def put(self, slot: int, manifest: StepId | None, data: StepId | str | None) -> Disk:
        return Disk(
            (*self.manifests[:slot], manifest, *self.manifests[slot + 1 :]),
            (*self.data[:slot], data, *self.data[slot + 1 :]),
        )


@dataclasses.dataclass(frozen=True)
class Process:
    """Memory of one process (lost in a crash)."""

    table: SlotTable
    begun: int  # the last step number that save() was called for
    writing: tuple[tuple[int, bool], ...] = ()  # (slot, data complete), oldest first
    waiting: tuple[StepId, ...] = ()  # sealed or refused, outcome not learned yet
    reported: frozenset[StepId] = frozenset()
    drained: int | None = None  # the slot that a drain has pinned


@dataclasses.dataclass(frozen=True)
class World:
    processes: tuple[Process | None, ...]
    disks: tuple[Disk, ...]
    generation: int
    outcomes: tuple[tuple[StepId, Outcome], ...] = ()
    activations: frozenset[Activation] = frozenset()  # durable record
    restoring: StepId | None = None  # agreed plan whose state not everyone holds yet
    holding: frozenset[int] = frozenset()
    promised: StepId | None = None  # the newest step that must never be lost
    crashes: int = 0


@dataclasses.dataclass(frozen=True)
class Rules:
    process_count: int
    slot_count: int
    last_step: int
    max_crashes: int
    max_to_keep: int = 1
    restore_older: bool = False
    drains: bool = False
    replicated: bool = False  # every process holds every shard; a crash may wipe the ramdisk


def restorable(world: World, rules: Rules) -> set[StepId]:
    """Steps that the ramdisks alone can make whole."""
    held = [{m for m in disk.manifests if m} for disk in world.disks]
    steps = set.union(*held) if rules.replicated else set.intersection(*held)
    return {step for step in steps if not is_void(step, world.activations)}


def check(world: World, rules: Rules) -> None:
    for disk in world.disks:
        for manifest, data in zip(disk.manifests, disk.data, strict=True):
            assert manifest is None or manifest == data, "a manifest stands over foreign or torn data"
    if world.promised is not None:
        newest = max(restorable(world, rules), default=None)
        assert newest is not None, f"nothing is restorable, {world.promised} was promised"
        assert newest >= world.promised, f"{newest} is the newest restorable step, {world.promised} was promised"
    steps = [step for step, _ in world.outcomes]
    assert len(steps) == len(set(steps)), "an outcome was written twice"


def successors(world: World, rules: Rules) -> Iterator[World]:
    for i, process in enumerate(world.processes):
        if process is None:
            continue
        if world.restoring is None:
            yield from save_moves(world, rules, i, process)
        elif i not in world.holding:
            yield from hold_moves(world, rules, i, process)
        yield from learn_moves(world, rules, i, process)
        if world.crashes < rules.max_crashes:
            dead = replace_process(world, i, None, crashes=world.crashes + 1)
            yield dead
            if rules.replicated and safe_to_wipe(world, i):
                blank = Disk((None,) * rules.slot_count, (None,) * rules.slot_count)
                yield dataclasses.replace(dead, disks=replaced(world.disks, i, blank))
    if any(process is None for process in world.processes):
        yield from restart_moves(world, rules)


def save_moves(world: World, rules: Rules, i: int, process: Process) -> Iterator[World]:
    # The train loop calls save() for the next step; the writer thread may still be busy with the one before.
    if process.begun < rules.last_step and len(process.writing) < 2:
        step = StepId(world.generation, process.begun + 1)
        table, slot, _ = process.table.begin(step)
        if slot is None:
            skipped = dataclasses.replace(process, begun=step.step, waiting=(*process.waiting, step))
            yield replace_process(world, i, skipped, outcome=(step, Outcome.ABANDONED))
        else:
            begun = dataclasses.replace(
                process, table=table, begun=step.step, writing=(*process.writing, (slot, False))
            )
            yield replace_process(world, i, begun, disk=world.disks[i].put(slot, None, TORN))
    if process.writing:
        (slot, written), rest = process.writing[0], process.writing[1:]
        step = process.table.slots[slot].step
        assert step is not None
        if not written:
            done = dataclasses.replace(process, writing=((slot, True), *rest))
            yield replace_process(world, i, done, disk=world.disks[i].put(slot, None, step))
            failed = dataclasses.replace(
                process, table=process.table.fail(slot), writing=rest, waiting=(*process.waiting, step)
            )
            yield replace_process(world, i, failed, outcome=(step, Outcome.ABANDONED))
        else:
            sealed = dataclasses.replace(
                process, table=process.table.seal(slot), writing=rest, waiting=(*process.waiting, step)
            )
            yield replace_process(world, i, sealed, disk=world.disks[i].put(slot, step, step))
    for step in process.waiting:
        sealed_here = process.table.find(step) is not None
        if sealed_here and step not in process.reported:
            reported = dataclasses.replace(process, reported=process.reported | {step})
            everyone = all(p is not None and (j == i or step in p.reported) for j, p in enumerate(world.processes))
            if everyone:
                yield replace_process(world, i, reported, outcome=(step, Outcome.COMPLETE))
            yield replace_process(world, i, reported)  # not the last one, or cut off before the outcome
        if step not in dict(world.outcomes):
            yield replace_process(world, i, process, outcome=(step, Outcome.ABANDONED))  # time-out
    if rules.drains and process.drained is None:
        for slot, held in enumerate(process.table.slots):
            if held.sealed and held.step in process.table.complete:
                pinned = dataclasses.replace(process, table=process.table.pin(slot), drained=slot)
                yield replace_process(world, i, pinned)
    if process.drained is not None:
        free = dataclasses.replace(process, table=process.table.unpin(process.drained), drained=None)
        yield replace_process(world, i, free)


def learn_moves(world: World, rules: Rules, i: int, process: Process) -> Iterator[World]:
    for step, outcome in world.outcomes:
        if step not in process.waiting:
            continue
        waiting = tuple(s for s in process.waiting if s != step)
        table, disk = process.table.settle(step, outcome), world.disks[i]
        slot = table.find(step)
        if outcome is Outcome.ABANDONED and slot is not None:
            table, disk = table.empty(slot), disk.put(slot, None, disk.data[slot])
        known = dataclasses.replace(process, table=table, waiting=waiting, reported=process.reported - {step})
        yield replace_process(world, i, known, disk=disk)
    for activation in world.activations - process.table.activations:
        told = dataclasses.replace(process, table=process.table.activate(activation))
        yield replace_process(world, i, told)


def hold_moves(world: World, rules: Rules, i: int, process: Process) -> Iterator[World]:
    """One process makes its slot for the restored step whole, then says that it holds the state."""
    step = world.restoring
    assert step is not None
    if process.writing:
        (slot, written), rest = process.writing[0], process.writing[1:]
        if not written:
            done = dataclasses.replace(process, writing=((slot, True), *rest))
            yield replace_process(world, i, done, disk=world.disks[i].put(slot, None, step))
        else:
            sealed = dataclasses.replace(process, table=process.table.seal(slot), writing=rest)
            yield replace_process(world, i, sealed, disk=world.disks[i].put(slot, step, step))
        return
    if process.table.find(step) is None:
        table, slot, _ = process.table.begin(step)
        if slot is not None:
            hydrating = dataclasses.replace(process, table=table, writing=((slot, False),))
            yield replace_process(world, i, hydrating, disk=world.disks[i].put(slot, None, TORN))
            return
    # Either the slot is whole, or there is no room and the state is held in memory only.
    holding = world.holding | {i}
    held = dataclasses.replace(world, holding=holding)
    if len(holding) == rules.process_count:
        # Process 0 writes the durable record; each process learns of it when the message arrives.
        activation = Activation(world.generation, step.step)
        held = dataclasses.replace(
            held, restoring=None, holding=frozenset(), activations=world.activations | {activation}, promised=step
        )
    yield held


def restart_moves(world: World, rules: Rules) -> Iterator[World]:
    candidates = sorted(restorable(world, rules), reverse=True)
    generation = world.generation + 1
    for choice in candidates if rules.restore_older else candidates[:1]:
        tables = []
        for disk in world.disks:
            table = SlotTable.recovered(disk.manifests, rules.max_to_keep, world.activations)
            # The plan that all agreed on covers this step with verified shards.
            tables.append(table.settle(choice, Outcome.COMPLETE))
        yield dataclasses.replace(
            world,
            processes=tuple(Process(table, begun=choice.step) for table in tables),
            generation=generation,
            outcomes=(),
            restoring=choice,
            holding=frozenset(),
        )
    if not candidates:
        fresh = Activation(generation, None)
        yield dataclasses.replace(
            world,
            processes=tuple(
                Process(SlotTable.recovered(d.manifests, rules.max_to_keep, [*world.activations, fresh]), begun=0)
                for d in world.disks
            ),
            generation=generation,
            outcomes=(),
            activations=world.activations | {fresh},
            restoring=None,
            holding=frozenset(),
        )


def safe_to_wipe(world: World, i: int) -> bool:
    """A single failure: some other ramdisk still holds the promised step."""
    return world.promised is None or any(
        world.promised in disk.manifests for j, disk in enumerate(world.disks) if j != i
    )


def replaced(items: tuple, index: int, item: object) -> tuple:
    return (*items[:index], item, *items[index + 1 :])


def replace_process(
    world: World,
    i: int,
    process: Process | None,
    disk: Disk | None = None,
    outcome: tuple[StepId, Outcome] | None = None,
    crashes: int | None = None,
) -> World:
    outcomes, promised = world.outcomes, world.promised
    if outcome and outcome[0] not in dict(outcomes):  # write-once: the first writer wins
        outcomes = tuple(sorted((*outcomes, outcome), key=lambda item: item[0]))
        if outcome[1] is Outcome.COMPLETE and (promised is None or outcome[0] > promised):
            promised = outcome[0]
    return dataclasses.replace(
        world,
        processes=replaced(world.processes, i, process),
        disks=replaced(world.disks, i, disk) if disk else world.disks,
        outcomes=outcomes,
        promised=promised,
        crashes=world.crashes if crashes is None else crashes,
    )


def explore(rules: Rules) -> int:
    """Visits every reachable world, checks each, and returns how many there are."""
    blank = Disk((None,) * rules.slot_count, (None,) * rules.slot_count)
    table = SlotTable((Slot(),) * rules.slot_count, rules.max_to_keep)
    start = World((Process(table, begun=0),) * rules.process_count, (blank,) * rules.process_count, generation=1)
    seen, queue = {start}, deque([start])
    while queue:
        world = queue.popleft()
        check(world, rules)
        for following in successors(world, rules):
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return len(seen)


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param(Rules(2, 2, last_step=4, max_crashes=1), id="two-slots"),
        pytest.param(Rules(2, 2, last_step=2, max_crashes=2, restore_older=True), id="restore-older"),
        pytest.param(Rules(2, 2, last_step=3, max_crashes=1, drains=True), id="drains"),
        pytest.param(Rules(2, 2, last_step=2, max_crashes=2, replicated=True), id="wiped-ramdisk"),
    ],
)
def test_no_reachable_state_loses_the_newest_restorable_step(rules: Rules) -> None:
    assert explore(rules) > 1000
