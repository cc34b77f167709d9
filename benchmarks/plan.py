"""What one run of the benchmarks measures: chosen on the command line, handed to both processes as JSON."""

from __future__ import annotations

import dataclasses
import json

MIB = 1024 * 1024
PROCESSES = 2
SECTIONS = ("memcpy", "save", "idle", "loop", "restore")
"""In the order in which they run."""

# Copies of one process's bytes that lie in memory at the worst moment: the state and, in a step, its successor;
# three slots; the memcpy file; Orbax's local steps (the kept one and the one being written) with its host copy;
# a share of the two persistent checkpoints. Seen at 1 GiB: about 10.
_COPIES = 11


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
      size_mib: bytes of the state in each process, in MiB; both slices hold all of it.
      repeats: rounds of each measurement, beside the first use.
      sections: members of SECTIONS.
      loop_steps: train steps in each round of the loop.
      directory: holds everything that the processes write.
    """

    size_mib: int
    repeats: int
    sections: tuple[str, ...]
    loop_steps: int
    directory: str

    @property
    def needed_bytes(self) -> int:
        """Memory that the run takes at its worst moment, ramdisk included."""
        return PROCESSES * _COPIES * self.size_mib * MIB + PROCESSES * 700 * MIB

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        raw = json.loads(text)
        return cls(**{**raw, "sections": tuple(raw["sections"])})
