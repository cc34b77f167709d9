"""What an agent knows of one life of a run, and tells other agents of it: trainers, drains, calls, progress.

What is read is checked: it comes from other hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from emergency_ckpt.agent.trainers import State
from emergency_ckpt.core.lineage import StepId

CallState = Literal["armed", "leading", "done"]
"""Of a last call: it waits for its moment; this agent carries it out; the newest step is persistent."""


@dataclasses.dataclass(frozen=True, slots=True)
class CallReport:
    """A last call of an agent. `seconds`: until it begins, or, where it is done, since it ended."""

    state: CallState
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class LifeReport:
    """What an agent knows of a life.

    Attributes:
      processes: the states of its trainers by process.
      drains, writing: how many drains run there; how many of them do not wait for the parts of others.
      running: those of this life: the step, and whether it waits for the parts of others.
      call: its last call of this life. leaving: whether its host goes away.
      progress: by process, the step that the trainer asked about last, and for how long it has said nothing.
    """

    processes: Mapping[int, State]
    drains: int
    writing: int
    running: tuple[tuple[StepId, bool], ...] = ()
    call: CallReport | None = None
    leaving: bool = False
    progress: Mapping[int, tuple[int | None, float]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "processes": {str(process): state for process, state in self.processes.items()},
            "drains": self.drains,
            "writing": self.writing,
            "running": [[step.generation, step.step, waits] for step, waits in self.running],
            "call": None if self.call is None else [self.call.state, self.call.seconds],
            "leaving": self.leaving,
            "progress": {str(process): list(said) for process, said in self.progress.items()},
        }

    @classmethod
    def from_json(cls, said: Any) -> LifeReport:
        """Raises TypeError, KeyError, ValueError or AttributeError for anything that `to_json` did not make."""
        states = {int(process): state for process, state in said["processes"].items()}
        drains, writing, leaving = said["drains"], said["writing"], said["leaving"]
        running = tuple((StepId(_whole(g), _whole(s)), _truth(waits)) for g, s, waits in said["running"])
        progress = {
            int(process): (None if step is None else _whole(step), float(age))
            for process, (step, age) in said["progress"].items()
        }
        call = None
        if said["call"] is not None:
            state, seconds = said["call"]
            if state not in get_args(CallState):
                raise ValueError(f"{state!r:.40}")
            call = CallReport(state, float(seconds))
        if not set(states.values()) <= set(get_args(State)):
            raise ValueError(f"{states!r:.120}")
        return cls(
            cast(Mapping[int, State], states),
            _whole(drains),
            _whole(writing),
            running,
            call,
            _truth(leaving),
            progress,
        )


def _whole(raw: Any) -> int:
    if type(raw) is not int or raw < 0:
        raise ValueError(f"expected a whole number, found {raw!r:.40}")
    return raw


def _truth(raw: Any) -> bool:
    if type(raw) is not bool:
        raise ValueError(f"expected true or false, found {raw!r:.40}")
    return raw
