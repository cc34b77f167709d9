"""Breadth-first search over all reachable worlds of `slot_world`, with equal worlds visited once.

Processes and common parts are numbered as they appear, so that a world is a tuple of small integers, and what
a process may do next is worked out (by the production code) once per process and not once per world.

Worlds are equal, and visited once, when they differ only in

* the order of processes that hold the same shards, or of all processes where no two hold the same ones, and
  the order of a process's slots: nothing depends on either;
* the names of steps and generations: the table and the world compare step numbers with each other and
  generations with each other, and do nothing else with them, so a renaming that keeps the order keeps the
  behaviour. Those in use are renamed to 0, 1, 2, ...; the space is finite without a limit on steps or crashes;
* outcomes that everybody knows who has the step in a slot, when nobody is writing it or will begin it. To the
  others they are no news: a process that gave the step up knows a newer complete one. With late messages only
  outcomes of steps that are in no slot are forgotten: a restarted process can hear the same outcome once more;
* restores that make no step void that is in use anywhere, or none beside a later restore that is known
  everywhere: `is_void` is their only reader.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from emergency_ckpt.core.lineage import Activation, StepId, is_void
from emergency_ckpt.core.slots import Outcome, SlotTable
from tests.core import slot_world
from tests.core.slot_world import Common, Effect, Process, Rules, Situation, SlotOnDisk, Violation

T = TypeVar("T")
World = tuple[int, ...]  # the common part, then each process, as numbers
_NUMBERS = 32  # more step numbers than one world can name


@dataclasses.dataclass(frozen=True)
class Exploration:
    """What was visited. `stopped` is None when every reachable world was, else the limit that was hit."""

    worlds: int
    moves: int
    depth: int
    stopped: str | None

    def __str__(self) -> str:
        extent = f"NOT complete: {self.stopped}" if self.stopped else "all that are reachable"
        return f"{self.worlds} worlds, {self.moves} moves, depth {self.depth}, {extent}"


class Explorer:
    """One search. `table_type` is the slot state machine, or a deliberately broken one."""

    def __init__(self, rules: Rules, table_type: type[SlotTable] = SlotTable) -> None:
        self.rules = rules
        self.table_type = table_type
        self.lineages = _Interned[frozenset[Activation]]()
        self.messages = _Interned[tuple[StepId, Outcome] | Activation]()
        self.processes = _Processes(rules, self.lineages)
        self.commons = _Commons(rules, self.lineages, self.messages)
        self._effects = _Interned[Effect]()
        self._letters = [
            [i for i, letter in enumerate(rules.shards) if letter == wanted]
            for wanted in sorted(set(rules.shards))
        ]
        self._all_interchangeable = len(self._letters) in (1, rules.processes)
        # What was worked out before, by the numbers of what it depends on.
        self._moves: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._after: dict[tuple[int, int], int] = {}
        self._told: dict[tuple[int, int], int] = {}
        self._left: dict[int, int] = {}
        self._restarts: dict[World, list[World]] = {}
        self._forgotten: dict[tuple[int, int], int] = {}
        self._renaming_of: dict[tuple[int, ...], _Renaming | None] = {}
        self._renamings: dict[tuple[int, frozenset[Activation]], _Renaming] = {}
        self._can_progress: set[tuple[int, ...]] = set()

    def explore(self, max_worlds: int | None = None) -> Exploration:
        """Visits every reachable world, or the nearest `max_worlds`. Raises Violation with the way there."""
        process, common = slot_world.first_world(self.rules, self.table_type)
        ids = [self.processes.number(process)] * self.rules.processes
        first = self._canonical([self.commons.number(common), *ids])
        came_from: dict[World, World | None] = {first: None}
        layer, depth, moves = [first], 0, 0
        while layer:
            following: list[World] = []
            for world in layer:
                try:
                    self._check(world)
                    for after in self._successors(world):
                        moves += 1
                        if after not in came_from:
                            came_from[after] = world
                            following.append(after)
                except (Violation, ValueError) as problem:  # ValueError: the machine refuses what it allowed
                    raise Violation(f"{problem}\n{self._way_to(world, came_from)}") from problem
                if max_worlds is not None and len(came_from) >= max_worlds:
                    return Exploration(len(came_from), moves, depth, f"limit of {max_worlds} worlds")
            layer, depth = following, depth + bool(following)
        return Exploration(len(came_from), moves, depth, None)

    # What must hold.

    def _check(self, world: World) -> None:
        """The newest complete steps can be made whole from the ramdisks alone; a newer one can follow."""
        common = world[0]
        held = [self.processes.manifests[p] for p in world[1:]]
        missing = self.commons.promised[common] & ~self._whole(held)
        if missing or self.commons.breaks_promise[common]:
            raise Violation("one of the newest complete steps can no longer be restored")
        complete, abandoned = self.commons.complete[common], self.commons.abandoned[common]
        for p in world[1:]:
            unknown = self.processes.unknown[p]
            key = (p, complete & unknown, abandoned & unknown, self.commons.begun[common])
            if key not in self._can_progress:
                process, value = self.processes.values[p], self.commons.values[common]
                slot_world.check_process(process)
                outcomes = dict.fromkeys(_steps(key[1]), Outcome.COMPLETE)
                outcomes |= dict.fromkeys(_steps(key[2]), Outcome.ABANDONED)
                slot_world.check_progress(self.rules, process, value, outcomes)
                self._can_progress.add(key)

    def _whole(self, held: list[int]) -> int:
        """The steps that ramdisks with these manifests can make whole."""
        steps = -1
        for letter in self._letters:
            any_of = 0
            for i in letter:
                any_of |= held[i]
            steps &= any_of
        return steps

    def _restorable(self, common: int, held: list[int]) -> list[StepId]:
        activations = self.commons.values[common].activations
        return [step for step in _steps(self._whole(held)) if not is_void(step, activations)]

    # What follows a world.

    def _successors(self, world: World) -> Iterator[World]:
        common = world[0]
        for after in self.commons.decided[common]:
            yield self._canonical([after, *world[1:]])
        value = self.commons.values[common]
        for i in range(1, len(world)):
            if i > 1 and world[i] == world[i - 1] and self._all_interchangeable:
                continue  # equal processes have equal moves
            process = world[i]
            for moved, effect in self._process_moves(process, self.commons.situation[common]):
                changed = list(world)
                changed[0], changed[i] = self._after_effect(common, effect), moved
                yield self._canonical(changed)
            for message in self.commons.news[common]:
                told = self._hears(process, message)
                if told != process:
                    changed = list(world)
                    changed[i] = told
                    yield self._canonical(changed)
        if self.rules.crashes is None or value.crashes < self.rules.crashes:
            yield from self._restarts_from(world)
            if self.rules.live_restore and value.restoring is None:
                yield from self._go_back_from(world)

    def _process_moves(self, process: int, situation: int) -> list[tuple[int, int]]:
        found = self._moves.get((process, situation))
        if found is None:
            values = self.processes.values[process], self.commons.situations.values[situation]
            found = self._moves[process, situation] = [
                (self.processes.number(moved), self._effects.number(effect))
                for _, moved, effect in slot_world.process_moves(self.rules, *values)
            ]
        return found

    def _after_effect(self, common: int, effect: int) -> int:
        found = self._after.get((common, effect))
        if found is None:
            value = slot_world.after_effect(
                self.rules, self.commons.values[common], self._effects.values[effect]
            )
            found = self._after[common, effect] = self.commons.number(value)
        return found

    def _hears(self, process: int, message: int) -> int:
        found = self._told.get((process, message))
        if found is None:
            value, said = self.processes.values[process], self.messages.values[message]
            if isinstance(said, Activation):
                heard = slot_world.hear_activation(value, said)
            else:
                heard = slot_world.hear_outcome(self.rules, value, *said)
            found = self._told[process, message] = self.processes.number(heard)
        return found

    def _restarts_from(self, world: World) -> list[World]:
        left = self._left.get(world[0])
        if left is None:
            value = slot_world.without_job(self.rules, self.commons.values[world[0]])
            left = self._left[world[0]] = self.commons.number(value)
        husks = [self.processes.husks[p] for p in world[1:]]
        key = (left, *husks)
        found = self._restarts.get(key)
        if found is None:
            values = [self.processes.husk.values[h] for h in husks]
            found = self._restarts[key] = list(set(self._restart(left, values)))
        return found

    def _restart(self, common: int, husks: list[Process]) -> Iterator[World]:
        rules, value = self.rules, self.commons.values[common]
        held = [_mask(husk.manifests()) for husk in husks]
        for wiped in itertools.product((False, True), repeat=len(husks)):
            left = [0 if gone else steps for gone, steps in zip(wiped, held, strict=True)]
            candidates = sorted(self._restorable(common, left), reverse=True)
            if any(wiped) and value.promised and value.promised[0] not in candidates:
                continue  # that takes the last copy: more failures at once than the ramdisks are there for
            choices = candidates if rules.restore_older else candidates[:1]
            for choice in choices or [None]:
                after = slot_world.restarted(rules, value, choice)
                for drained in itertools.product(*[(False, True)[: 1 + bool(husk.drained)] for husk in husks]):
                    processes = [
                        slot_world.recovered(rules, husk, after, self.table_type, w, d)
                        for husk, w, d in zip(husks, wiped, drained, strict=True)
                    ]
                    ids = [self.processes.number(process) for process in processes]
                    yield self._canonical([self.commons.number(after), *ids])

    def _go_back_from(self, world: World) -> Iterator[World]:
        value = self.commons.values[world[0]]
        for choice in self._restorable(world[0], [self.processes.offered[p] for p in world[1:]]):
            processes = [slot_world.going_back(self.processes.values[p], value, choice) for p in world[1:]]
            after = self.commons.number(slot_world.went_back(self.rules, value, choice))
            yield self._canonical([after, *(self.processes.number(process) for process in processes)])

    # One name for equal worlds.

    def _canonical(self, world: list[int]) -> World:
        processes, commons, common = self.processes, self.commons, world[0]
        listening, names, used = 0, commons.names[common], commons.used[common]
        lineages = [commons.lineage[common]]
        for p in world[1:]:
            listening |= processes.listening[p]
            names |= processes.names[p]
            used |= processes.used[p]
            lineages.append(processes.lineage[p])
        deaf = commons.messages[common] & ~listening
        if deaf:
            return self._canonical([self._forget(common, deaf), *world[1:]])
        key = (names, used, *lineages)
        if key in self._renaming_of:
            renaming = self._renaming_of[key]
        else:
            renaming = self._renaming_of[key] = self._renaming(names, used, tuple(lineages))
        if renaming is not None:
            world = [renaming.common(commons, common), *(renaming.process(processes, p) for p in world[1:])]
        if self._all_interchangeable:
            return (world[0], *sorted(world[1:]))
        ordered = [sorted(world[1 + i] for i in letter) for letter in self._letters]
        return (world[0], *itertools.chain.from_iterable(ordered))

    def _forget(self, common: int, steps: int) -> int:
        found = self._forgotten.get((common, steps))
        if found is None:
            gone, value = set(_steps(steps)), self.commons.values[common]
            value = dataclasses.replace(
                value,
                sealed=tuple(item for item in value.sealed if item[0] not in gone),
                outcomes=tuple(item for item in value.outcomes if item[0] not in gone),
            )
            found = self._forgotten[common, steps] = self.commons.number(value)
        return found

    def _renaming(self, names: int, used: int, lineages: tuple[int, ...]) -> _Renaming | None:
        """How to rename this world; None where every name is as it should be."""
        all_lineages = [self.lineages.values[number] for number in lineages]
        useless = _useless(all_lineages, _steps(used))
        kept = frozenset().union(*all_lineages) - useless
        names |= _names((), [a.step for a in kept if a.step is not None], [a.generation for a in kept])
        generations, numbers = divmod(names, 1 << _NUMBERS)
        ours = generations >> 1  # 0 is the generation of other programs, which no restore makes void
        if not useless and not generations & 1 and not ours & (ours + 1) and not numbers & (numbers + 1):
            return None
        key = (names, useless)
        found = self._renamings.get(key)
        if found is None:
            found = self._renamings[key] = _Renaming(tuple(_bits(numbers)), tuple(_bits(generations)), useless)
        return found

    # How a world was reached, for the person who has to understand a violation.

    def _way_to(self, world: World, came_from: dict[World, World | None]) -> str:
        way: list[World] = [world]
        while (before := came_from[way[-1]]) is not None:
            way.append(before)
        way.reverse()
        lines = [self._describe(way[0])]
        for before, after in itertools.pairwise(way):
            lines += [f"- {self._label(before, after)}", self._describe(after)]
        return "\n".join(lines)

    def _label(self, before: World, after: World) -> str:
        value = self.commons.values[before[0]]
        for i in range(1, len(before)):
            process = self.processes.values[before[i]]
            for label, moved, effect in slot_world.process_moves(
                self.rules, process, slot_world.situation(self.rules, value)
            ):
                changed = list(before)
                changed[0] = self._after_effect(before[0], self._effects.number(effect))
                changed[i] = self.processes.number(moved)
                if self._canonical(changed) == after:
                    return f"process {i - 1}: {label}"
            for message in self.commons.news[before[0]]:
                changed = list(before)
                changed[i] = self._hears(before[i], message)
                if self._canonical(changed) == after:
                    return f"process {i - 1} hears {self.messages.values[message]}"
        for label, common in slot_world.coordinator_moves(self.rules, value):
            if self._canonical([self.commons.number(common), *before[1:]]) == after:
                return label
        return "restart" if after in self._restarts_from(before) else "the job goes back"

    def _describe(self, world: World) -> str:
        lines = [f"  {self.commons.values[world[0]]}"]
        lines += [f"  process {i} {self.processes.values[p]}" for i, p in enumerate(world[1:])]
        return "\n".join(lines)


class _Interned(Generic[T]):
    """Values numbered in order of appearance, with what is needed of each worked out once."""

    def __init__(self) -> None:
        self.values: list[T] = []
        self._numbers: dict[T, int] = {}

    def number(self, value: T) -> int:
        found = self._numbers.get(value)
        if found is None:
            found = self._numbers[value] = len(self.values)
            self.values.append(value)
            self._work_out(value)
        return found

    def _work_out(self, value: T) -> None: ...


class _Processes(_Interned[Process]):
    """Sets of steps are bit masks (`_mask`)."""

    def __init__(self, rules: Rules, lineages: _Interned[frozenset[Activation]]) -> None:
        super().__init__()
        self.rules = rules
        self.lineages = lineages
        self.lineage: list[int] = []  # the restores that it knows of
        self.used: list[int] = []  # steps that it names anywhere
        self.names: list[int] = []  # the numbers and generations of those (`_names`)
        self.unknown: list[int] = []  # steps in its slots whose outcome it does not know
        self.listening: list[int] = []  # steps whose outcome may matter to it
        self.manifests: list[int] = []
        self.offered: list[int] = []
        self.husks: list[int] = []  # what a crash leaves of it
        self.husk = _Interned[Process]()
        self._as_given: dict[Process, int] = {}

    def number(self, value: Process) -> int:
        found = self._as_given.get(value)
        if found is None:
            found = self._as_given[value] = super().number(value.in_order())
        return found

    def _work_out(self, value: Process) -> None:
        in_slots = {slot.step for slot in value.table.slots if slot.step}
        named = in_slots | value.table.complete | value.table.abandoned | set(value.manifests())
        named |= {write.step for write in value.writing} | ({value.drained[1]} if value.drained else set())
        named |= {value.restored} if value.restored else set()
        self.lineage.append(self.lineages.number(value.table.activations))
        self.used.append(_mask(named))
        self.names.append(_names(named))
        self.unknown.append(_mask(value.unknown()))
        writing = _mask(write.step for write in value.writing)
        self.listening.append(_mask(in_slots) if self.rules.late_messages else self.unknown[-1] | writing)
        self.manifests.append(_mask(value.manifests()))
        self.offered.append(_mask(value.offered()))
        disk = tuple(SlotOnDisk(slot.manifest, slot.manifest) for slot in value.disk)
        drained = value.drained if slot_world.drain_outlives_crash(self.rules, value) else None
        self.husks.append(self.husk.number(Process(SlotTable(()), disk, drained=drained)))


class _Commons(_Interned[Common]):
    def __init__(
        self,
        rules: Rules,
        lineages: _Interned[frozenset[Activation]],
        messages: _Interned[tuple[StepId, Outcome] | Activation],
    ) -> None:
        super().__init__()
        self.rules = rules
        self.lineages = lineages
        self.all_messages = messages
        self.lineage: list[int] = []  # the restores on record
        self.begun: list[int] = []  # those with the generation that goes on
        self._begun = _Interned[tuple[int, int]]()
        self.news: list[list[int]] = []  # what a process may hear
        self.used: list[int] = []
        self.names: list[int] = []
        self.messages: list[int] = []  # steps under `sealed` or `outcomes` that nobody will begin
        self.promised: list[int] = []
        self.breaks_promise: list[bool] = []
        self.complete: list[int] = []  # steps that are complete, or will be when nothing goes wrong
        self.abandoned: list[int] = []
        self.decided: list[list[int]] = []
        self.situation: list[int] = []
        self.situations = _Interned[Situation]()

    def _work_out(self, value: Common) -> None:
        steps = [step for step, _ in value.sealed] + [step for step, _ in value.outcomes]
        named = [*steps, *value.promised, *([value.restoring] if value.restoring else [])]
        numbers = range(value.progress[0], value.progress[-1] + 1)
        self.used.append(_mask(named))
        self.names.append(_names(named, numbers, [value.generation]))
        coming = {s for s in steps if s.generation == value.generation and s.step > value.progress[0]}
        self.messages.append(_mask(set(steps) - coming))
        self.promised.append(_mask(value.promised))
        self.breaks_promise.append(any(is_void(step, value.activations) for step in value.promised))
        complete = {step for step, outcome in value.outcomes if outcome is Outcome.COMPLETE}
        complete |= {step for step, count in value.sealed if count == self.rules.processes}
        self.complete.append(_mask(complete))
        self.abandoned.append(_mask(set(steps) - complete))
        self.situation.append(self.situations.number(slot_world.situation(self.rules, value)))
        self.lineage.append(self.lineages.number(value.activations))
        self.begun.append(self._begun.number((self.lineage[-1], value.generation)))
        self.news.append([self.all_messages.number(m) for m in (*value.outcomes, *value.activations)])
        decided: list[int] = []
        self.decided.append(decided)
        decided += [self.number(after) for _, after in slot_world.coordinator_moves(self.rules, value)]


def _useless(lineages: list[frozenset[Activation]], steps: list[StepId]) -> frozenset[Activation]:
    """Activations that make nothing void, or nothing that a later one, known everywhere, does not."""
    everything = frozenset().union(*lineages)
    useless = {a for a in everything if not any(a.voids(step) for step in steps)}
    everywhere = frozenset.intersection(*lineages)
    for a in everything - useless:
        voided = [step for step in steps if a.voids(step)]
        useless |= {a for b in everywhere if b > a and all(b.voids(step) for step in voided)}
    return frozenset(useless)


class _Renaming:
    """An order-preserving renaming: the n-th number in use becomes n, and so for generations, from 1."""

    def __init__(
        self, numbers: tuple[int, ...], generations: tuple[int, ...], dropped: frozenset[Activation]
    ) -> None:
        self._number = {number: i for i, number in enumerate(numbers)}
        self._generation = {generation: i for i, generation in enumerate(generations, start=1)}
        self._dropped = dropped
        self._processes: dict[int, int] = {}
        self._commons: dict[int, int] = {}

    def process(self, processes: _Processes, process: int) -> int:
        found = self._processes.get(process)
        if found is None:
            found = self._processes[process] = processes.number(self._process(processes.values[process]))
        return found

    def common(self, commons: _Commons, common: int) -> int:
        found = self._commons.get(common)
        if found is None:
            found = self._commons[common] = commons.number(self._common(commons.values[common]))
        return found

    def _process(self, process: Process) -> Process:
        table, step = process.table, self._step
        table = dataclasses.replace(
            table,
            slots=tuple(dataclasses.replace(slot, step=self._optional(slot.step)) for slot in table.slots),
            complete=frozenset(map(step, table.complete)),
            abandoned=frozenset(map(step, table.abandoned)),
            activations=self._activations(table.activations),
        )
        return dataclasses.replace(
            process,
            table=table,
            disk=tuple(
                SlotOnDisk(self._optional(s.manifest), self._optional(s.bytes_of)) for s in process.disk
            ),
            begun=self._number[process.begun],
            writing=tuple(dataclasses.replace(write, step=step(write.step)) for write in process.writing),
            drained=(process.drained[0], step(process.drained[1])) if process.drained else None,
            restored=self._optional(process.restored),
        )

    def _common(self, common: Common) -> Common:
        step = self._step
        return dataclasses.replace(
            common,
            progress=tuple(self._number[number] for number in common.progress),
            generation=self._generation[common.generation],
            sealed=tuple((step(sealed), count) for sealed, count in common.sealed),
            outcomes=tuple((step(settled), outcome) for settled, outcome in common.outcomes),
            activations=self._activations(common.activations),
            restoring=self._optional(common.restoring),
            promised=tuple(map(step, common.promised)),
        )

    def _step(self, step: StepId) -> StepId:
        return StepId(self._generation[step.generation], self._number[step.step])

    def _optional(self, step: StepId | None) -> StepId | None:
        return self._step(step) if step else None

    def _activations(self, activations: frozenset[Activation]) -> frozenset[Activation]:
        return frozenset(
            Activation(self._generation[a.generation], None if a.step is None else self._number[a.step])
            for a in activations - self._dropped
        )


def _mask(steps: Iterable[StepId]) -> int:
    """A set of steps as an integer: one row of bits per generation."""
    mask = 0
    for step in steps:
        mask |= 1 << (step.generation * _NUMBERS + step.step)
    return mask


def _names(steps: Iterable[StepId], numbers: Iterable[int] = (), generations: Iterable[int] = ()) -> int:
    """The step numbers (low bits) and generations (high bits) that are in use."""
    mask = 0
    for step in steps:
        mask |= 1 << step.step | 1 << (_NUMBERS + step.generation)
    for number in numbers:
        mask |= 1 << number
    for generation in generations:
        mask |= 1 << (_NUMBERS + generation)
    return mask


def _steps(mask: int) -> list[StepId]:
    return [StepId(*divmod(bit, _NUMBERS)) for bit in _bits(mask)]


def _bits(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]
