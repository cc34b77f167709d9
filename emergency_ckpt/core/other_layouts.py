"""Layouts other than the job's own under which ramdisks hold steps: how they differ, and what they cover.

Where the leaves are the same, the shards of any job shape are sources; where they are not, none is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

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
        return (
            f"{self.shape} saved it, and the processes that need its shards cannot fetch them from the others"
        )


def covers_all(layout: Layout, found: Iterable[tuple[int, Sequence[int]]]) -> bool:
    """Whether these slots hold every shard of a layout together: (position in it, shards not good there)."""
    good = np.zeros(len(layout.shards), np.bool_)
    for position, missing in found:
        if 0 <= position < layout.process_count:
            held = layout.held.of_process(position)
            good[held if not missing else np.setdiff1d(held, np.array(missing, np.int64))] = True
    return bool(good.all())


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
