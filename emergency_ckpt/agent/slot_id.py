"""The name of a slot holding, as agents and their clients say it to each other.

Ids only, never paths: every part is checked against a strict pattern before it is used, and none of them is
ever joined to a path.
"""

from __future__ import annotations

import dataclasses
import re
import urllib.parse
from collections.abc import Mapping

from emergency_ckpt.core.lineage import StepId

_RUN = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}")
_LAYOUT = re.compile(r"[0-9a-f]{32}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")


def is_layout_hash(text: str) -> bool:
    """Whether this can be the hash of a layout."""
    return _LAYOUT.fullmatch(text) is not None


@dataclasses.dataclass(frozen=True, slots=True)
class SlotId:
    """One saved step of one process: the shards `layout.process_shards[position]` of `step` of `run`.

    `layout` is the hash of the layout. Raises ValueError for an id that no slot can have.
    """

    run: str
    step: StepId
    layout: str
    position: int

    def __post_init__(self) -> None:
        if not _RUN.fullmatch(self.run):
            raise ValueError(f"not a run id: {self.run!r:.80}")
        if not is_layout_hash(self.layout):
            raise ValueError(f"not the hash of a layout: {self.layout!r:.80}")
        if min(self.step.generation, self.step.step, self.position) < 0:
            raise ValueError(f"negative numbers name no slot: {self.step}, position {self.position}")

    @classmethod
    def parse(cls, parts: Mapping[str, str]) -> SlotId:
        """From the parts of an address; raises ValueError for anything that is not strictly an id."""
        numbers: dict[str, int] = {}
        for name in ("generation", "step", "position"):
            if not _NUMBER.fullmatch(parts[name]):
                raise ValueError(f"not a {name}: {parts[name]!r:.80}")
            numbers[name] = int(parts[name])
        step = StepId(numbers["generation"], numbers["step"])
        return cls(parts["run"], step, parts["layout"], numbers["position"])

    @property
    def address(self) -> str:
        """Where an agent serves it."""
        return (
            f"/v1/runs/{urllib.parse.quote(self.run, safe='')}"
            f"/steps/{self.step.generation}/{self.step.step}/slots/{self.layout}/{self.position}"
        )

    def __str__(self) -> str:
        return f"{self.step} of run {self.run}, position {self.position} in layout {self.layout}"
