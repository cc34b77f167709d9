"""How long a pod may take to end, derived from how long its last save is planned to take.

Each part of the chain must fit into the one around it: the save into the hold of `emergency-ckpt run`, that
into the grace period of the pod.
"""

from __future__ import annotations

import dataclasses
import math

SPARE_SECONDS = 10
"""For what is neither save nor drain: the container runtime, the end of the processes."""

XPK_POLL_SECONDS = 5
"""XPK's wrapper hears a signal, and notices the end of the program, when its `sleep 5` is over."""

AGENT_FINISH_SECONDS = 25
"""What a sidecar agent has after the program's container has ended."""

SPOT_SECONDS = {"gke": 15, "eks": 120}
"""What pods of a spot machine get, whatever they ask for (GKE's page on Spot VMs, 2026; Amazon's notice)."""

_HOLD_FACTOR = 1.5
_LEAST_HOLD_SECONDS = 30


@dataclasses.dataclass(frozen=True, slots=True)
class Grace:
    """Attributes:
    hold_seconds: from the signal to the end of `emergency-ckpt run`, drains included.
    pod_seconds: `terminationGracePeriodSeconds`.
    """

    hold_seconds: int
    pod_seconds: int


def under_xpk(planned_save_seconds: float) -> Grace:
    """Within XPK's wrapper, which takes up to one poll at both ends."""
    hold = _hold(planned_save_seconds)
    return Grace(hold, hold + 2 * XPK_POLL_SECONDS + SPARE_SECONDS)


def with_sidecar(planned_save_seconds: float) -> Grace:
    """With the agent as a sidecar, which is told to end when the program's container has ended."""
    hold = _hold(planned_save_seconds)
    return Grace(hold, hold + AGENT_FINISH_SECONDS + SPARE_SECONDS)


def _hold(planned_save_seconds: float) -> int:
    """Half as much again as is planned: stores are slow when everybody saves at once."""
    return max(_LEAST_HOLD_SECONDS, math.ceil(planned_save_seconds * _HOLD_FACTOR))
