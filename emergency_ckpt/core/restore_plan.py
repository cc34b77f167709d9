"""The restore plan: for one step, where every process gets each of its shards from, and why this step.

Each process reads the part that is common to all and its own part, nothing else: a plan for thousands of
processes names millions of shards.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

from emergency_ckpt.core.index_runs import MOST_INDICES, runs_from_json, runs_to_json, whole_number
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.errors import CorruptDataError


@dataclasses.dataclass(frozen=True, slots=True)
class Take:
    """Shards that a process copies out of one slot.

    Attributes:
      process: whose ramdisk; may be the process itself, where its own slot is cut otherwise.
      layout: hash of the layout of that slot.
      position: position in that layout.
      shards: ascending indices into that layout's shards. Without any, the slot is the one whose values (leaves
        that are no arrays) count.
    """

    process: int
    layout: str
    position: int
    shards: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessPlan:
    """Where one process gets all its shards from.

    Attributes:
      in_place: its own slot for the step holds exactly the shards that it needs; it is kept, and only what is
        missing in it is fetched into it.
      takes: what it copies out of slots.
      persistent: ascending indices into the wanted layout's shards that it reads from the persistent tier.
      sender: the process that sends it everything by device broadcast; then nothing else is set.
    """

    in_place: bool = False
    takes: tuple[Take, ...] = ()
    persistent: tuple[int, ...] = ()
    sender: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it has everything on its own ramdisk already."""
        return self.in_place and not self.takes and not self.persistent

    def to_json(self) -> dict[str, Any]:
        layouts = sorted({take.layout for take in self.takes})
        return {
            "in_place": self.in_place,
            "layouts": layouts,
            "takes": [
                [take.process, layouts.index(take.layout), take.position, runs_to_json(take.shards)]
                for take in self.takes
            ],
            "persistent": runs_to_json(self.persistent),
            "sender": self.sender,
        }

    @classmethod
    def from_json(cls, raw: Any) -> ProcessPlan:
        """Raises ValueError, TypeError, KeyError or IndexError for what `to_json` did not write."""
        if type(raw["in_place"]) is not bool:
            raise TypeError(f"in_place is {raw['in_place']!r:.80}")
        layouts = tuple(map(_text, raw["layouts"]))
        takes = tuple(
            Take(
                whole_number(process),
                layouts[whole_number(layout)],
                whole_number(position),
                runs_from_json(shards),
            )
            for process, layout, position, shards in raw["takes"]
        )
        sender = None if raw["sender"] is None else whole_number(raw["sender"])
        found = cls(raw["in_place"], takes, runs_from_json(raw["persistent"]), sender)
        if sender is not None and found != cls(sender=sender):
            raise ValueError("a process that receives a broadcast has other sources too")
        return found


IN_PLACE = ProcessPlan(in_place=True)
"""The plan of a process that has all its shards."""


@dataclasses.dataclass(frozen=True, slots=True)
class Strike:
    """A source that turned out bad: shards of a process's slot for a step, or of the persistent step.

    `process` None is the persistent tier; `shards` None stands for all of it. `why` says what was found; it is
    one strike whatever it says.
    """

    step: StepId
    process: int | None
    shards: frozenset[Shard] | None = None
    why: str = dataclasses.field(default="", compare=False)

    def to_json(self) -> list[Any]:
        """Equal strikes differ in nothing but the last element."""
        shards = None if self.shards is None else [_shard_to_json(shard) for shard in sorted(self.shards)]
        return [self.step.generation, self.step.step, self.process, shards, self.why]

    @classmethod
    def from_json(cls, raw: Any) -> Strike:
        """Raises CorruptDataError for what `to_json` did not write."""
        try:
            generation, step, process, shards, why = raw
            return cls(
                StepId(whole_number(generation), whole_number(step)),
                None if process is None else whole_number(process),
                None if shards is None else frozenset(map(_shard_from_json, shards)),
                _text(why),
            )
        except (ValueError, TypeError) as error:
            raise CorruptDataError(f"a strike cannot be read: {error}: {raw!r:.200}") from error


@dataclasses.dataclass(frozen=True)
class CommonPlan:
    """What every process knows of a plan.

    Attributes:
      step: the step that all processes restore.
      senders: per process, who sends it everything by device broadcast; None for those that do without.
      readers: the processes that read the persistent tier, ascending.
      extras_from: per process, the process whose ramdisk has its extras; None where they come from the
        persistent tier or where the step has none.
      reason: why this step and these sources, in words.
      extras_kept: where another number of processes saved the step, per process of that job the process whose
        ramdisk has its extras (None: nobody's); empty otherwise, and where there are none on ramdisks.
    """

    step: StepId
    senders: tuple[int | None, ...]
    readers: tuple[int, ...]
    extras_from: tuple[int | None, ...]
    reason: str
    extras_kept: tuple[int | None, ...] = ()

    @property
    def has_broadcast(self) -> bool:
        """Whether any process sends: all of a mesh take part then."""
        return any(sender is not None for sender in self.senders)

    @property
    def uses_persistent(self) -> bool:
        return bool(self.readers)

    def receivers(self, process: int) -> tuple[int, ...]:
        """Those to whom `process` sends by broadcast."""
        return tuple(p for p, sender in enumerate(self.senders) if sender == process)

    def sends_broadcast(self, process: int) -> bool:
        return process in self.senders

    def wards(self, process: int) -> tuple[int, ...]:
        """The other processes whose extras come from the ramdisk of `process`."""
        return tuple(p for p, keeper in enumerate(self.extras_from) if keeper == process != p)

    def to_json(self) -> dict[str, Any]:
        return {
            "step": [self.step.generation, self.step.step],
            "processes": len(self.senders),
            "senders": _offsets_to_json(self.senders),
            "readers": runs_to_json(self.readers),
            "extras_from": _offsets_to_json(self.extras_from),
            "reason": self.reason,
            "saved_by": len(self.extras_kept),
            "extras_kept": _offsets_to_json(self.extras_kept),
        }

    @classmethod
    def from_json(cls, raw: Any) -> CommonPlan:
        """Raises CorruptDataError for what `to_json` did not write."""
        try:
            generation, step = raw["step"]
            count, saved_by = whole_number(raw["processes"]), whole_number(raw["saved_by"])
            if max(count, saved_by) > MOST_INDICES:
                raise ValueError(f"a plan of {count} processes for what {saved_by} saved")
            found = cls(
                StepId(whole_number(generation), whole_number(step)),
                _offsets_from_json(raw["senders"], count, count),
                runs_from_json(raw["readers"]),
                _offsets_from_json(raw["extras_from"], count, count),
                _text(raw["reason"]),
                _offsets_from_json(raw["extras_kept"], saved_by, count),
            )
            if found.readers and found.readers[-1] >= count:
                raise ValueError(f"process {found.readers[-1]} of {count} reads the persistent tier")
            return found
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise _unreadable(raw, error) from error


@dataclasses.dataclass(frozen=True)
class PlanOfOne:
    """What one process knows of a plan: the common part, and its own."""

    process: int
    common: CommonPlan
    own: ProcessPlan

    @property
    def step(self) -> StepId:
        return self.common.step

    @classmethod
    def from_json(cls, process: int, common: Any, own: Any) -> PlanOfOne:
        """Of what `RestorePlan.common_json` and `process_json` gave; CorruptDataError for anything else."""
        shared = CommonPlan.from_json(common)
        try:
            mine = ProcessPlan.from_json(own)
            if shared.senders[process] != mine.sender:
                raise ValueError(f"process {process} is sent to by {shared.senders[process]} and {mine.sender}")
            if (process in shared.readers) != bool(mine.persistent):
                raise ValueError(f"process {process} reads the persistent tier in one part of the plan only")
            if any(take.process >= len(shared.senders) for take in mine.takes):
                raise ValueError(f"process {process} takes from a process that there is not")
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise _unreadable(own, error) from error
        return cls(process, shared, mine)


@dataclasses.dataclass(frozen=True)
class RestorePlan:
    """How to restore one step.

    Attributes:
      step: the step that all processes restore.
      processes: per process, where its shards come from.
      extras_from: per process, the process whose ramdisk has its extras; None where they come from the
        persistent tier or where the step has none.
      reason: why this step and these sources, in words.
      extras_kept: as in `CommonPlan`.
    """

    step: StepId
    processes: tuple[ProcessPlan, ...]
    extras_from: tuple[int | None, ...]
    reason: str
    extras_kept: tuple[int | None, ...] = ()

    @functools.cached_property
    def common(self) -> CommonPlan:
        """The part that every process knows."""
        return CommonPlan(
            self.step,
            tuple(plan.sender for plan in self.processes),
            tuple(p for p, plan in enumerate(self.processes) if plan.persistent),
            self.extras_from,
            self.reason,
            self.extras_kept,
        )

    @property
    def uses_persistent(self) -> bool:
        return self.common.uses_persistent

    def sends_broadcast(self, process: int) -> bool:
        return self.common.sends_broadcast(process)

    def of(self, process: int) -> PlanOfOne:
        return PlanOfOne(process, self.common, self.processes[process])

    def common_json(self) -> dict[str, Any]:
        return self.common.to_json()

    def process_json(self, process: int) -> dict[str, Any]:
        return self.processes[process].to_json()


def _shard_to_json(shard: Shard) -> list[Any]:
    return [shard.leaf, list(shard.box.start), list(shard.box.stop)]


def _shard_from_json(raw: Any) -> Shard:
    leaf, start, stop = raw
    return Shard(_text(leaf), Box(tuple(map(whole_number, start)), tuple(map(whole_number, stop))))


def _offsets_to_json(numbers: Sequence[int | None]) -> list[list[int | None]]:
    """A process number (or None) per process as runs of [how many, distance of the first from its own]."""
    runs: list[list[int | None]] = []
    for process, number in enumerate(numbers):
        distance = None if number is None else number - process
        if runs and runs[-1][1] == distance:
            runs[-1][0] = (runs[-1][0] or 0) + 1
        else:
            runs.append([1, distance])
    return runs


def _offsets_from_json(raw: Any, count: int, processes: int) -> tuple[int | None, ...]:
    """`count` numbers of processes, of which there are `processes`."""
    numbers: list[int | None] = []
    for length, distance in raw:
        if not 0 < whole_number(length) <= count - len(numbers):
            raise ValueError(f"a list of {count} processes has a run of {length}")
        if distance is None:
            numbers.extend([None] * length)
            continue
        if type(distance) is not int:
            raise TypeError(f"{distance!r:.80} is no distance")
        first = len(numbers) + distance
        if first < 0 or first + length > processes:
            raise ValueError(f"a list of {count} processes names process {first}")
        numbers.extend(range(first, first + length))
    if len(numbers) != count:
        raise ValueError(f"a list of {count} processes has {len(numbers)}")
    return tuple(numbers)


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError(f"{raw!r:.80} is no text")
    return raw


def _unreadable(raw: Any, error: Exception) -> CorruptDataError:
    return CorruptDataError(f"a restore plan cannot be read: {error}: {json.dumps(raw, default=repr):.200}")
