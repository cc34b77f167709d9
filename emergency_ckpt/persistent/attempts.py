"""Names in the persistent root: steps, attempts at writing one, and the stores of an attempt's writers.

Whatever an attempt writes under a name of its own carries generation, nonce and ordinal, so that what an old
attempt left never mixes in, and whose it is can be told from the name alone.
"""

from __future__ import annotations

import dataclasses
import re

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.persistent.records import Generation

TEMPORARY = ".orbax-checkpoint-tmp"
_STORE = re.compile(r"ocdbt\.process_([0-9a-f]+)g(\d+)o(\d+)p[0-9a-z]+")


@dataclasses.dataclass(frozen=True, slots=True)
class StepNames:
    """How step directories are called: as Orbax's standard name format with the same prefix and length."""

    prefix: str | None = None
    digits: int | None = None

    def name(self, step: int) -> str:
        return f"{self.prefix}_" * (self.prefix is not None) + f"{step:0{self.digits or 0}d}"

    def step(self, name: str) -> int | None:
        """The step that a directory of this name holds, None if it holds none."""
        number = name[len(self.prefix) + 1 :] if self.prefix is not None else name
        if not (number.isascii() and number.isdigit()):
            return None
        return int(number) if self.name(int(number)) == name else None


@dataclasses.dataclass(frozen=True, slots=True)
class PersistentStep:
    """A committed step.

    Attributes:
      name: of its directory in the root.
      location: the full path or URL of that directory.
      item: the directory of the state in it, "" where the step is the state.
      nonce: that of the generation that wrote it, None if another program or run did.
    """

    step_id: StepId
    name: str
    location: str
    item: str
    nonce: str | None

    @property
    def written_by_us(self) -> bool:
        return self.nonce is not None


@dataclasses.dataclass(frozen=True, slots=True)
class HiddenStep:
    """A deleted step whose bytes are still in this directory. What is of generations after this one stays."""

    directory: str
    generation: int


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One try at writing one step; a further try of the same generation takes another `ordinal`.

    `by` is the later generation that writes the step, where that is not the one that saved it: a life that
    ended before it had saved anything leaves the step that it was to go on from.
    """

    generation: Generation
    step: int
    item: str
    ordinal: int = 0
    by: Generation | None = None

    @property
    def step_id(self) -> StepId:
        return StepId(self.generation.number, self.step)

    @property
    def tag(self) -> str:
        """What tells this attempt at its step from any other."""
        return f"g{self.generation.number}-{self.generation.nonce}-{self.ordinal}"

    def __str__(self) -> str:
        return f"attempt {self.ordinal} at {self.step_id}"


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class StoreOwner:
    """Whose a writer's store is."""

    generation: int
    nonce: str
    ordinal: int


def part_store_name(attempt: Attempt, part: int | str) -> str:
    """Directory of a part's own OCDBT store within the item: Orbax's name for such stores, with ours in it.

    The nonce comes first: object stores spread their load by the beginnings of keys.
    """
    generation = attempt.generation
    return f"ocdbt.process_{generation.nonce}g{generation.number}o{attempt.ordinal}p{part}"


def owner_of(attempt: Attempt) -> StoreOwner:
    return StoreOwner(attempt.generation.number, attempt.generation.nonce, attempt.ordinal)


def parse_store_name(name: str) -> StoreOwner | None:
    """Whose store has this name; None for a name that `part_store_name` does not give."""
    match = _STORE.fullmatch(name)
    return StoreOwner(int(match[2]), match[1], int(match[3])) if match else None
