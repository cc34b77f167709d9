"""What is worth one line: an event holds what one operation did, and says it in words.

Who did it (run, generation, process, slice) is the log's context and no field here, so that no event can
contradict the line it stands on. Durations are seconds, sizes are bytes, of this process alone.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from emergency_ckpt.telemetry.units import format_bytes, format_seconds

Severity = Literal["info", "warning", "error"]
Outcome = Literal["complete", "abandoned"]
DrainResult = Literal["committed", "superseded", "failed"]
_DRAIN_SEVERITY: dict[DrainResult, Severity] = {"committed": "info", "superseded": "warning", "failed": "error"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events.

    Attributes:
      step: the step that it is about; None where there is none (a start from scratch).
    """

    operation: ClassVar[str]
    step: int | None

    @property
    def severity(self) -> Severity:
        return "info"

    def describe(self) -> str:
        """The event in words, without its context."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartEvent(Event):
    """The manager is ready: where it keeps steps, and which step this life of the run continues from.

    `step` is the newest restorable step, None when the run starts from scratch; `reason` says why.
    """

    operation: ClassVar[str] = "start"
    local_directory: str | None
    persistent_directory: str | None
    slots: int
    slot_bytes: int
    process_count: int
    slice_count: int
    seconds: float
    reason: str

    def describe(self) -> str:
        local = (
            f"{self.slots} slots of {format_bytes(self.slot_bytes)} in {self.local_directory}"
            if self.local_directory
            else "no local tier"
        )
        return (
            f"{self.process_count} processes in {self.slice_count} slices, {local}, "
            f"persistent {self.persistent_directory or 'none'}, ready after {format_seconds(self.seconds)}: "
            f"{self.reason}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveEvent(Event):
    """A save reached its agreed outcome.

    Attributes:
      bytes: written into the slot of this process.
      blocked_seconds: how long the train loop waited in the call.
      sealed_seconds: from the call until this process sealed the step; None when it never did.
      outcome: what all processes agreed on.
      outcome_seconds: from the call until this process knew the outcome.
      reason: why the step was abandoned; empty for a complete one.
    """

    operation: ClassVar[str] = "save"
    step: int
    bytes: int
    blocked_seconds: float
    sealed_seconds: float | None
    outcome: Outcome
    outcome_seconds: float
    reason: str = ""

    @property
    def severity(self) -> Severity:
        return "info" if self.outcome == "complete" else "warning"

    def describe(self) -> str:
        parts = [f"blocked {format_seconds(self.blocked_seconds)}"]
        if self.sealed_seconds is None:
            parts = ["not sealed", *parts]
        else:
            parts = [
                f"sealed {format_bytes(self.bytes)}",
                *parts,
                f"sealed after {format_seconds(self.sealed_seconds)}",
            ]
        parts.append(f"{self.outcome} after {format_seconds(self.outcome_seconds)}")
        return ", ".join(parts) + (f": {self.reason}" if self.reason else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkippedSaveEvent(Event):
    """A save that was due was not made, so that training need not wait; its outcome is abandoned at once.

    Attributes:
      blocked_seconds: how long the train loop waited before it was given up.
      reason: what stood in the way.
    """

    operation: ClassVar[str] = "save"
    step: int
    blocked_seconds: float
    reason: str

    @property
    def severity(self) -> Severity:
        return "warning"

    def describe(self) -> str:
        return f"skipped after {format_seconds(self.blocked_seconds)}: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrainEvent(Event):
    """A drain of a sealed step into the persistent tier ended.

    Attributes:
      bytes: written to the persistent tier by this process.
      seconds: from the start of the drain until its result was known.
      result: committed; superseded (a newer step or generation made it pointless); failed.
      reason: why it did not commit; empty otherwise.
    """

    operation: ClassVar[str] = "drain"
    step: int
    bytes: int
    seconds: float
    result: DrainResult
    reason: str = ""

    @property
    def severity(self) -> Severity:
        return _DRAIN_SEVERITY[self.result]

    def describe(self) -> str:
        rate = f" ({format_bytes(round(self.bytes / self.seconds))}/s)" if self.seconds > 0 else ""
        said = f"{self.result} after {format_seconds(self.seconds)}, wrote {format_bytes(self.bytes)}{rate}"
        return said + (f": {self.reason}" if self.reason else "")


@dataclasses.dataclass(frozen=True)
class SourceBytes:
    """How much of a restore came from one source, such as 'own slot', 'slice 1' or 'persistent'."""

    source: str
    shards: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.shards} shards ({format_bytes(self.bytes)}) from {self.source}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreEvent(Event):
    """The state of a step is on the devices again.

    Attributes:
      saved_generation: the generation that saved the step (0: another program did).
      plan: what this process fetched from where, in words.
      reason: why this step and these sources.
      sources: shards and bytes per source, for this process.
      seconds: from the call until the arrays were ready.
    """

    operation: ClassVar[str] = "restore"
    step: int
    saved_generation: int
    plan: str
    reason: str
    sources: tuple[SourceBytes, ...]
    seconds: float

    @property
    def bytes(self) -> int:
        return sum(source.bytes for source in self.sources)

    def describe(self) -> str:
        sources = ", ".join(map(str, self.sources)) or "nothing to fetch"
        return (
            f"{format_bytes(self.bytes)} of generation {self.saved_generation} "
            f"in {format_seconds(self.seconds)}; {sources}; plan: {self.plan}; {self.reason}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectedStepEvent(Event):
    """A step could not be restored, and an older one is tried."""

    operation: ClassVar[str] = "restore"
    step: int
    saved_generation: int
    reason: str

    @property
    def severity(self) -> Severity:
        return "warning"

    def describe(self) -> str:
        return f"rejected the step of generation {self.saved_generation}, trying an older one: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaDivergenceEvent(Event):
    """Copies of a leaf that must be equal are not, as the checksums of a complete save tell.

    Attributes:
      leaf: its name. boxes: the parts of it that differ; empty where it is no array.
      deviating: the processes that have not what most have; empty where that cannot be told.
      versions: the processes that hold the same bytes, most of them first.
      slices: per entry of `versions`, their slices.
    """

    operation: ClassVar[str] = "replicas"
    step: int
    leaf: str
    boxes: tuple[str, ...]
    deviating: tuple[int, ...]
    versions: tuple[tuple[int, ...], ...]
    slices: tuple[tuple[int, ...], ...]

    @property
    def severity(self) -> Severity:
        return "error"

    def describe(self) -> str:
        more = f" and {len(self.boxes) - _NAMED_BOXES} more parts" if len(self.boxes) > _NAMED_BOXES else ""
        where = ", ".join(self.boxes[:_NAMED_BOXES]) + more
        copies = [
            f"{_counted('slice', slices)} ({_counted('process', processes)})"
            for slices, processes in zip(self.slices, self.versions, strict=True)
        ]
        if self.deviating:
            who = f"not what most have is in {', '.join(copies[1:])}; most: {copies[0]}"
        else:
            who = f"{' and '.join(copies)} differ, and nothing tells which of them is right"
        return (
            f"replicas of {self.leaf}{where} differ, so some device or memory there damages data silently: "
            f"{who}. Check these hosts and replace the bad one; a restore gives all the bytes of the majority, "
            "or else those of the lowest slice"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceDivergenceEvent(Event):
    """Devices of one process hold different copies of one shard of a saved step.

    Attributes:
      leaf: its name. box: the part of it.
      versions: ids of the devices that hold the same bytes, most of them first.
    """

    operation: ClassVar[str] = "replicas"
    step: int
    leaf: str
    box: str
    versions: tuple[tuple[int, ...], ...]

    @property
    def severity(self) -> Severity:
        return "error"

    def describe(self) -> str:
        copies = [_counted("device", devices) for devices in self.versions]
        if len(self.versions[0]) > len(self.versions[1]):
            who = f"not what most have is on {', '.join(copies[1:])}; most: {copies[0]}"
        else:
            who = f"{' and '.join(copies)} differ, and nothing tells which of them is right"
        return (
            f"copies of {self.leaf}{self.box} in this process differ, so some device damages data silently: "
            f"{who}. One of them was saved; a restore gives it to all. Check this host's devices"
        )


_NAMED_BOXES = 3


def _counted(noun: str, numbers: tuple[int, ...]) -> str:
    plural = noun if len(numbers) == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{plural} {', '.join(map(str, numbers))}"
