"""TPU types: hosts, topology and machine of a slice, by the name that XPK and Google's documentation use.

A type is named by its topology (`v5p-4x4x8`) or, where one topology is usual, by its cores (`v5p-256`; chips
for v5litepod and v6e). The tests hold every name against the real XPK.
"""

from __future__ import annotations

import dataclasses
import math
import re

from emergency_ckpt.errors import ConfigError

CHIPS_PER_HOST = 4
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_FLAT = ((2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_LONGEST_SIDE = 256
_CUBE = 64  # chips of a cube of 4x4x4, of which larger slices are made

Topology = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """What the slices of one generation of TPUs have in common.

    Attributes:
      cores_per_chip: by which the names by count are multiplied.
      accelerator: value of GKE's label `cloud.google.com/gke-tpu-accelerator`.
      machine: Google's machine type of a host; `{}` is the number of its chips.
      flat: the topologies, for those of two dimensions.
      most_cubes: of those of three dimensions.
      counts: the largest count that names one topology, or all counts that do.
    """

    cores_per_chip: int
    accelerator: str
    machine: str
    flat: tuple[Topology, ...] = ()
    most_cubes: int = 0
    counts: int | frozenset[int] = 0


FAMILIES = {
    "v4": Family(
        2,
        "tpu-v4-podslice",
        "ct4p-hightpu-{}t",
        most_cubes=64,
        counts=frozenset({8, 16, 32, 64, 128, 256, 384, 512, 1024, 1536, 2048, 4096}),
    ),
    "v5litepod": Family(1, "tpu-v5-lite-podslice", "ct5lp-hightpu-{}t", flat=_FLAT),
    "v5p": Family(2, "tpu-v5p-slice", "ct5p-hightpu-{}t", most_cubes=140, counts=12_288),
    "v6e": Family(1, "tpu-v6e-slice", "ct6e-standard-{}t", flat=((1, 1), (2, 2), *_FLAT)),
    "tpu7x": Family(2, "tpu7x", "tpu7x-standard-{}t", most_cubes=144, counts=12_288),
}


@dataclasses.dataclass(frozen=True, slots=True)
class TpuType:
    """One slice."""

    name: str
    topology: str
    hosts: int
    chips_per_host: int
    accelerator: str
    machine: str


def tpu_type(name: str) -> TpuType:
    """The slice of that name. Raises ConfigError with what is known."""
    family_name, _, size = name.partition("-")
    family = FAMILIES.get(family_name)
    if family is None:
        hint = " v5e is named v5litepod there." if family_name in ("v5e", "v5lite") else ""
        raise ConfigError(
            f"{name!r} is no TPU type that is known here; the families are {', '.join(FAMILIES)}.{hint} "
            "Write FAMILY-TOPOLOGY, as in v5p-4x4x8, or FAMILY-CORES, as in v5p-256."
        )
    topology = _topology(family, size)
    if topology is None:
        raise ConfigError(f"{name!r} is no TPU type that is known here: {_rule(family_name, family)}.")
    chips = math.prod(topology)
    per_host = min(chips, CHIPS_PER_HOST)
    return TpuType(
        name,
        "x".join(map(str, topology)),
        chips // per_host,
        per_host,
        family.accelerator,
        family.machine.format(per_host),
    )


def slice_with(name: str, hosts: int) -> TpuType | None:
    """The smallest slice of the generation of `name` that has so many hosts; None where none has."""
    family_name = name.partition("-")[0]
    family = FAMILIES[family_name]
    chips = [math.prod(sides) for sides in (family.flat or _SMALL)]
    chips += [cubes * _CUBE for cubes in range(1, family.most_cubes + 1)]
    for count in chips:
        if count >= hosts * CHIPS_PER_HOST and _by_count(family, count * family.cores_per_chip):
            return tpu_type(f"{family_name}-{count * family.cores_per_chip}")
    return None


def _topology(family: Family, size: str) -> Topology | None:
    if re.fullmatch(r"[1-9][0-9]{0,5}", size):
        return _by_count(family, int(size))
    if re.fullmatch(r"[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}", size):
        sides = tuple(map(int, size.split("x")))
        return sides if _exists(family, sides) else None
    return None


def _exists(family: Family, sides: Topology) -> bool:
    if family.flat or len(sides) != 3:
        return sides in family.flat
    if sides in _SMALL:
        return True
    whole_cubes = all(side % 4 == 0 and side <= _LONGEST_SIDE for side in sides)
    return whole_cubes and sorted(sides) == list(sides) and math.prod(sides) <= family.most_cubes * _CUBE


def _by_count(family: Family, count: int) -> Topology | None:
    """The most compact topology of so many cores: Google's usual one up to the family's limit."""
    chips, rest = divmod(count, family.cores_per_chip)
    if rest:
        return None
    if family.flat:
        return next((sides for sides in family.flat if math.prod(sides) == chips), None)
    known = count in family.counts if isinstance(family.counts, frozenset) else count <= family.counts
    small = next((sides for sides in _SMALL if math.prod(sides) == chips), None)
    if small or not known or chips % _CUBE:
        return small
    cubes = chips // _CUBE
    found = [
        (4 * a, 4 * b, 4 * (cubes // (a * b)))
        for a in range(1, int(cubes ** (1 / 3)) + 2)
        for b in range(a, math.isqrt(cubes // a) + 1)
        if cubes % (a * b) == 0
    ]
    found = [sides for sides in found if _exists(family, sides)]
    return min(found, key=lambda sides: (sum(sides), max(sides)), default=None)


def _rule(name: str, family: Family) -> str:
    if family.flat:
        listed = ", ".join("x".join(map(str, sides)) for sides in family.flat)
        return f"{name}- is followed by one of the topologies {listed}, or by their number of chips"
    return (
        f"{name}- is followed by a topology (2x2x1, 2x2x2, 2x2x4, 2x4x4, or three multiples of 4 from small to "
        f"large, at most {family.most_cubes * _CUBE} chips), or by the number of cores of a usual one"
    )
