"""What a train loop hands over with a step, as plain data that nobody changes afterwards."""

from __future__ import annotations

import json
import operator
import time
from collections.abc import Mapping
from typing import Any

from emergency_ckpt.errors import ConfigError, UnsupportedStateError


def step_number(step: Any) -> int:
    """The step number as a plain int, also of numpy's and JAX's integers, in which a train loop may count."""
    try:
        number = int(operator.index(step))
    except TypeError:
        number = -1
    if number < 0:
        raise ConfigError(f"the step is {step!r} ({type(step).__name__}); expected an integer, 0 or more")
    return number


def plain_metadata(
    custom_metadata: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What is kept with the step, as a copy that later changes of the caller do not reach."""
    given = {"custom_metadata": dict(custom_metadata or {}), "metrics": dict(metrics or {})}
    try:
        plain = json.loads(json.dumps(given))
    except (TypeError, ValueError) as error:
        raise UnsupportedStateError(
            f"custom_metadata and metrics must be JSON: {error}. Turn arrays into numbers first: float(loss)."
        ) from error
    return {**plain, "started_nanoseconds": time.time_ns()}
