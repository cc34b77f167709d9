"""Which step agents drain without their trainers: the newest of which every shard is in some whole slot.

Like a restore it goes by what is held, not by marks; a step whose extras are not all there is no whole step.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import Activation, StepId, is_void
from emergency_ckpt.core.upload_assignment import assign_uploads


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """A sealed slot, as the agent of `process` tells of it; `whole`: no shard of it is missing."""

    process: int
    step: StepId
    layout: str
    position: int
    digest: str
    whole: bool
    extras_of: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Flush:
    """A step to drain: `copies`, one for each position that writes a part, ascending by position.

    `leaving`: those of the positions whose hosts go away; they write what no other copy has.
    """

    step: StepId
    layout: str
    copies: tuple[Copy, ...]
    leaving: tuple[int, ...] = ()

    @property
    def holders(self) -> tuple[int, ...]:
        return tuple(copy.position for copy in self.copies)

    @property
    def committer(self) -> Copy:
        """The copy of the lowest process, of one that stays where there is one."""
        return min(self.copies, key=lambda copy: (copy.position in self.leaving, copy.process, copy.position))


def choose_flush(
    copies: Iterable[Copy],
    layouts: Mapping[str, Layout],
    committed: StepId | None,
    activations: Collection[Activation] = (),
    leaving: Collection[int] = (),
) -> tuple[Flush | None, str]:
    """The newest step after `committed` that these copies cover, and a reason, or why there is none.

    Steps of several generations may be among them; those that one of the `activations` left behind do not
    count. Of the processes that are `leaving` only copies take part that are needed.
    """
    by_step: dict[tuple[StepId, str], list[Copy]] = collections.defaultdict(list)
    for copy in copies:
        if not is_void(copy.step, activations):
            by_step[copy.step, copy.layout].append(copy)
    notes: list[str] = []
    for (step, layout_hash), held in sorted(by_step.items(), reverse=True, key=lambda item: item[0]):
        if committed is not None and step <= committed:
            notes.append(f"{committed} is in the persistent tier")
            break
        layout = layouts.get(layout_hash)
        if layout is None:
            notes.append(f"{step}: its layout cannot be read")
            continue
        chosen = _agreeing(layout, held, leaving)
        plan = assign_uploads(layout, [copy.position for copy in chosen])
        if plan.shards is None:
            notes.append(f"{step}: {plan.reason}")
            continue
        kept = {owner for copy in chosen for owner in copy.extras_of}
        if kept and (lost := set(range(layout.process_count)) - kept):
            notes.append(f"{step}: the extras of processes {sorted(lost)[:8]} are lost")
            continue
        flush = _with_few_leaving(step, layout, chosen, leaving)
        if flush.leaving or len(flush.copies) < len(chosen):
            plan = assign_uploads(layout, flush.holders, flush.leaving)
        return flush, "; ".join([f"{step} from {plan.reason}", *notes])
    return None, "; ".join(notes) or "nothing is sealed"


def _with_few_leaving(step: StepId, layout: Layout, chosen: Sequence[Copy], leaving: Collection[int]) -> Flush:
    """A flush from these copies, which cover the step, without those of leaving processes that add nothing."""
    going = [copy.position for copy in chosen if copy.process in leaving]
    plan = assign_uploads(layout, [copy.position for copy in chosen], going)
    assert plan.shards is not None
    kept = {owner for copy in chosen if copy.position not in going for owner in copy.extras_of}
    taken: list[Copy] = []
    for copy in chosen:
        if copy.position not in going or plan.shards[copy.position] or not kept.issuperset(copy.extras_of):
            taken.append(copy)
            kept.update(copy.extras_of)
    needed = tuple(copy.position for copy in taken if copy.position in going)
    return Flush(step, layout.hash, tuple(taken), needed)


def _agreeing(layout: Layout, held: Sequence[Copy], leaving: Collection[int]) -> list[Copy]:
    """One whole copy per position, ascending; of replicas that differ those that most agree with."""
    usable = [copy for copy in held if copy.whole and copy.position < layout.process_count]
    groups: dict[tuple[int, ...], list[Copy]] = collections.defaultdict(list)
    for copy in usable:
        groups[tuple(layout.process_shards[copy.position])].append(copy)
    chosen: dict[int, Copy] = {}
    for alike in groups.values():
        digests = collections.Counter(copy.digest for copy in alike)
        best = max(digests.values())
        leading = [copy for copy in alike if digests[copy.digest] == best]
        digest = min(leading, key=lambda copy: (copy.position, copy.process)).digest
        for copy in sorted(alike, key=lambda copy: (copy.process in leaving, copy.process)):
            if copy.digest == digest:
                chosen.setdefault(copy.position, copy)
    return [chosen[position] for position in sorted(chosen)]
