"""Machine types: what they are called, and what GKE keeps of a node's memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.machines import GB, GIB, MACHINES, MIB, find_machine, gke_reserved_bytes
from emergency_ckpt.errors import ConfigError


def test_machine_types_are_found_by_their_names_of_either_cloud() -> None:
    assert find_machine("ml.p5.48xlarge") is find_machine("p5.48xlarge")
    assert not find_machine("p5.48xlarge").is_on_gke
    assert find_machine("ct5p-hightpu-4t").memory_bytes == 448 * GB
    with pytest.raises(ConfigError, match=r"Did you mean a3-megagpu-8g\?"):
        find_machine("a3-mega-8g")


def test_every_figure_names_its_source() -> None:
    assert all("/" in machine.source and machine.source.count(".") >= 1 for machine in MACHINES.values())


@pytest.mark.parametrize(
    ("gib", "reserved_mib"),
    # By hand from the rule: 1 GiB, 1.8 GiB, 2.6 GiB, 9.32 GiB, 9.32 + 2 % of 128 GiB; each and 100 MiB.
    [(4, 1024 + 100), (8, 1843.2 + 100), (16, 2662.4 + 100), (128, 9543.68 + 100), (256, 12165.12 + 100)],
)
def test_gke_keeps_what_its_documentation_says(gib: int, reserved_mib: float) -> None:
    assert gke_reserved_bytes(gib * GIB) == pytest.approx(reserved_mib * MIB, abs=1)


@given(st.integers(GIB, 4096 * GIB), st.integers(1, GIB))
def test_more_memory_leaves_more(memory: int, more: int) -> None:
    assert memory + more - gke_reserved_bytes(memory + more) > memory - gke_reserved_bytes(memory) - 1
