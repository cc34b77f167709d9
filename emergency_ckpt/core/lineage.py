"""Identity of saved steps: (run, generation, step), and which of them a later restore made void.

Invariant 1: shards of different generations never meet, and the newest step is the highest (generation, step).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


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


def is_void(saved: StepId, activations: Iterable[Activation]) -> bool:
    """Whether a restore that came after `saved` left it behind."""
    return any(activation.voids(saved) for activation in activations)
