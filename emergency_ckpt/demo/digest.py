"""Checksums of everything that a process holds of the training state, named by shard.

Equal states give equal checksums whichever process computes them; one changed bit changes one of them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from emergency_ckpt.core.shards import Box, Shard


def shard_checksums(state: Any) -> dict[str, str]:
    """128-bit xxh3 of every shard of `state` that lies on a device of this process, by `leaf[box]`."""
    checksums: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        for piece in leaf.addressable_shards:
            shard = Shard(
                jax.tree_util.keystr(path, simple=True, separator="."), Box.from_slices(piece.index, leaf.shape)
            )
            checksums[str(shard)] = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(piece.data).tobytes())
    return checksums
