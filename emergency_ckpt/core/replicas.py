"""Which processes hold copies that must be equal, and what it means where they are not.

Copies are told apart by 64-bit fingerprints of their block checksums, so whatever bits an array has, those of
NaNs too, are compared as bytes. Nothing here asks anybody: who compares with whom follows from the layout.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.shards import Box
from emergency_ckpt.core.values import Value, values_to_json

Fingerprints = npt.NDArray[np.uint64]

MOST_PROCESSES = 16
"""How many compare with each other: where one has other bytes than the rest, each reads that of as many."""

MOST_COMPARISONS = 8
"""How many comparisons one process takes part in; those of the most bytes are made."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Processes that hold the same shards, and these shards.

    Attributes:
      processes: ascending, at least two.
      shards: ascending indices into the layout's shards.
      values: names of the leaves without arrays that are compared as well, sorted.
    """

    processes: tuple[int, ...]
    shards: tuple[int, ...]
    values: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Different for each comparison of a layout, and the same on all its processes."""
        return f"{self.processes[0]}-{self.shards[0] if self.shards else 'values'}"

    def fingerprints(self, checksums: Mapping[int, Sequence[int]], values: Mapping[str, Value]) -> Fingerprints:
        """One number per shard and per value, equal where the bytes are equal.

        Args:
          checksums: block checksums by shard. values: by leaf; more of both may be given.
        """
        shards = [_fingerprint(checksums[shard]) for shard in self.shards]
        texts = [json.dumps(values_to_json({n: values[n]} if n in values else {})) for n in self.values]
        return np.array([*shards, *(xxhash.xxh3_64_intdigest(text.encode()) for text in texts)], np.uint64)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A leaf whose copies differ.

    Attributes:
      boxes: those in which they do; empty for a leaf that is no array.
      versions: the processes that hold the same bytes, ascending; most processes first, then the lowest.
    """

    leaf: str
    boxes: tuple[Box, ...]
    versions: tuple[tuple[int, ...], ...]

    @property
    def deviating(self) -> tuple[int, ...]:
        """The processes that have not what most have; none where that cannot be told."""
        first, second = self.versions[:2]
        if len(first) == len(second):
            return ()
        return tuple(sorted(p for version in self.versions[1:] for p in version))


def comparisons_of(layout: Layout, process: int) -> tuple[Comparison, ...]:
    """What `process` compares, and with whom.

    All its shards with the processes that hold exactly the same ones. Where there is none, because slices are
    cut differently or there is only one, every shard that others of that sort hold as well.
    """
    kinds = layout.held.kinds
    alike = [p for p, kind in enumerate(kinds) if kind == kinds[process]]
    if len(alike) > 1:
        return (Comparison(_among(alike, process), layout.process_shards[process], layout.value_leaves),)
    counts = collections.Counter(kinds)
    lone = [p for p, kind in enumerate(kinds) if counts[kind] == 1]
    mine = layout.held.of_process(process)
    holders: dict[int, list[int]] = {shard: [] for shard in mine.tolist()}
    for p in lone:
        for shard in np.intersect1d(mine, layout.held.of_process(p), assume_unique=True).tolist():
            holders[shard].append(p)
    shared: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
    for shard, by in holders.items():
        if len(by) > 1:
            shared[_among(by, process)].append(shard)
    nbytes = layout.shard_nbytes
    found = [Comparison(processes, tuple(shards)) for processes, shards in shared.items()]
    found.sort(key=lambda each: (-sum(nbytes[shard] for shard in each.shards), each.processes))
    return tuple(found[:MOST_COMPARISONS])


def digest_of(fingerprints: Fingerprints) -> str:
    """One short text, equal for equal copies."""
    return xxhash.xxh3_128_hexdigest(fingerprints.tobytes())


def find_divergences(
    comparison: Comparison, layout: Layout, found: Mapping[int, Fingerprints]
) -> tuple[Divergence, ...]:
    """Every leaf that differs, by name. `found`: fingerprints by process, of at least two of them.

    Raises ValueError for fingerprints that are not of this comparison.
    """
    processes = sorted(found)
    wanted = len(comparison.shards) + len(comparison.values)
    odd = [p for p in processes if p not in comparison.processes or found[p].shape != (wanted,)]
    if odd:
        raise ValueError(f"fingerprints of processes {odd} are not of comparison {comparison.name}")
    table = np.stack([found[p] for p in processes])
    places: dict[str, list[int]] = collections.defaultdict(list)
    for place in np.flatnonzero((table != table[0]).any(axis=0)).tolist():
        is_shard = place < len(comparison.shards)
        leaf = layout.shards[comparison.shards[place]].leaf if is_shard else ""
        places[leaf or comparison.values[place - len(comparison.shards)]].append(place)
    divergences: list[Divergence] = []
    for leaf, at in sorted(places.items()):
        versions: dict[bytes, list[int]] = collections.defaultdict(list)
        for process, row in zip(processes, table, strict=True):
            versions[row[at].tobytes()].append(process)
        ordered = sorted((tuple(each) for each in versions.values()), key=lambda each: (-len(each), each))
        boxes = tuple(layout.shards[comparison.shards[p]].box for p in at if p < len(comparison.shards))
        divergences.append(Divergence(leaf, boxes, tuple(ordered)))
    return tuple(divergences)


def _among(processes: Sequence[int], process: int) -> tuple[int, ...]:
    """Those of `processes` that compare with `process`: a part of a bounded size, never a single one."""
    parts = -(-len(processes) // MOST_PROCESSES)
    at = processes.index(process) * parts // len(processes)
    return tuple(p for i, p in enumerate(processes) if i * parts // len(processes) == at)


def _fingerprint(checksums: Sequence[int]) -> int:
    if len(checksums) == 1:
        return checksums[0]
    return xxhash.xxh3_64_intdigest(np.array(checksums, np.uint64).tobytes())
