"""How often to save: closed formulas for the best periods and for what saving and failing cost.

All times are seconds. The formulas are of first order (a failure costs half a period) but for
`exact_wall_seconds`, and hold where periods are short beside the mean time between failures.
"""

from __future__ import annotations

import dataclasses
import math


def young(cost: float, mean_seconds: float) -> float:
    """The best time between two saves: T = sqrt(2 C M).

    Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974.

    Args:
      cost: how long a save blocks the job. mean_seconds: the mean time between failures of the job.
    """
    return math.sqrt(2 * cost * mean_seconds)


def daly(cost: float, mean_seconds: float) -> float:
    """The best time between two saves, of higher order:

    T = sqrt(2 C M) [1 + sqrt(C / 2M) / 3 + (C / 2M) / 9] - C for C < 2M, and M otherwise.

    Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006,
    eq. 37.
    """
    if cost >= 2 * mean_seconds:
        return mean_seconds
    ratio = cost / (2 * mean_seconds)
    return young(cost, mean_seconds) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def exact_wall_seconds(work: float, period: float, cost: float, restart: float, mean_seconds: float) -> float:
    """The expected time that so much work takes, where each failure goes back to the last save and restarts.

    M e^(R/M) (e^((T+C)/M) - 1) work / T: exact for exponential failures, which also come during restarts (Daly
    2006, eq. 20).
    """
    m = mean_seconds
    return m * math.exp(restart / m) * math.expm1((period + cost) / m) * work / period


def effective_time_ratio(
    period: float, cost: float, restart: float, nodes: int, failures_per_node_second: float
) -> float:
    """Productive time over wall time: (1 - N r (u + T/2)) / (1 + w/T).

    N nodes that fail at rate r, u to restart, a save every T that takes w. After Kokolis et al., "Revisiting
    Reliability in Large-Scale Machine Learning Research Clusters", HPCA 2025 (arXiv:2410.21680), who estimate
    it by failures, restarts and work done again; with what saves take, and without waiting for machines.
    """
    return (1 - nodes * failures_per_node_second * (restart + period / 2)) / (1 + cost / period)


@dataclasses.dataclass(frozen=True, slots=True)
class TwoTiers:
    """A job with a local and a persistent tier.

    Attributes:
      mean_seconds: M, between failures of the job.
      missed: q, the share of failures after which the local tier restores nothing.
      local_cost, persistent_cost: C, how long one save blocks.
      local_lag, persistent_lag: L, from then on until it can be restored.
      local_restart, persistent_restart: R, from a failure until the job trains again.
    """

    mean_seconds: float
    missed: float
    local_cost: float
    persistent_cost: float
    local_lag: float = 0.0
    persistent_lag: float = 0.0
    local_restart: float = 0.0
    persistent_restart: float = 0.0

    @property
    def best_local(self) -> float:
        """T_l = sqrt(2 C_l M / (1 - q)), where the derivative of `waste` vanishes; inf where q is 1."""
        return _best(self.local_cost, self.mean_seconds, 1 - self.missed)

    @property
    def best_persistent(self) -> float:
        """T_p = sqrt(2 C_p M / q); inf where q is 0."""
        return _best(self.persistent_cost, self.mean_seconds, self.missed)

    def waste(self, local_period: float, persistent_period: float) -> float:
        """The share of time that is no progress, of first order; 1 or more: there is none.

        C_l/T_l + C_p/T_p + (1-q)(T_l/2 + L_l + R_l)/M + q(T_p/2 + L_p + R_p)/M: Young's argument for each tier.
        """
        return (
            self.local_cost / local_period
            + self.persistent_cost / persistent_period
            + self.rolled_back(local_period, persistent_period) / self.mean_seconds
            + self.restarting / self.mean_seconds
        )

    def rolled_back(self, local_period: float, persistent_period: float) -> float:
        """Seconds of work that one failure costs, on average."""
        hit, missed = 1 - self.missed, self.missed
        # A tier that nothing comes from may have no period at all.
        local = hit * (local_period / 2 + self.local_lag) if hit > 0 else 0.0
        return local + (missed * (persistent_period / 2 + self.persistent_lag) if missed > 0 else 0.0)

    @property
    def restarting(self) -> float:
        """Seconds from a failure until the job trains again, on average."""
        return (1 - self.missed) * self.local_restart + self.missed * self.persistent_restart


def _best(cost: float, mean_seconds: float, share: float) -> float:
    return math.sqrt(2 * cost * mean_seconds / share) if share > 0 else math.inf
