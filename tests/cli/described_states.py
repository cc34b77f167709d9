"""States that `emergency-ckpt plan --state` describes, as a user's module would."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

MESH = AbstractMesh((2, 4, 2), ("replica", "fsdp", "tensor"))


def plain() -> dict[str, Any]:
    """Without shardings: 12,000,004 bytes."""
    return {
        "w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32),
        "m": jax.ShapeDtypeStruct((2000, 2000), jnp.bfloat16),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "name": "x",
    }


def sharded() -> dict[str, Any]:
    """16 devices: w in eight parts, b in four, of which two devices of a host share one, s everywhere."""

    def array(shape: tuple[int, ...], *spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, PartitionSpec(*spec)))

    return {
        "w": array((8192, 4096), ("fsdp", "tensor")),
        "b": array((8192,), "fsdp"),
        "s": array((1024,)),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }


def broken() -> None:
    raise RuntimeError("no such model")


number = 7
