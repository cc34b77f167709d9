"""Copies of shards: which processes keep what beside their own, so that no failure takes the only copy.

The result is a layout again, the *storage layout*: what each process's slot holds. Everything that saves,
serves, plans or drains works from it, and knows nothing of copies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.placement import failure_domains
from emergency_ckpt.core.shard_table import HeldShards
from emergency_ckpt.core.universe import distinct, joined
from emergency_ckpt.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Survivable:
    """How many failures a step survives on the ramdisks alone, whichever processes they hit.

    Attributes:
      hosts: any so many processes may be lost. slices: any so many slices may be lost.
      weakest: a shard that one more failure could take, in words.
    """

    hosts: int
    slices: int
    weakest: str

    def describe(self) -> str:
        """For a log line."""
        if not self.hosts:
            return f"does not survive the loss of a host: {self.weakest} has one copy"
        or_slices = f" or any {_count(self.slices, 'slice')}" if self.slices else ""
        return f"survives the loss of any {_count(self.hosts, 'host')}{or_slices}"


def survivable(storage: Layout) -> Survivable:
    """What a step survives that lies on the ramdisks as `storage` says."""
    if not storage.shards:
        return Survivable(storage.process_count - 1, storage.slice_count - 1, "nothing")
    hosts = _times_held(storage, range(storage.process_count))
    slices = _times_held(storage, storage.process_slice)
    weakest = int(hosts.argmin())
    return Survivable(int(hosts[weakest]) - 1, int(slices.min()) - 1, str(storage.shards[weakest]))


def covers(storage: Layout, lost: Collection[int]) -> bool:
    """Whether a step that lies on the ramdisks as `storage` says is whole without those of the `lost`."""
    gone = frozenset(lost)
    if not storage.shards:
        return len(gone) < storage.process_count
    return all(not gone.issuperset(held_by) for held_by in storage.shard_holders.processes)


def _times_held(layout: Layout, domains: Sequence[int]) -> np.ndarray:
    """Per shard, in how many domains it lies; `domains`: per process, its own."""
    holders = layout.shard_holders
    times = np.array([len({domains[p] for p in held_by}) for held_by in holders.processes], np.int64)
    return times[holders.blocks]


def with_copies(layout: Layout, copies: int) -> Layout:
    """The storage layout in which each shard lies in at least `copies` failure domains.

    A failure domain is a slice; in a job of one slice it is a process. Shards that lie in so many by nature, as
    those of a state that is replicated over the slices do, are left alone; where all do, the layout is returned
    as it is.

    Partners stand in fixed groups of `copies` domains, each of which keeps the shards of the others of its
    group. With two copies on n hosts and two failures at once, one case of n - 1 loses a shard; in a ring,
    where each host has a partner on either side, it is two (Cidon et al., "Copysets", USENIX ATC 2013).

    Raises ConfigError where there are fewer domains than copies.
    """
    if copies <= 1:
        return layout
    domains = failure_domains(layout.process_slice)
    if layout.shards and _times_held(layout, domains).min() >= copies:
        return layout
    count = max(domains) + 1
    if copies > count:
        what = "slices" if layout.slice_count > 1 else "processes"
        raise ConfigError(
            f"local_checkpoint_copies={copies} needs {copies} failure domains and this job has {count} {what}; "
            f"set it to {count} at most"
        )
    members = [[p for p, domain in enumerate(domains) if domain == d] for d in range(count)]
    rank = {p: at for among in members for at, p in enumerate(among)}
    groups = _groups(count, copies)
    # What the same processes hold goes the same way.
    held = [[shards] for shards in map(layout.held.of_process, range(layout.process_count))]
    for holders, shards in layout.shard_holders.of_blocks():
        there = {domains[p] for p in holders}
        if len(there) >= copies or not holders:
            continue
        source = holders[0]
        for domain in _partners(domains[source], groups[domains[source]], count):
            if len(there) == copies:
                break
            if domain not in there:
                held[members[domain][rank[source] % len(members[domain])]].append(shards)
                there.add(domain)
    stored = HeldShards(range(len(held)), [distinct(joined(lists)) for lists in held])
    return layout if stored == layout.held else dataclasses.replace(layout, process_shards=stored)


def copies_from(layout: Layout, storage: Layout, process: int) -> Mapping[int, tuple[int, ...]]:
    """The shards that `process` stores for others, by the process it gets them from: one that needs them."""
    own = set(layout.process_shards[process])
    found: dict[int, list[int]] = {}
    for shard in storage.process_shards[process]:
        if shard not in own:
            found.setdefault(layout.shard_holders[shard][0], []).append(shard)
    return {source: tuple(shards) for source, shards in found.items()}


def gives_copies(layout: Layout, storage: Layout, process: int) -> bool:
    """Whether others get copies from this process."""
    return any(
        layout.shard_holders[shard][0] == process
        and len(storage.shard_holders[shard]) > len(layout.shard_holders[shard])
        for shard in layout.process_shards[process]
    )


def _groups(count: int, size: int) -> list[range]:
    """Per domain its group: of `size` members, the last one with those that do not make up one of their own."""
    last = max(count // size - 1, 0) * size
    return [range(last, count) if d >= last else range(d - d % size, d - d % size + size) for d in range(count)]


def _partners(domain: int, group: range, count: int) -> Iterator[int]:
    """All other domains: those of its group in a circle first, then the rest, for shards that need them."""
    yield from range(domain + 1, group.stop)
    yield from range(group.start, domain)
    yield from (d for d in range(count) if d not in group)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
