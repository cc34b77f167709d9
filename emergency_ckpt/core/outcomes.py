"""How one process takes part in agreeing on the outcome of each save; the messages themselves travel elsewhere.

Invariant 2: an outcome is written once, and `complete` means that every process sealed. A process reports on a
save only when it knows the outcomes of all earlier ones, so a report also proves what its sender has read: that
is what lets old messages be removed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import CorruptDataError


@dataclasses.dataclass(frozen=True, slots=True)
class OutcomeRecord:
    """What stands about one save: the outcome, the process whose word it was, and why."""

    outcome: Outcome
    process: int
    reason: str

    def to_bytes(self) -> bytes:
        return json.dumps([self.outcome.value, self.process, self.reason]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> OutcomeRecord:
        """Parses what `to_bytes` wrote; raises CorruptDataError for anything else."""
        try:
            outcome, process, reason = json.loads(data)
            return cls(Outcome(outcome), int(process), str(reason))
        except (ValueError, TypeError) as error:
            raise CorruptDataError(
                f"the outcome of a save reads {data[:100]!r}, which no process of this version wrote; "
                "are all processes running the same version of this package?"
            ) from error


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """What one process has said and learned about the saves of a generation, numbered from 0.

    A value: each step returns the next one. The steps keep these rules:
    a process reports at most once on a save; it reports on save k only when it knows the outcomes of all saves
    before k; it learns outcomes in order.

    Attributes:
      reported: the newest save that this process reported on, sealed or not; -1 before the first.
      known: the newest save whose outcome this process knows (it knows all before it too).
      removed: messages about saves below this one are gone.
    """

    reported: int = -1
    known: int = -1
    removed: int = 0

    def may_report(self, save: int) -> bool:
        """Whether a report on `save` still counts: False once its outcome is known (a late seal).

        Raises ValueError for a second report, or one that comes before the outcome of an earlier save is known.
        """
        if save <= self.known:
            return False
        if save <= self.reported:
            raise ValueError(f"save {save} was already reported on; a process reports once on each save")
        if save != self.known + 1:
            raise ValueError(
                f"a report on save {save} came before the outcome of save {self.known + 1} was known here; "
                "await the outcomes of the saves in their order"
            )
        return True

    def report(self, save: int) -> Progress:
        """This process reports on `save`; `may_report` must hold."""
        if not self.may_report(save):
            raise ValueError(f"the outcome of save {save} is known, no report on it counts")
        return dataclasses.replace(self, reported=save)

    def learn(self, save: int) -> Progress:
        """This process has read the outcome of `save`, the one after those it knows."""
        self.check_next(save)
        return dataclasses.replace(self, known=save)

    def check_next(self, save: int) -> None:
        """Raises ValueError unless `save` is the one whose outcome this process learns next."""
        if save != self.known + 1:
            raise ValueError(
                f"the outcome of save {save} was asked for, but the next one to learn here is that of save "
                f"{self.known + 1}; await each outcome once, in the order of the saves"
            )

    def removable(self, newest_reports: Iterable[int]) -> range:
        """The saves about which no process will read again, given the newest report of *every* process.

        A report on k proves that its sender knows the outcomes of all saves before k, and neither reads nor
        writes about them again.
        """
        return range(self.removed, max(self.removed, min(newest_reports, default=0)))

    def remove(self, saves: range) -> Progress:
        """Messages about `saves` are gone."""
        return dataclasses.replace(self, removed=max(self.removed, saves.stop))
