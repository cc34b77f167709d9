"""Whether two runs came to the same end, bit for bit: losses, every shard of the state, data positions.

A check compares two texts that hold everything there is to compare; equal runs give equal texts.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import xxhash

from emergency_ckpt.demo.journal import Finished, Life


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing in which the interrupted run must be equal to the uninterrupted one."""

    name: str
    expected: str
    found: str

    @property
    def agrees(self) -> bool:
        return self.expected == self.found

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "agrees": self.agrees}


def compare_runs(reference: Sequence[Life], interrupted: Sequence[Life], steps: int) -> tuple[Check, ...]:
    """What must agree, between the lives of the processes of two runs of `steps` steps."""
    wanted, got = _losses(reference), _losses(interrupted)
    all_equal = f"equal at {steps} steps"
    different = [step for step in range(1, steps + 1) if len(wanted[step] | got[step]) != 1]
    ends, other_ends = _ends(reference), _ends(interrupted)
    torn = [*_torn_shards(ends), *_torn_shards(other_ends)]
    return (
        Check("final loss", _text(wanted[steps]), _text(got[steps])),
        Check("loss of every step", all_equal, f"different at step {different[0]}" if different else all_equal),
        Check("parameters and optimizer state", state_digest(ends), state_digest(other_ends)),
        Check("replicas of every shard", "equal", f"different: {torn[0]}" if torn else "equal"),
        Check("data position", _positions(ends), _positions(other_ends)),
    )


def state_digest(ends: Sequence[Finished]) -> str:
    """One digest of the whole state from the checksums of the shards that the processes hold."""
    lines = {f"{shard} {checksum}" for end in ends for shard, checksum in end.shards.items()}
    return xxhash.xxh3_128_hexdigest("\n".join(sorted(lines)).encode())


def _torn_shards(ends: Sequence[Finished]) -> list[str]:
    """The shards that two processes of one run hold with different bytes."""
    checksums: dict[str, set[str]] = defaultdict(set)
    for end in ends:
        for shard, checksum in end.shards.items():
            checksums[shard].add(checksum)
    return sorted(shard for shard, found in checksums.items() if len(found) > 1)


def _losses(lives: Sequence[Life]) -> dict[int, set[str]]:
    """Per step, every loss that any process had at it in any life, as hexadecimal text: each bit counts."""
    losses: dict[int, set[str]] = defaultdict(set)
    for life in lives:
        for fact in life.trained:
            losses[fact.step].add(fact.loss.hex())
    return losses


def _ends(lives: Sequence[Life]) -> list[Finished]:
    """What the processes held at the end, in the order of their indices."""
    ended = [life for life in lives if life.finished is not None]
    return [life.finished for life in sorted(ended, key=lambda life: life.started.process) if life.finished]


def _text(losses: set[str]) -> str:
    return " or ".join(repr(float.fromhex(loss)) for loss in sorted(losses)) or "none"


def _positions(ends: Sequence[Finished]) -> str:
    return json.dumps([end.position for end in ends], sort_keys=True)
