"""What a caller says about extras so that they can be restored by another number of processes.

Extras belong to one process of a job of one size; only what is declared here comes back otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class GlobalExtras:
    """Extras that are the same on all processes, so that any of them may have any one's copy.

    Give it where they are saved, which is when it counts, and where they are restored:
    `extras={"schedule": GlobalExtras(schedule)}`. With the same number of processes each gets its own copy.

    Attributes:
      value: plain data, or an object with `get_state()` and `set_state()`.
    """

    value: Any

    def __post_init__(self) -> None:
        _check(self.value)


@dataclasses.dataclass(frozen=True)
class ReshardedExtras:
    """Extras that each process has for itself, with a way to make those of another number of processes.

    Give it where they are restored: `extras={"data": ReshardedExtras(iterator, reshard)}`. A save takes it too.

    Attributes:
      value: plain data, or an object with `get_state()` and `set_state()`.
      reshard: called on every process where the step was saved by another number of processes, with the states
        of all of these in their order, the index of this process and the number of processes now; returns the
        state of this process. It must give the same for the same arguments.
    """

    value: Any
    reshard: Callable[[list[Any], int, int], Any]

    def __post_init__(self) -> None:
        _check(self.value)
        if not callable(self.reshard):
            raise TypeError(f"reshard is {self.reshard!r}; expected a function of (states, process, processes)")


def undeclared(value: Any) -> Any:
    """What a declaration is about; any other value as it is."""
    return value.value if isinstance(value, GlobalExtras | ReshardedExtras) else value


def _check(value: Any) -> None:
    if isinstance(value, GlobalExtras | ReshardedExtras):
        raise TypeError(f"{type(value).__name__} cannot be declared a second time")
