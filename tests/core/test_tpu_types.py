"""TPU types: what they stand for, and what does not exist. The tests of XPK hold them against its own table."""

from __future__ import annotations

import pytest

from emergency_ckpt.core.machines import MACHINES
from emergency_ckpt.core.tpu_types import FAMILIES, slice_with, tpu_type
from emergency_ckpt.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "machine", "hosts", "chips"),
    [
        # The tables of docs.cloud.google.com/tpu/docs/v4, v5p, v6e; v5e and TPU7x as XPK names them.
        ("v4-512", "ct4p-hightpu-4t", 64, 256),
        ("v5litepod-8", "ct5lp-hightpu-4t", 2, 8),
        ("v5litepod-256", "ct5lp-hightpu-4t", 64, 256),
        ("v5p-8", "ct5p-hightpu-4t", 1, 4),
        ("v5p-128", "ct5p-hightpu-4t", 16, 64),
        ("v5p-4x4x8", "ct5p-hightpu-4t", 32, 128),
        ("v5p-12288", "ct5p-hightpu-4t", 1536, 6144),
        ("v6e-1", "ct6e-standard-1t", 1, 1),
        ("v6e-256", "ct6e-standard-4t", 64, 256),
        ("tpu7x-128", "tpu7x-standard-4t", 16, 64),
    ],
)
def test_a_tpu_type_is_so_many_hosts_of_a_machine_type(name: str, machine: str, hosts: int, chips: int) -> None:
    found = tpu_type(name)
    assert (found.machine, found.hosts, found.hosts * found.chips_per_host) == (machine, hosts, chips)
    assert MACHINES[machine].chips == found.chips_per_host


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v6e-100", "the topologies 1x1, 2x2, 2x4"),
        ("v6e-512", "or by their number of chips"),
        ("v5p-100", "or by the number of cores"),
        ("v5p", "is followed by a topology"),
        ("v5p-٨", "is followed by a topology"),
        ("v5e-8", "v5e is named v5litepod"),
        ("h100-8", "the families are v4, v5litepod"),
        ("", "the families are v4, v5litepod"),
    ],
)
def test_a_tpu_type_that_there_is_not_is_refused_with_the_rule(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tpu_type(name)
    assert said in str(refused.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_slice_with_so_many_hosts_is_found(family: str) -> None:
    for hosts in (1, 2, 3, 17, 60):
        found = slice_with(f"{family}-8", hosts)
        assert found is not None
        assert hosts <= found.hosts <= 4 * hosts
    assert slice_with(f"{family}-8", 10**6) is None
