"""Machine types with accelerators: how much memory a host has. What TPU slices are made of is in `tpu_types`.

Every figure is from the vendor's documentation, named beside it. Google gives memory in GB and Amazon in GiB;
GB are taken as 10^9 bytes, the smaller reading.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping

from emergency_ckpt.errors import ConfigError

GB = 10**9
GIB = 2**30
MIB = 2**20

_TPU_V4 = "docs.cloud.google.com/tpu/docs/v4"
_TPU_V5E = "docs.cloud.google.com/tpu/docs/v5e"
_TPU_V5P = "docs.cloud.google.com/tpu/docs/v5p"
_TPU_V6E = "docs.cloud.google.com/tpu/docs/v6e"
_TPU_7X = "docs.cloud.google.com/tpu/docs/tpu7x"
_GPU_MACHINES = "docs.cloud.google.com/compute/docs/accelerator-optimized-machines"
_AWS_P4 = "aws.amazon.com/ec2/instance-types/p4"
_AWS_P5 = "aws.amazon.com/ec2/instance-types/p5"
_AWS_P6 = "aws.amazon.com/ec2/instance-types/p6"


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """One machine type.

    Attributes:
      accelerator: what its chips are called. chips: how many of them a host has.
      memory_bytes: of the host. chip_memory_bytes: of one chip.
      source: where both figures are from.
    """

    name: str
    accelerator: str
    chips: int
    memory_bytes: int
    chip_memory_bytes: int
    source: str

    @property
    def is_on_gke(self) -> bool:
        """Whether GKE's own reservation comes off its memory."""
        return "cloud.google.com" in self.source


_ALL = (
    Machine("ct4p-hightpu-4t", "TPU v4", 4, 407 * GB, 32 * GB, _TPU_V4),
    Machine("ct5lp-hightpu-1t", "TPU v5e", 1, 48 * GB, 16 * GB, _TPU_V5E),
    Machine("ct5lp-hightpu-4t", "TPU v5e", 4, 192 * GB, 16 * GB, _TPU_V5E),
    Machine("ct5lp-hightpu-8t", "TPU v5e", 8, 384 * GB, 16 * GB, _TPU_V5E),
    Machine("ct5p-hightpu-4t", "TPU v5p", 4, 448 * GB, 95 * GB, _TPU_V5P),
    # Tables in circulation say 48 and 176: the smaller one refuses too much rather than too little.
    Machine("ct6e-standard-1t", "TPU v6e", 1, 48 * GB, 32 * GB, _TPU_V6E),
    Machine("ct6e-standard-4t", "TPU v6e", 4, 720 * GB, 32 * GB, _TPU_V6E),
    Machine("ct6e-standard-8t", "TPU v6e", 8, 1440 * GB, 32 * GB, _TPU_V6E),
    Machine("tpu7x-standard-4t", "TPU7x", 4, 960 * GB, 192 * GB, _TPU_7X),
    Machine("a2-highgpu-8g", "A100 40GB", 8, 680 * GB, 40 * GB, _GPU_MACHINES),
    Machine("a2-megagpu-16g", "A100 40GB", 16, 1360 * GB, 40 * GB, _GPU_MACHINES),
    Machine("a2-ultragpu-8g", "A100 80GB", 8, 1360 * GB, 80 * GB, _GPU_MACHINES),
    Machine("a3-highgpu-8g", "H100", 8, 1872 * GB, 80 * GB, _GPU_MACHINES),
    Machine("a3-megagpu-8g", "H100", 8, 1872 * GB, 80 * GB, _GPU_MACHINES),
    Machine("a3-ultragpu-8g", "H200", 8, 2952 * GB, 141 * GB, _GPU_MACHINES),
    Machine("a4-highgpu-8g", "B200", 8, 3968 * GB, 180 * GB, _GPU_MACHINES),
    Machine("p4d.24xlarge", "A100 40GB", 8, 1152 * GIB, 40 * GB, _AWS_P4),
    Machine("p4de.24xlarge", "A100 80GB", 8, 1152 * GIB, 80 * GB, _AWS_P4),
    Machine("p5.48xlarge", "H100", 8, 2048 * GIB, 80 * GB, _AWS_P5),
    Machine("p5e.48xlarge", "H200", 8, 2048 * GIB, 141 * GB, _AWS_P5),
    Machine("p5en.48xlarge", "H200", 8, 2048 * GIB, 141 * GB, _AWS_P5),
    Machine("p6-b200.48xlarge", "B200", 8, 2048 * GIB, 179 * GB, _AWS_P6),
)

MACHINES: Mapping[str, Machine] = {machine.name: machine for machine in _ALL}
"""By the name of the machine type in Google Cloud or EC2 (SageMaker's names have `ml.` before it)."""


def known_machine(name: str | None) -> Machine | None:
    """The machine type of this name, where the table has it."""
    return None if name is None else MACHINES.get(name.removeprefix("ml."))


def find_machine(name: str) -> Machine:
    """The machine type of this name. Raises ConfigError for one that the table does not have."""
    found = known_machine(name)
    if found is None:
        close = difflib.get_close_matches(name, list(MACHINES), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"machine type {name!r} is not in the table, which has {', '.join(MACHINES)}.{hint} For "
            "others give the memory of a host by hand (--machine-memory 448GB)."
        )
    return found


def gke_reserved_bytes(memory_bytes: int) -> int:
    """What GKE keeps of a node's memory for itself, and may evict pods below.

    A quarter of the first 4 GiB, 20 % of the next 4, 10 % of the next 8, 6 % of the next 112, 2 % of the
    rest, and 100 MiB (cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes).
    """
    reserved, left = 0.0, float(memory_bytes)
    for gib, share in ((4, 0.25), (4, 0.2), (8, 0.1), (112, 0.06)):
        part = min(left, gib * GIB)
        reserved, left = reserved + share * part, left - part
    return int(reserved + 0.02 * left) + 100 * MIB
