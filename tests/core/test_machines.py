"""Machine types: what a TPU type stands for, what does not exist, and what GKE keeps of a node's memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_ckpt.core.machines import GB, GIB, MACHINES, MIB, find_machine, gke_reserved_bytes, tpu_slice
from emergency_ckpt.errors import ConfigError


@pytest.mark.parametrize(
    ("tpu_type", "machine", "hosts", "chips"),
    [
        # The tables of docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; TPU7x as XPK names it.
        ("v4-512", "ct4p-hightpu-4t", 64, 256),
        ("v5litepod-8", "ct5lp-hightpu-8t", 1, 8),
        ("v5litepod-256", "ct5lp-hightpu-4t", 64, 256),
        ("v5p-8", "ct5p-hightpu-4t", 1, 4),
        ("v5p-128", "ct5p-hightpu-4t", 16, 64),
        ("v5p-12288", "ct5p-hightpu-4t", 1536, 6144),
        ("v6e-1", "ct6e-standard-1t", 1, 1),
        ("v6e-256", "ct6e-standard-4t", 64, 256),
        ("tpu7x-128", "tpu7x-standard-4t", 16, 64),
    ],
)
def test_a_tpu_type_is_so_many_hosts_of_a_machine_type(
    tpu_type: str, machine: str, hosts: int, chips: int
) -> None:
    found = tpu_slice(tpu_type)
    assert (found.machine.name, found.hosts, found.chips) == (machine, hosts, chips)


@pytest.mark.parametrize(
    ("tpu_type", "said"),
    [
        ("v6e-100", "N is one of 1, 4, 8, 16, 32, 64, 128, 256 "),
        ("v6e-512", "N is one of 1, 4, 8"),
        ("v5p-100", "or a multiple of 128 up to 12288"),
        ("v5p", "v5p-N counts cores"),
        ("v5p-٨", "does not exist"),
        ("v6-256", "Did you mean v6e"),
        ("h100-8", "A type is a generation and a number"),
        ("", "is unknown"),
    ],
)
def test_a_tpu_type_that_there_is_not_is_refused_with_the_rule(tpu_type: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tpu_slice(tpu_type)
    assert said in str(refused.value)


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
