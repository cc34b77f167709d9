"""Comparing replicas: processes that save the same shards tell each other a digest of their checksums.

One small key before the seal is reported, one read after the outcome is known, both in the writer thread: no
train step waits, no device takes part, and nobody waits for anybody as long as the copies are equal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import numpy as np

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.replicas import (
    Comparison,
    Divergence,
    Fingerprints,
    comparisons_of,
    digest_of,
    find_divergences,
)
from emergency_ckpt.errors import CoordinationTimeoutError, ReplicaDivergenceError
from emergency_ckpt.jaxio.coordination import Coordinator
from emergency_ckpt.jaxio.topology import Topology
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.telemetry.events import ReplicaDivergenceEvent
from emergency_ckpt.telemetry.log import CheckpointLogger

_MOST_LINES = 20
_NAMED_LEAVES = 5
_LIMIT = timedelta(seconds=10)


@dataclasses.dataclass(frozen=True)
class _Said:
    """What this process said of one comparison: its fingerprints, and with whose they were compared."""

    comparison: Comparison
    fingerprints: Fingerprints
    first: int
    is_equal: bool


@dataclasses.dataclass(frozen=True)
class Published:
    """What this process said of one save."""

    keys: str
    said: tuple[_Said, ...]


class ReplicaComparison:
    """The part of one process in comparing the saves of one generation.

    Of each comparison the first process to say its digest sets it; who has another one says its fingerprints.
    All that is said before the save's seals are counted, so that everybody who knows the outcome can read it.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        layout: Layout,
        topology: Topology,
        log: CheckpointLogger,
        timeout: timedelta,
        on_divergence: Literal["warn", "raise"],
    ) -> None:
        self._coordinator = coordinator
        self._layout = layout
        self._topology = topology
        self._log = log
        self._limit = min(_LIMIT, timeout)
        self._on_divergence = on_divergence

    def fingerprints(self, manifest: Manifest, slots: Layout) -> tuple[Fingerprints, ...]:
        """Of a slot that this process has just sealed, as `slots` lays it out; one array per comparison."""
        if not self._comparisons:
            return ()
        entries = slots.slot_entries(manifest.position)
        checksums = {entry.shard: blocks for entry, blocks in zip(entries, manifest.checksums, strict=True)}
        return tuple(each.fingerprints(checksums, manifest.values) for each in self._comparisons)

    def publish(self, keys: str, fingerprints: Sequence[Fingerprints]) -> Published:
        """Says what this process saved, beneath `keys`. Call before its seal is reported."""
        coordinator, said = self._coordinator, list[_Said]()
        for comparison, mine in zip(self._comparisons, fingerprints, strict=False):
            own = f"{self._topology.process_index} {digest_of(mine)}"
            stands = coordinator.put_once(f"{keys}/replicas/first/{comparison.name}", own.encode()).decode()
            first, _, digest = stands.partition(" ")
            is_equal = digest == digest_of(mine)
            if not is_equal:
                coordinator.put(self._odd_key(keys, comparison, self._topology.process_index), mine.tobytes())
            said.append(_Said(comparison, mine, int(first), is_equal))
        return Published(keys, tuple(said))

    def compare(self, step: StepId, published: Published) -> ReplicaDivergenceError | None:
        """Says what differs in a complete save; the error where it is to be one.

        Call before this process reports on another save: the keys go then.
        """
        found: list[str] = []
        for said in published.said:
            odd = self._odd(published.keys, said)
            if odd is None:
                self._log.warning("replicas", step.step, "copies differ, and it could not be found out where")
                found.append("leaves that could not be found out")
            elif odd:
                divergences = find_divergences(said.comparison, self._layout, odd)
                self._tell(step, divergences, said.first == self._topology.process_index)
                found += [each.leaf for each in divergences]
        if not found or self._on_divergence != "raise":
            return None
        more = f" and {len(found) - _NAMED_LEAVES} more" if len(found) > _NAMED_LEAVES else ""
        compared = sorted({p for said in published.said for p in said.comparison.processes})
        return ReplicaDivergenceError(
            f"{step} was saved with copies that differ in {', '.join(found[:_NAMED_LEAVES])}{more}: some "
            "device or memory damages data silently. Lines of operation 'replicas' in the logs of processes "
            f"{compared} name the slices. Replace the bad host and restart: the restore gives all copies the "
            "bytes of the majority, or else those of the lowest slice.",
            step.step,
            tuple(found),
        )

    def _odd(self, keys: str, said: _Said) -> dict[int, Fingerprints] | None:
        """Fingerprints by process; none where all are equal, None where somebody did not give them."""
        coordinator, comparison = self._coordinator, said.comparison
        prefix = self._odd_key(keys, comparison)
        entries = coordinator.entries(prefix)
        if not entries:
            return {}
        if said.first == self._topology.process_index:
            coordinator.put(f"{prefix}/{said.first}", said.fingerprints.tobytes())
        if said.is_equal:
            first = said.fingerprints
        else:
            # Whoever was first learns the outcome, and with it that we differ, about now.
            try:
                first = np.frombuffer(coordinator.get(f"{prefix}/{said.first}", self._limit), np.uint64)
            except CoordinationTimeoutError:
                return None
        others = {int(p): np.frombuffer(data, np.uint64) for p, data in entries.items()}
        return {**dict.fromkeys(comparison.processes, first), **others}

    def _tell(self, step: StepId, divergences: Sequence[Divergence], logs: bool) -> None:
        """All count; one of the processes that compared writes the lines."""
        tell_divergences(self._log, divergence_events(step.step, divergences, self._layout.process_slice), logs)

    @functools.cached_property
    def _comparisons(self) -> tuple[Comparison, ...]:
        topology = self._topology
        found = comparisons_of(self._layout, topology.process_index)
        if topology.process_index == 0 and topology.slice_count > 1 and topology.groups is None:
            self._log.info(
                "replicas",
                None,
                f"{topology.misalignment}: of slices that are cut differently only those shards are compared "
                "that several processes hold as they are",
            )
        return found

    @staticmethod
    def _odd_key(keys: str, comparison: Comparison, process: int | None = None) -> str:
        prefix = f"{keys}/replicas/odd/{comparison.name}"
        return prefix if process is None else f"{prefix}/{process}"


def divergence_events(
    step: int, divergences: Sequence[Divergence], process_slice: Sequence[int]
) -> list[ReplicaDivergenceEvent]:
    """What is told of each leaf of a step that differs."""
    return [
        ReplicaDivergenceEvent(
            step=step,
            leaf=each.leaf,
            boxes=tuple(map(str, each.boxes)),
            deviating=each.deviating,
            versions=each.versions,
            slices=tuple(tuple(sorted({process_slice[p] for p in version})) for version in each.versions),
        )
        for each in divergences
    ]


def tell_divergences(log: CheckpointLogger, events: Sequence[ReplicaDivergenceEvent], logs: bool) -> None:
    """Counts all, and writes a line for each of the first of them where `logs`."""
    for number, event in enumerate(events):
        if logs and number < _MOST_LINES:
            log.emit(event)
        else:
            log.metrics.observe(event)
    if logs and len(events) > _MOST_LINES:
        more = len(events) - _MOST_LINES
        log.error("replicas", events[0].step, f"replicas of {more} more leaves differ")
