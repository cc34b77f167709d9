"""States of every kind of leaf, dtype and sharding that a training job may hold, on eight CPU devices."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
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


def arbitrary(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    """Arbitrary bit patterns, NaNs with payloads and infinities among them."""
    dtype = np.dtype(dtype)
    random = np.random.default_rng(seed)
    if dtype == np.bool_:
        return random.integers(0, 2, shape).astype(dtype)
    bits = _bits(dtype)
    if dtype.name.startswith(("int", "uint")) and bits < 8:
        low = -(2 ** (bits - 1)) if dtype.name.startswith("int") else 0
        return random.integers(low, low + 2**bits, shape).astype(dtype)
    data = random.integers(0, 256, (*shape, dtype.itemsize), np.uint8) & (0xFF if bits >= 8 else 2**bits - 1)
    return np.frombuffer(data.tobytes(), dtype).reshape(shape).copy()


def _bits(dtype: np.dtype) -> int:
    name = dtype.name
    small = {"int1": 1, "uint1": 1, "int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}
    return 6 if name.startswith("float6") else small.get(name, 8 * dtype.itemsize)


def jax_dtypes() -> list[str]:
    """Every dtype that an array of JAX on CPU devices can have; call it with 64-bit types enabled."""
    found = []
    for name in sorted(dir(jnp)):
        if isinstance(getattr(jnp, name), type(jnp.float32)):
            dtype = np.dtype(getattr(jnp, name))
            try:
                jax.device_put(np.zeros(2, dtype))
            except (TypeError, RuntimeError):
                continue
            found.append(dtype.name)
    return sorted(set(found))


def every_dtype_state() -> dict[str, Any]:
    """Every dtype of JAX and ml_dtypes: cut, replicated, 0-d, of no size, and as a numpy array and scalar."""
    cut, whole = NamedSharding(mesh(), P("model", "data")), NamedSharding(mesh(), P())
    arrays: dict[str, Any] = {}
    for seed, name in enumerate(jax_dtypes()):
        dtype = getattr(jnp, name)
        arrays[name] = {
            "cut": jax.device_put(arbitrary((8, 6), dtype, seed), cut),
            "replicated": jax.device_put(arbitrary((3,), dtype, seed + 1), whole),
            "scalar": jax.device_put(arbitrary((), dtype, seed + 2), whole),
            "empty": jax.device_put(np.zeros((0, 2), dtype), whole),
        }
    kinds = [
        kind for kind in vars(ml_dtypes).values() if isinstance(kind, type) and issubclass(kind, np.generic)
    ]
    hosts = {
        np.dtype(kind).name: {"array": arbitrary((2, 3), kind, 7), "value": arbitrary((1,), kind, 8)[0]}
        for kind in [*kinds, *(np.dtype(char).type for char in "?bBhHiIqQefdFD")]
    }
    return {"jax": arrays, "numpy": hosts}


MESHES = [((8,), "a"), ((2, 4), "ab"), ((2, 2, 2), "abc"), ((2, 1, 2, 2), "abcd")]


def placements_state(on: Mesh) -> dict[str, Any]:
    """Every way in which two dimensions can be cut over the axes of a mesh, or replicated."""
    axes = on.axis_names
    wholes = [None, *axes, *itertools.combinations(axes, 2), *itertools.combinations(axes, 3), axes[::-1]]
    specs = [P(first, second) for first in wholes for second in wholes if not _shared(first, second)]
    return {
        f"{i}": jax.device_put(arbitrary((8, 8), "float32", i), NamedSharding(on, spec))
        for i, spec in enumerate(dict.fromkeys(specs))
    }


def _shared(first: Any, second: Any) -> bool:
    return bool(set(first or ()) & set(second or ()))
