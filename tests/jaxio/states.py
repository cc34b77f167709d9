"""States of every kind of leaf, dtype and sharding that a training job may hold, on eight CPU devices."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

DTYPES = [
    "float32", "float16", "bfloat16", "int32", "int8", "uint8", "uint32", "bool", "complex64",
    "int4", "uint4", "int2", "uint2", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn",
]  # fmt: skip
SPECS = [P(), P("data"), P("model"), P("data", "model"), P(None, ("data", "model")), P(("model", "data"))]


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))


def filled(shape: tuple[int, ...], dtype: str, sharding: Any, seed: int = 0) -> jax.Array:
    """An array of arbitrary bit patterns that `dtype` can hold."""
    values = np.random.default_rng(seed).integers(0, 2, (*shape, 2), dtype=np.int8)
    host = (values[..., 0] - values[..., 1] * (dtype[0] not in "ub")).astype(getattr(jnp, dtype))
    return jax.device_put(host, sharding)


def dtypes_state() -> dict[str, jax.Array]:
    """Every dtype, cut over both axes, and as a scalar."""
    cut, whole = NamedSharding(mesh(), P("model", "data")), NamedSharding(mesh(), P())
    state = {name: filled((8, 6), name, cut, seed) for seed, name in enumerate(DTYPES)}
    return state | {f"{name}_scalar": filled((), name, whole, seed) for seed, name in enumerate(DTYPES)}


def shardings_state() -> dict[str, jax.Array]:
    """Every way of cutting, replicating and placing."""
    state = {f"spec{i}": filled((8, 16), "float32", NamedSharding(mesh(), s), i) for i, s in enumerate(SPECS)}
    part = Mesh(np.array(jax.devices())[2:6], ("x",))
    return state | {
        "uncommitted": jnp.arange(5.0),
        "committed": jax.device_put(jnp.arange(5.0), jax.devices()[3]),
        "pinned": filled((8, 4), "float32", NamedSharding(mesh(), P("data"), memory_kind="pinned_host")),
        "pinned_single": filled(
            (3,), "int32", SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
        ),
        "some_devices": filled((4, 2), "int32", NamedSharding(part, P("x"))),
        "empty": filled((0, 4), "float32", NamedSharding(mesh(), P("data"))),
        "empty_scalar": jnp.zeros((0,)),
        "gspmd": jax.jit(
            lambda: jnp.arange(16.0).reshape(8, 2), out_shardings=NamedSharding(mesh(), P("data"))
        )(),
    }


class Pair(NamedTuple):
    first: Any
    second: Any


def kinds_state() -> dict[str, Any]:
    """Keys, numpy arrays, values, and nodes without leaves."""
    keys = jax.random.split(jax.random.key(1), 8)
    return {
        "key": jax.random.key(7),
        "keys": jax.device_put(keys, NamedSharding(mesh(), P("model"))),
        "rbg": jax.device_put(
            jax.random.split(jax.random.key(2, impl="rbg"), (2, 3)), NamedSharding(mesh(), P("data"))
        ),
        "numpy": np.arange(12, dtype=np.int16).reshape(3, 4),
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "strided": np.arange(24.0)[::2],
        "numpy_scalar": np.array(3.5),
        "nested": Pair([1, 2.5, True, "text", None], (np.float32(0.1), np.int64(2**62), jnp.bfloat16(1.5))),
        "not_finite": (float("inf"), np.float32("-inf")),
        "nothing": {"none": None, "dict": {}, "list": [], "tuple": (), "pair": Pair(None, None)},
    }
