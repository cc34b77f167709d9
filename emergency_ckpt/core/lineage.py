"""Identity of saved steps: (run, generation, step), and which of them a later restore made void.

Invariant 1: shards of different generations never meet, and the newest step is the highest (generation, step).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class StepId:
    """A saved step within a run. Orders by age: a later generation is newer than any earlier one.

    `generation` is 0 for checkpoints that another program wrote into the persistent tier.
    """

    generation: int
    step: int

    def __str__(self) -> str:
        return f"step {self.step} (generation {self.generation})"


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Activation:
    """Generation `generation` began from step `step` (None: from scratch): all processes hold its state.

    From then on every later step of every earlier generation of this run is void. Checkpoints of other programs
    (generation 0) never are: one may have been written after the activation, and is not ours to give up.
    """

    generation: int
    step: int | None

    def voids(self, saved: StepId) -> bool:
        return 0 < saved.generation < self.generation and (self.step is None or saved.step > self.step)


@dataclasses.dataclass(frozen=True, slots=True)
class Deletion:
    """Steps were deleted on purpose: of all up to `upto`, `newest` was the newest restorable one afterwards.

    What older manifests promise up to there is settled by it: whether those steps were deleted, superseded or
    lost before, nothing but `newest` was there to be lost after it.
    """

    upto: StepId
    newest: StepId | None

    def after(self, earlier: Deletion | None) -> Deletion:
        """The record of both, this one being the later."""
        return self if earlier is None else Deletion(max(self.upto, earlier.upto), self.newest)


def newest_promised(
    promises: Iterable[StepId], activations: Iterable[Activation], deletion: Deletion | None
) -> StepId | None:
    """The newest step that was complete once, and that nobody gave up on purpose since."""
    left: list[StepId] = list(promises)
    if deletion is not None:
        left = [step for step in left if step > deletion.upto]
        left += [deletion.newest] if deletion.newest else []
    known = tuple(activations)
    return max((step for step in left if not is_void(step, known)), default=None)


def begun_from(parents: Mapping[int, StepId], activations: Iterable[Activation]) -> list[StepId]:
    """The steps that the newest life of the run began from, and that lives after it were to begin from.

    `parents` has, by generation, the step that was restorable when that generation began. Of a step that was
    restored instead of it only the number is known; it counts as the oldest of that number (generation 0).
    """
    newest = max(activations, key=lambda activation: activation.generation, default=None)
    if newest is None:
        return list(parents.values())
    later = [parent for generation, parent in parents.items() if generation > newest.generation]
    if newest.step is None:
        return later
    parent = parents.get(newest.generation)
    known = parent if parent is not None and parent.step == newest.step else StepId(0, newest.step)
    return [known, *later]


def is_void(saved: StepId, activations: Iterable[Activation]) -> bool:
    """Whether a restore that came after `saved` left it behind."""
    return any(activation.voids(saved) for activation in activations)
