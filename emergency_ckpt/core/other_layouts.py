"""Layouts other than the job's own under which ramdisks hold steps: how they differ, and what still fits.

A slot fits whoever needs exactly the shards that it holds, whichever process of whichever job shape sealed it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId

_LEAVES_IN_A_REASON = 8


@dataclasses.dataclass(frozen=True)
class OtherLayout:
    """A layout that some process found on its ramdisk and that is not the job's.

    Attributes:
      layout: the layout of the job that saved.
      differences: one line per leaf that is another one now; none where the state is the same and only the
        processes, the slices or the shardings are others.
    """

    layout: Layout
    differences: tuple[str, ...] = ()

    @property
    def shape(self) -> str:
        """The job that saved, in words."""
        return _shape(self.layout)


@dataclasses.dataclass(frozen=True)
class Unusable:
    """A step that is whole on the ramdisks and that this job cannot use.

    Attributes:
      step: which step. shape: the job that saved it, in words.
      differences: one line per leaf that is another one now.
    """

    step: StepId
    shape: str
    differences: tuple[str, ...] = ()

    def describe(self) -> str:
        """Why it cannot be used, with every leaf that differs."""
        if self.differences:
            return f"it is of another state; {differing(self.differences)}"
        return f"{self.shape} saved it, and the hosts that hold its shards now need others"


def shards_as_in(saved: Layout, wanted: Layout) -> tuple[tuple[int, ...] | None, ...]:
    """Per process of `saved` its shards as indices into those of `wanted`; None where one is no shard there.

    The leaves of both must be the same.
    """
    if saved.hash == wanted.hash:
        return saved.process_shards
    index = [wanted.shard_index.get(shard) for shard in saved.shards]
    found: list[tuple[int, ...] | None] = []
    for held in saved.process_shards:
        known = [index[shard] for shard in held]
        found.append(None if None in known else tuple(i for i in known if i is not None))
    return tuple(found)


def covers_all(layout: Layout, positions: Iterable[int]) -> bool:
    """Whether these processes of a layout hold every shard together."""
    held = {s for p in positions if 0 <= p < layout.process_count for s in layout.process_shards[p]}
    return len(held) == len(layout.shards)


def differing(differences: tuple[str, ...]) -> str:
    """All differences in words."""
    count = f"{len(differences)} leaves differ" if len(differences) > 1 else "1 leaf differs"
    return f"{count}: " + "; ".join(differences)


def differing_briefly(differences: tuple[str, ...]) -> str:
    """The differences in words, for a log line: of a model with thousands of leaves only the first."""
    more = len(differences) - _LEAVES_IN_A_REASON
    if more <= 0:
        return differing(differences)
    return f"{len(differences)} leaves differ: {'; '.join(differences[:_LEAVES_IN_A_REASON])}; and {more} more"


def _shape(layout: Layout) -> str:
    processes = f"{layout.process_count} processes" if layout.process_count > 1 else "1 process"
    slices = f"{layout.slice_count} slices" if layout.slice_count > 1 else "1 slice"
    return f"a job of {processes} in {slices}"
