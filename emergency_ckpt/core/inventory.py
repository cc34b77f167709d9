"""What one process found whole and verified, in the small form in which it is told to the others.

No shard lists travel: a process names the layout and its position in it, and by that says which shards it has.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.errors import CorruptDataError


@dataclasses.dataclass(frozen=True, slots=True)
class Holding:
    """One sealed step on one process's ramdisk, every block of it verified but for those of missing shards.

    Attributes:
      step: which step.
      layout: hash of the layout under which it was sealed.
      position: the process index in that layout whose shards these are.
      digest: one checksum over all block checksums as saved; equal for bit-identical replicas.
      extras_of: the process indices whose extras are kept with it.
      missing: ascending indices into the layout's shards, of those that are not good in this slot.
      parts: one digest of each of its parts and one of its values (see `core.parts`); none where it has many.
    """

    step: StepId
    layout: str
    position: int
    digest: str
    extras_of: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Inventory:
    """All that one process brings to the planning of a restore.

    `promised` is the newest step that was complete as far as this ramdisk tells, be it still whole or not.
    """

    process: int
    holdings: tuple[Holding, ...] = ()
    highest_generation: int = 0
    activations: tuple[Activation, ...] = ()
    process_count: int = 1
    promised: StepId | None = None

    def to_bytes(self) -> bytes:
        return json.dumps(
            {
                "process": self.process,
                "process_count": self.process_count,
                "holdings": [
                    [
                        h.step.generation,
                        h.step.step,
                        h.layout,
                        h.position,
                        h.digest,
                        list(h.extras_of),
                        list(h.missing),
                        list(h.parts),
                    ]
                    for h in self.holdings
                ],
                "highest_generation": self.highest_generation,
                "activations": [[a.generation, a.step] for a in self.activations],
                "promised": [self.promised.generation, self.promised.step] if self.promised else None,
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Inventory:
        try:
            return cls._parse(json.loads(data))
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptDataError(f"an inventory cannot be read: {error}") from error

    @classmethod
    def _parse(cls, raw: Any) -> Inventory:
        return cls(
            process=int(raw["process"]),
            process_count=int(raw["process_count"]),
            holdings=tuple(_holding(*holding) for holding in raw["holdings"]),
            highest_generation=int(raw["highest_generation"]),
            activations=tuple(Activation(int(g), None if s is None else int(s)) for g, s in raw["activations"]),
            promised=StepId(int(raw["promised"][0]), int(raw["promised"][1])) if raw["promised"] else None,
        )


def _holding(
    generation: Any,
    step: Any,
    layout: Any,
    position: Any,
    digest: Any,
    extras_of: Any,
    missing: Any = (),
    parts: Any = (),
) -> Holding:
    return Holding(
        StepId(int(generation), int(step)),
        str(layout),
        int(position),
        str(digest),
        tuple(int(process) for process in extras_of),
        tuple(int(shard) for shard in missing),
        tuple(str(part) for part in parts),
    )
