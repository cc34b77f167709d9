"""Device arrays from the verified bytes of a slot.

Nothing unverified reaches a device, and no array aliases the slot: on CPU devices every array gets memory of
its own, on accelerators the call returns when the transfers out of the slot are done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from emergency_ckpt.core.checksums import block_seed, checksum_blocks, copy_and_checksum
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.shards import Box, Shard, block_ranges, dtype_of
from emergency_ckpt.core.values import Value
from emergency_ckpt.errors import CorruptDataError, StateMismatchError
from emergency_ckpt.jaxio.state import Leaf, LeafKind, box_of, decode_value, flatten

Device = Any  # jax.Device, which type checkers do not take for a type

DEFAULT_THREADS = 4
# XLA takes over host memory as it is only where it starts at a multiple of this; otherwise it copies again.
_XLA_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True, slots=True)
class StoredShard:
    """A shard as a slot holds it: flat uint8 bytes, and one checksum per block."""

    data: np.ndarray
    checksums: Sequence[int]


def assemble(
    abstract_state: Any,
    layout: Layout,
    process_index: int,
    generation: int,
    read: Callable[[int], StoredShard],
    values: Mapping[str, Value],
    *,
    threads: int = DEFAULT_THREADS,
) -> Any:
    """The state that was saved, in the structure, dtypes and shardings of `abstract_state`.

    Every process calls it by itself; nothing is exchanged. `read` gives the shard at an index into
    `layout.shards` that this process holds; its memory may be reused when the call has returned or raised.
    `generation` is the one that the checksums are bound to. `values` are the saved values of the leaves that
    are not arrays. A shard that several devices of this process hold is read and verified once.
    Raises CorruptDataError, naming leaf, box and block, for bytes that do not match their checksum, and
    StateMismatchError where `abstract_state` wants what was not saved.
    """
    flat = flatten(abstract_state)
    source = _Source(layout, process_index, generation, read)
    restored: list[Any] = []
    pool = ThreadPoolExecutor(threads, thread_name_prefix="emergency_ckpt-assemble")
    try:
        begun = [_begin(leaf, source, pool) for leaf in flat.leaves]
        with jax.transfer_guard("allow"):  # A user's guard is against transfers in the train step.
            for leaf, pieces in zip(flat.leaves, begun, strict=True):
                restored.append(_finish(leaf, pieces, values))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # Until their transfers are done, accelerators read from the slot.
        jax.block_until_ready(restored)
    return jax.tree_util.tree_unflatten(flat.treedef, restored)


class StreamedLeaves:
    """The same, shard by shard: nothing but what is on its way lies in host memory.

    Attributes:
      shards: the shards of this process's devices, as indices into `layout.shards`, leaf by leaf.
    """

    def __init__(self, abstract_state: Any, layout: Layout, process_index: int, generation: int) -> None:
        """As for `assemble`."""
        self._flat = flatten(abstract_state)
        self._layout = layout
        self._process = process_index
        self._generation = generation
        self._wanted: dict[int, tuple[int, Box, Sequence[Device]]] = {}
        self._placed: list[dict[Device, Any]] = [{} for _ in self._flat.leaves]
        for number, leaf in enumerate(self._flat.leaves):
            for box, devices in _destinations(leaf).items():
                shard = layout.shard_index.get(Shard(leaf.name, box))
                if shard is None:
                    raise StateMismatchError(f"leaf {leaf.name!r}: the layout has no shard {box} of it")
                self._wanted[shard] = number, box, devices
        self.shards = tuple(self._wanted)

    def put(self, stored: Mapping[int, StoredShard], *, threads: int = DEFAULT_THREADS) -> None:
        """Verifies shards and puts them on their devices; their memory may be reused then.

        Raises CorruptDataError and StateMismatchError, as `assemble` does.
        """
        source = _Source(self._layout, self._process, self._generation, stored.__getitem__)
        placed: list[Any] = []
        pool = ThreadPoolExecutor(threads, thread_name_prefix="emergency_ckpt-assemble")
        try:
            begun = [
                (number, _begin_piece(self._flat.leaves[number], box, devices, source, pool))
                for number, box, devices in (self._wanted[shard] for shard in stored)
            ]
            with jax.transfer_guard("allow"):
                for number, piece in begun:
                    found = _place(self._flat.leaves[number], [piece])
                    placed += found.values()
                    self._placed[number].update(found)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            jax.block_until_ready(placed)

    def finish(self, values: Mapping[str, Value]) -> Any:
        """The state, once every shard was put."""
        restored = [
            decode_value(leaf, values) if leaf.kind is LeafKind.VALUE else _join(leaf, placed)
            for leaf, placed in zip(self._flat.leaves, self._placed, strict=True)
        ]
        return jax.tree_util.tree_unflatten(self._flat.treedef, restored)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where shards come from, and what their bytes must be."""

    layout: Layout
    process_index: int
    generation: int
    read: Callable[[int], StoredShard]

    def find(self, leaf: Leaf, box: Box) -> tuple[StoredShard, int]:
        """The shard of the leaf at this box, and the seed of its checksums."""
        shard = Shard(leaf.name, box)
        index = self.layout.shard_index.get(shard)
        spec = self.layout.leaf.get(leaf.name)
        if spec is None or index is None or (spec.shape, spec.dtype) != (leaf.shape, leaf.dtype):
            saved = f"{spec.dtype}{list(spec.shape)}, cut differently" if spec else "nothing"
            raise StateMismatchError(
                f"leaf {leaf.name!r} is wanted as {leaf.describe()} with a shard {box} on process "
                f"{self.process_index}, the layout has {saved}; restore with the abstract state that the "
                "layout was built from"
            )
        stored = self.read(index)
        nbytes = self.layout.shard_nbytes[index]
        if stored.data.nbytes != nbytes or len(stored.checksums) != len(block_ranges(nbytes)):
            raise CorruptDataError(
                f"shard {shard} of the slot of process {self.process_index} has {stored.data.nbytes} bytes and "
                f"{len(stored.checksums)} checksums, expected {nbytes} and {len(block_ranges(nbytes))}; "
                "restore it from another source"
            )
        return stored, block_seed(self.generation, shard, leaf.dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """One shard on its way to the devices of this process that hold it.

    `copies` has one private memory per CPU device (or for a numpy leaf); accelerators read from the slot.
    """

    box: Box
    devices: Sequence[Device]
    stored: StoredShard
    copies: Sequence[np.ndarray]
    verified: Sequence[Future[None]]

    def host_bytes(self, position: int) -> np.ndarray:
        return self.copies[position] if self.copies else self.stored.data


def _begin(leaf: Leaf, source: _Source, pool: ThreadPoolExecutor) -> list[_Piece]:
    """Starts to verify, and where needed to copy, all shards of the leaf."""
    return [_begin_piece(leaf, box, devices, source, pool) for box, devices in _destinations(leaf).items()]


def _begin_piece(
    leaf: Leaf, box: Box, devices: Sequence[Device], source: _Source, pool: ThreadPoolExecutor
) -> _Piece:
    stored, seed = source.find(leaf, box)
    copied = leaf.kind is LeafKind.NUMPY or devices[0].platform == "cpu"
    # One memory per device: where two arrays shared one, donating the first could change the second.
    copies = [_private_memory(stored.data.nbytes) for _ in range(max(1, len(devices)))] if copied else []
    verified = [
        pool.submit(_verify_block, Shard(leaf.name, box), stored, block, at, length, seed, copies)
        for block, (at, length) in enumerate(block_ranges(stored.data.nbytes))
    ]
    return _Piece(box, devices, stored, copies, verified)


def _verify_block(
    shard: Shard, stored: StoredShard, block: int, at: int, length: int, seed: int, copies: Sequence[np.ndarray]
) -> None:
    """Checks one block while it is copied, so that what was checked is what is used."""
    source = stored.data[at : at + length]
    if copies:
        first = copies[0][at : at + length]
        (found,) = copy_and_checksum(source, first, seed)
        for other in copies[1:]:
            np.copyto(other[at : at + length], first)
    else:
        (found,) = checksum_blocks(source, seed)
    if found != stored.checksums[block]:
        raise CorruptDataError(
            f"block {block} of shard {shard} (bytes {at} to {at + length}) does not match its checksum: "
            f"expected {stored.checksums[block]:#018x}, found {found:#018x}; restore it from another source"
        )


def _finish(leaf: Leaf, pieces: Sequence[_Piece], values: Mapping[str, Value]) -> Any:
    """The leaf, once its pieces are verified."""
    if leaf.kind is LeafKind.VALUE:
        return decode_value(leaf, values)
    return _join(leaf, _place(leaf, pieces))


def _place(leaf: Leaf, pieces: Sequence[_Piece]) -> dict[Device, Any]:
    """Pieces of the leaf, once they are verified, on their devices; a numpy leaf is on none."""
    for piece in pieces:
        for verified in piece.verified:
            verified.result()
    dtype = dtype_of(leaf.dtype)
    if leaf.kind is LeafKind.NUMPY:
        return {None: pieces[0].host_bytes(0).view(dtype).reshape(leaf.shape)}
    parts = [
        (piece.host_bytes(position).view(dtype).reshape(piece.box.shape), device)
        for piece in pieces
        for position, device in enumerate(piece.devices)
    ]
    if _may_move(leaf):
        host, device = parts[0]
        return {device: _uncommitted(leaf, host, device)}
    assert leaf.sharding is not None
    kind = leaf.sharding.memory_kind
    places = [jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for _, device in parts]
    arrays = jax.device_put([host for host, _ in parts], places)
    return {device: _typed(leaf, array) for (_, device), array in zip(parts, arrays, strict=True)}


def _may_move(leaf: Leaf) -> bool:
    return leaf.sharding is None or (leaf.is_process_local and not leaf.committed)


def _join(leaf: Leaf, on_device: Mapping[Device, Any]) -> Any:
    """The leaf of all its pieces."""
    if leaf.kind is LeafKind.NUMPY or _may_move(leaf):
        return next(iter(on_device.values()))
    assert leaf.sharding is not None
    # Typed keys are taken in the order of the sharding's devices; other arrays in any order.
    ordered = [on_device[d] for d in leaf.sharding.addressable_devices_indices_map(leaf.logical_shape)]
    array = jax.make_array_from_single_device_arrays(
        leaf.logical_shape, leaf.sharding, ordered, dtype=leaf.jax_dtype
    )
    return array if leaf.array_layout is None else jax.device_put(array, leaf.array_layout)


def _uncommitted(leaf: Leaf, host: np.ndarray, device: Device) -> jax.Array:
    """An array on a device that it may leave when it meets others, as plain `jnp` code makes them."""
    with jax.default_device(device):
        return _typed(leaf, jax.device_put(host))


def _typed(leaf: Leaf, array: jax.Array) -> jax.Array:
    """The single-device array in the dtype that is wanted: key data becomes typed keys."""
    if array.dtype != dtype_of(leaf.dtype):
        raise StateMismatchError(
            f"leaf {leaf.name!r} was saved as {leaf.dtype}, which JAX turns into {array.dtype.name} in this "
            "process; restore with jax_enable_x64 set as it was when the state was saved"
        )
    return jax.random.wrap_key_data(array, impl=leaf.key_impl) if leaf.kind is LeafKind.PRNG_KEY else array


def _destinations(leaf: Leaf) -> dict[Box, list[Device]]:
    """The distinct boxes of the leaf in this process, with the devices that want each (numpy leaves: none)."""
    if leaf.kind is LeafKind.VALUE:
        return {}
    if leaf.sharding is None:
        devices = [] if leaf.kind is LeafKind.NUMPY else [jax.local_devices()[0]]
        return {Box.whole(leaf.shape): devices}
    found: dict[Box, list[Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.logical_shape).items():
        found.setdefault(box_of(leaf, index), []).append(device)
    return found


def _private_memory(nbytes: int) -> np.ndarray:
    """Fresh uint8 memory that XLA takes over without another copy."""
    memory = np.empty(nbytes + _XLA_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _XLA_ALIGNMENT
    return memory[start : start + nbytes]
