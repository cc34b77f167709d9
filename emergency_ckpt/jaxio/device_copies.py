"""Copies of one shard on several devices of this process, compared by fingerprints that the devices compute.

Slots store one copy, so no checksum of a slot tells of the others. Each device reads its own copies once and
sends eight bytes for each; a single flipped bit always changes them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.jaxio.state import leaf_name

# Odd multipliers of positions: a word that differs by a power of two changes a sum of odd multiples.
_STEPS = (np.uint32(0x9E3779B1), np.uint32(0x85EBCA77))
_WORD_BITS = 32


@dataclasses.dataclass(frozen=True)
class DifferingDevices:
    """A shard whose copies differ.

    Attributes:
      shard: which.
      versions: ids of the devices with equal copies, ascending; most devices first, then the lowest.
    """

    shard: Shard
    versions: tuple[tuple[int, ...], ...]


class DeviceComparison:
    """Fingerprints that were asked for; the devices may still be computing them."""

    def __init__(self, asked: Sequence[tuple[int, Sequence[Shard], jax.Array]]) -> None:
        """`asked`: per device its id, its shards, and their fingerprints as they arrive."""
        self._asked = asked

    def differing(self) -> tuple[DifferingDevices, ...]:
        """Waits for the devices, and tells of every shard whose copies are not equal, ordered."""
        found: dict[Shard, dict[int, bytes]] = collections.defaultdict(dict)
        with jax.transfer_guard("allow"):
            for device, shards, numbers in self._asked:
                for shard, row in zip(shards, np.asarray(numbers), strict=True):
                    found[shard][device] = row.tobytes()
        differing: list[DifferingDevices] = []
        for shard, by_device in sorted(found.items()):
            versions: dict[bytes, list[int]] = collections.defaultdict(list)
            for device, row in sorted(by_device.items()):
                versions[row].append(device)
            if len(versions) > 1:
                ordered = sorted(map(tuple, versions.values()), key=lambda each: (-len(each), each))
                differing.append(DifferingDevices(shard, tuple(ordered)))
        return tuple(differing)


def compare_devices(state: Any) -> DeviceComparison | None:
    """Asks the devices of this process for fingerprints of what several of them hold; None where nothing is.

    Local. Returns when they were asked: the arrays may be donated then. The program is compiled at the first
    call with a state, once per device. Raises RuntimeError for arrays that were deleted.
    """
    held: dict[Any, list[tuple[Shard, jax.Array]]] = collections.defaultdict(list)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if isinstance(leaf, jax.Array) and len(leaf.sharding.addressable_devices) > 1 and leaf.size:
            for shard, device, data in _copies(leaf_name(path), leaf):
                held[device].append((shard, data))
    asked: list[tuple[int, Sequence[Shard], jax.Array]] = []
    with jax.transfer_guard("allow"):  # A user's guard is against transfers in the train step.
        for device, copies in sorted(held.items(), key=lambda item: item[0].id):
            numbers = _fingerprints(tuple(data for _, data in copies))
            numbers.copy_to_host_async()
            asked.append((device.id, [shard for shard, _ in copies], numbers))
    return DeviceComparison(asked) if asked else None


def _copies(name: str, leaf: jax.Array) -> list[tuple[Shard, Any, jax.Array]]:
    """The shards of a leaf that more than one device of this process holds."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    found: dict[Box, list[tuple[Any, jax.Array]]] = collections.defaultdict(list)
    for shard in leaf.addressable_shards:
        found[Box.from_slices(shard.index, leaf.shape)].append((shard.device, shard.data))
    return [
        (Shard(name, box), device, data)
        for box, copies in found.items()
        if len(copies) > 1
        for device, data in copies
    ]


@jax.jit
def _fingerprints(arrays: tuple[jax.Array, ...]) -> jax.Array:
    """uint32 of shape (arrays, 2)."""
    return jnp.stack([jnp.stack(_sums(array)) for array in arrays])


def _sums(array: jax.Array) -> list[jax.Array]:
    words = _words(array)
    # Positions without a reshape, which could copy the array.
    position = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position + along * np.uint32(stride % (1 << _WORD_BITS))
        stride *= words.shape[axis]
    return [jnp.sum(words * (position * step | np.uint32(1)), dtype=jnp.uint32) for step in _STEPS]


def _words(array: jax.Array) -> jax.Array:
    """All bits of an array as uint32."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return jnp.stack([_words(jnp.real(array)), _words(jnp.imag(array))])
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    floats = jnp.issubdtype(array.dtype, jnp.floating)
    bits = (jnp.finfo if floats else jnp.iinfo)(array.dtype).bits
    if bits < 8:  # Exact in a wider type.
        array, bits = array.astype(jnp.float32 if floats else jnp.int32), _WORD_BITS
    same = {8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32)  # 64 bits: two words each
    return jax.lax.bitcast_convert_type(array, same).astype(jnp.uint32)
