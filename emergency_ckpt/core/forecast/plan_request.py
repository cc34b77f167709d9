"""What is to be planned, and where its ramdisk does not fit, the nearest plan that does.

A refusal always says what is missing and what would be enough.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from emergency_ckpt.core.forecast.failures import FailureModel
from emergency_ckpt.core.forecast.job_shape import JobShape, Protection, stored_share
from emergency_ckpt.core.forecast.save_costs import Costs
from emergency_ckpt.core.forecast.sizing import BUFFER, HostMemory, Ramdisk, StateSize, quantity, slots_wanted
from emergency_ckpt.core.forecast.storage_cost import Prices
from emergency_ckpt.core.machines import MIB
from emergency_ckpt.core.tpu_types import slice_with
from emergency_ckpt.errors import ConfigError

LEAST_STEP_SECONDS, MOST_STEP_SECONDS = 1e-6, 86400.0


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
      memory: of a host; None: it is not known, and nothing is checked.
      slots: of a ramdisk; None: as many as saves and drains want.
      local_period, persistent_period: steps; None: the best ones.
      kept_persistent: steps kept in the persistent tier; None: all.
      prices: of the persistent tier; None: not known.
      persistent_flag: what says the persistent period.
      tpu_type: of a slice; None: slices of any number of hosts can be had.
    """

    shape: JobShape
    protection: Protection
    state: StateSize
    step_seconds: float
    costs: Costs
    model: FailureModel
    memory: HostMemory | None = None
    slots: int | None = None
    buffer: float = BUFFER
    local_period: int | None = None
    persistent_period: int | None = None
    kept_persistent: int | None = None
    prices: Prices | None = None
    persistent_flag: str = "checkpoint_period"
    tpu_type: str | None = None

    def __post_init__(self) -> None:
        check_step_seconds(self.step_seconds)

    @property
    def ramdisk(self) -> Ramdisk:
        slots = slots_wanted(self.protection.kept, True) if self.slots is None else self.slots
        return Ramdisk(self.state.slot_bytes, slots, self.buffer)

    @property
    def fits(self) -> bool:
        """Whether the memory of a host has room for the ramdisk."""
        return self.memory is None or self.ramdisk.least_mib * MIB <= self.memory.for_ramdisk


def check_step_seconds(seconds: float) -> None:
    """Raises ConfigError for what is no time of a train step."""
    if not LEAST_STEP_SECONDS <= seconds <= MOST_STEP_SECONDS:
        what = "--step-seconds is missing" if math.isnan(seconds) else f"--step-seconds {seconds:g}"
        raise ConfigError(
            f"{what}: give how long a train step takes, {LEAST_STEP_SECONDS:g} to {MOST_STEP_SECONDS:,.0f}"
        )


def too_large(request: Request) -> str:
    """What to say where the ramdisk does not fit."""
    memory = request.memory
    assert memory is not None
    mib = request.ramdisk.least_mib
    room = max(0, memory.for_ramdisk // MIB)
    said = [
        f"a ramdisk of {quantity(mib)} per host ({request.ramdisk.slots} slots of "
        f"{quantity(-(-request.state.slot_bytes // MIB))}, and a buffer of {request.buffer:.0%}) does not fit: "
        f"of {quantity(memory.memory_bytes // MIB)} of memory {quantity(room)} are left beside what Kubernetes "
        f"keeps ({quantity(memory.reserved_bytes // MIB)}), the training program "
        f"({quantity(memory.trainer_bytes // MIB)}) and saves ({quantity(memory.window_bytes // MIB)})"
    ]
    nearest = next((each for each in _smaller(request) if each[1].fits), None)
    hosts = _hosts_that_fit(request)
    if nearest is not None:
        words, smaller = nearest
        said.append(f"The nearest plan that fits: {words}, {quantity(smaller.ramdisk.least_mib)}")
    if hosts is not None:
        said.append(f"As it is, it fits from {hosts} hosts per slice on{_as_tpu_type(request, hosts)}")
    elif nearest is None:
        said.append("No number of hosts makes it fit: choose machines with more memory")
    return ". ".join(said)


def _as_tpu_type(request: Request, hosts: int) -> str:
    if request.tpu_type is None:
        return ""
    larger = slice_with(request.tpu_type, hosts)
    return f": --tpu-type {larger.name}" if larger else ", which no slice of this generation has"


def _smaller(request: Request) -> Iterator[tuple[str, Request]]:
    """Plans that need less, the smallest change first."""
    protection, copies = request.protection, request.protection.copies
    least_slots = "--slots {0} (local saves then wait for drains)"
    changes: list[tuple[str, Protection]] = [("", protection)]
    if protection.kept > 1:
        changes.append(("local_checkpoint_max_to_keep=1", dataclasses.replace(protection, kept=1)))
    once = dataclasses.replace(protection, kept=1)
    keeping = "local_checkpoint_max_to_keep=1 " if protection.kept > 1 else ""
    shape = request.shape
    if shape.replicated and copies < shape.slices and not protection.spreads:
        if copies < 2 < shape.slices:
            changes.append(
                (
                    f"{keeping}local_checkpoint_copies=2 local_checkpoint_spread=True",
                    dataclasses.replace(once, spreads=True, copies=2),
                )
            )
        risk = "" if copies > 1 else " (one lost host then costs the step)"
        changes.append(
            (f"{keeping}local_checkpoint_spread=True{risk}", dataclasses.replace(once, spreads=True))
        )
    if copies > 1 and (not shape.replicated or shape.slices == 1 or protection.spreads):
        changes.append((f"{keeping}local_checkpoint_copies=1", dataclasses.replace(once, copies=1)))
    for words, changed in changes:
        for slots in (None, changed.kept + 1):
            if slots is None and not words:
                continue
            said = " ".join(filter(None, (words, least_slots.format(slots) if slots else "")))
            yield said, _with(request, request.shape, changed, slots)


def _with(request: Request, shape: JobShape, protection: Protection, slots: int | None) -> Request:
    """The same state on another shape, or kept in another way."""
    before = request.shape.hosts_per_slice / shape.hosts_per_slice
    held = math.ceil(request.state.host_bytes * before)
    ratio = stored_share(shape, protection) / stored_share(request.shape, request.protection)
    slot = math.ceil(request.state.slot_bytes * before * ratio)
    state = dataclasses.replace(request.state, host_bytes=held, slot_bytes=slot)
    memory = request.memory
    if memory is not None:
        kept = memory.window_bytes * before if state.slot_bytes >= state.host_bytes else 0
        memory = dataclasses.replace(memory, window_bytes=max(math.ceil(kept), state.gathered_bytes))
    return dataclasses.replace(
        request, shape=shape, protection=protection, state=state, slots=slots, memory=memory
    )


def _hosts_that_fit(request: Request) -> int | None:
    """The least number of hosts per slice with which the plan fits otherwise unchanged; None: there is none."""
    shape = request.shape

    def fits(hosts: int) -> bool:
        wider = dataclasses.replace(shape, hosts_per_slice=hosts)
        return _with(request, wider, request.protection, request.slots).fits

    low, high = shape.hosts_per_slice, shape.hosts_per_slice * shape.most_slices // shape.slices
    if not fits(high):
        return None
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
