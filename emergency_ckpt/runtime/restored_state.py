"""What `restore_or_init` gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class RestoredState:
    """The state to train on.

    Attributes:
      state: the pytree.
      step: the step it was saved at; None when training starts from scratch (or from another run's checkpoint).
      extras: this process's extras by name, as plain data.
      source: where the state came from, in words.
    """

    state: Any
    step: int | None
    extras: Mapping[str, Any]
    source: str
