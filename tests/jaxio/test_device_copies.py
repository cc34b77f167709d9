"""Copies of one shard on several devices: equal ones are silent, a flipped bit is named by leaf and device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.jaxio.device_copies import DifferingDevices, compare_devices

DTYPES: list[Any] = [
    np.float32,
    jnp.bfloat16,
    np.float16,
    np.int32,
    np.int8,
    np.uint16,
    np.bool_,
    np.complex64,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.int4,
]


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("replica", "fsdp"))


def array_on(mesh: Mesh, spec: P, right: np.ndarray, damaged: int | None = None, at: int = 0) -> jax.Array:
    """`right`, but for one bit in the copy of one device."""
    sharding = NamedSharding(mesh, spec)
    pieces = []
    for device, index in sharding.addressable_devices_indices_map(right.shape).items():
        piece = np.array(right[index])
        if device.id == damaged:
            piece.reshape(-1).view(np.uint8)[at] ^= 1
        pieces.append(jax.device_put(piece, device))
    return jax.make_array_from_single_device_arrays(right.shape, sharding, pieces)


def found_in(state: Any) -> list[DifferingDevices]:
    comparison = compare_devices(state)
    assert comparison is not None
    jax.tree.map(lambda leaf: leaf.delete(), state)  # As when it is donated to the next step.
    return list(comparison.differing())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_one_bit_in_the_copy_of_one_device_is_named(mesh: Mesh, dtype: Any) -> None:
    right = (np.arange(8 * 6) % 2).astype(dtype).reshape(8, 6)
    state = {
        "same": array_on(mesh, P("fsdp"), right),
        "other": array_on(mesh, P("fsdp"), right, damaged=5, at=3 if np.dtype(dtype).itemsize > 3 else 1),
    }
    assert found_in(state) == [DifferingDevices(Shard("other", Box((2, 0), (4, 6))), ((1,), (5,)))]


def test_of_many_copies_the_odd_one_comes_last(mesh: Mesh) -> None:
    state = {
        "everywhere": array_on(mesh, P(), np.array(3, np.float32), damaged=2),
        "rows": array_on(mesh, P("replica"), np.ones(4)),
    }
    (found,) = found_in(state)
    assert found.shard == Shard("everywhere", Box((), ()))
    assert found.versions == ((0, 1, 3, 4, 5, 6, 7), (2,))


def test_keys_are_compared_and_what_one_device_holds_alone_is_not(mesh: Mesh) -> None:
    replicated = NamedSharding(mesh, P())
    keys = jax.device_put(jax.random.split(jax.random.key(1), 3), replicated)
    assert found_in({"keys": keys}) == []
    sharded = array_on(mesh, P(("replica", "fsdp")), np.arange(8.0, dtype=np.float32))
    assert compare_devices({"all": sharded, "one": jnp.ones(3), "host": np.ones(3), "text": "a"}) is None


def test_swapped_elements_are_noticed(mesh: Mesh) -> None:
    right = np.arange(6, dtype=np.int32)
    sharding = NamedSharding(mesh, P())
    pieces = [jax.device_put(right[::-1].copy() if d.id == 7 else right, d) for d in mesh.devices.flat]
    state = {"w": jax.make_array_from_single_device_arrays((6,), sharding, pieces)}
    ((found),) = found_in(state)
    assert found.versions[1] == (7,)
