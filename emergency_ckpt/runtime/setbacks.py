"""What went wrong in one round of a restore, as the processes tell it to each other.

A bad source is struck for the step; an agent that cannot be reached serves nobody for the rest of the restore,
which says nothing about what its own trainer has.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.restore_plan import Strike


@dataclasses.dataclass(frozen=True)
class Setbacks:
    """Sources that turned out bad, and processes whose agents cannot be reached, with the reason."""

    strikes: tuple[Strike, ...] = ()
    unreachable: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.strikes or self.unreachable)

    @classmethod
    def of(cls, step: StepId, process: int | None, why: str) -> Setbacks:
        """All of one source: a process's slot for the step, or the persistent step (None)."""
        return cls((Strike(step, process, None, why),))

    def names(self, process: int | None) -> bool:
        """Whether nothing more is to be taken from a process's slot, or from the persistent tier (None)."""
        struck = any(strike.process == process and strike.shards is None for strike in self.strikes)
        return struck or process in self.unreachable

    def joined(self, other: Setbacks) -> Setbacks:
        """Both; what is named twice is so once."""
        strikes = tuple(dict.fromkeys((*self.strikes, *other.strikes)))
        return Setbacks(strikes, {**other.unreachable, **self.unreachable})

    def to_json(self) -> Any:
        return {
            "strikes": [strike.to_json() for strike in self.strikes],
            "unreachable": [[process, why] for process, why in self.unreachable.items()],
        }

    @classmethod
    def merged(cls, said: Iterable[Any]) -> Any:
        """The JSON of all; many processes may have found one source bad: what one of them says is enough."""
        strikes: dict[str, Any] = {}
        unreachable: dict[int, str] = {}
        for each in said:
            for strike in each["strikes"]:
                strikes.setdefault(json.dumps(strike[:-1]), strike)
            for process, why in each["unreachable"]:
                unreachable.setdefault(process, why)
        return {
            "strikes": [strikes[source] for source in sorted(strikes)],
            "unreachable": sorted(map(list, unreachable.items())),
        }

    @classmethod
    def from_json(cls, raw: Any) -> Setbacks:
        strikes = tuple(Strike.from_json(strike) for strike in raw["strikes"])
        return cls(strikes, dict(raw["unreachable"]))


NONE = Setbacks()
