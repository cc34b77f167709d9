"""What one run of the benchmarks measures: chosen on the command line, handed to both processes as JSON."""

from __future__ import annotations

import dataclasses
import json

MIB = 1024 * 1024
PROCESSES = 2
JOB_SECTIONS = ("memcpy", "save", "idle", "loop", "restore", "lost", "memory")
"""What is measured in a job of PROCESSES, in the order in which it runs."""

SECTIONS = (*JOB_SECTIONS, "fetch", "plan")
"""All; the last two need no job (see `benchmarks.jobless`)."""

# Copies of one process's bytes in memory at the worst moment, which is Orbax's restore: the state and what was
# restored, three slots, Orbax's files and what it broadcasts, a share of the persistent step. Measured: 8.
_COPIES = 9
_BARE_PROCESS_BYTES = 700 * MIB


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
      size_mib: bytes of the state in each process, in MiB; both slices hold all of it.
      repeats: rounds of each measurement, beside the first use.
      sections: members of SECTIONS.
      loop_steps: train steps in each round of the loop.
      memory_saves: saves in the section about memory.
      directory: holds everything that the processes write.
    """

    size_mib: int
    repeats: int
    sections: tuple[str, ...]
    loop_steps: int
    memory_saves: int
    directory: str

    @property
    def needed_bytes(self) -> int:
        """Memory that the run takes at its worst moment, ramdisk included."""
        return PROCESSES * (_COPIES * self.size_mib * MIB + _BARE_PROCESS_BYTES)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        raw = json.loads(text)
        return cls(**{**raw, "sections": tuple(raw["sections"])})
