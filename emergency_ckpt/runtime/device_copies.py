"""Comparing the copies that devices of one process hold, where the job wants it.

Asked in the train loop, read in the writer thread, and told like differences between replicas. Whatever fails
here costs the comparison only.
"""

from __future__ import annotations

from typing import Any, Literal

from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import ReplicaDivergenceError
from emergency_ckpt.jaxio.device_copies import DeviceComparison, compare_devices
from emergency_ckpt.telemetry.events import DeviceDivergenceEvent
from emergency_ckpt.telemetry.log import CheckpointLogger

_MOST_LINES = 20
_NAMED_LEAVES = 5


class DeviceCopies:
    """The comparisons of one process."""

    def __init__(self, wanted: bool, log: CheckpointLogger, on_divergence: Literal["warn", "raise"]) -> None:
        self._wanted = wanted
        self._log = log
        self._on_divergence = on_divergence

    def ask(self, step: StepId, state: Any) -> DeviceComparison | None:
        """Asks the devices; the state may be donated when this returns."""
        if not self._wanted:
            return None
        try:
            return compare_devices(state)
        except (RuntimeError, TypeError, ValueError) as error:
            self._cannot(step, error)
            return None

    def compare(self, step: StepId, asked: DeviceComparison) -> ReplicaDivergenceError | None:
        """Says what differs; the error where it is to be one."""
        try:
            differing = asked.differing()
        except RuntimeError as error:
            self._cannot(step, error)
            return None
        for number, each in enumerate(differing):
            event = DeviceDivergenceEvent(
                step=step.step, leaf=each.shard.leaf, box=str(each.shard.box), versions=each.versions
            )
            if number < _MOST_LINES:
                self._log.emit(event)
            else:
                self._log.metrics.observe(event)
        if len(differing) > _MOST_LINES:
            self._log.error(
                "replicas", step.step, f"copies of {len(differing) - _MOST_LINES} more shards differ"
            )
        leaves = tuple(dict.fromkeys(each.shard.leaf for each in differing))
        if not leaves or self._on_divergence != "raise":
            return None
        more = f" and {len(leaves) - _NAMED_LEAVES} more" if len(leaves) > _NAMED_LEAVES else ""
        return ReplicaDivergenceError(
            f"{step} was saved while devices of this process held different copies of "
            f"{', '.join(leaves[:_NAMED_LEAVES])}{more}: some device damages data silently. Lines of operation "
            "'replicas' in this process's log name the devices. Replace the host and restart: the restore "
            "gives all devices what was saved; where that may be the bad copy, restore an older step.",
            step.step,
            leaves,
        )

    def _cannot(self, step: StepId, error: Exception) -> None:
        self._log.warning(
            "replicas", step.step, f"copies on the devices of this process could not be compared: {error}"
        )
