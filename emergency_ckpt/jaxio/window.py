"""Copies shards from devices to the host through a window: a bounded number of bytes is on its way at a time.

Shards that are large are cut on the device. Neither the host's nor the device's memory holds more than the
window beside the state itself.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from emergency_ckpt.core.pieces import Cut, cut_array
from emergency_ckpt.jaxio.binding import ShardBuffer, raise_if_deleted

Sink = Callable[[int, np.ndarray], None]
"""Takes `(index in Layout.shards, the next bytes of that shard as flat uint8)`, and copies the bytes."""

# Several pieces, so that copies are under way while one is written to its slot. One piece's worth is kept free:
# what arrives in another order of dimensions is first put into C order.
_PIECES_PER_WINDOW = 4
# Starts of pieces are int32.
_LONGEST_CUT_AXIS = 2**31 - 1


class _Piece(NamedTuple):
    """A part of a shard: of `cut` that which begins at `start`, less `repeated` elements that came before."""

    buffer: ShardBuffer
    cut: Cut
    start: tuple[int, ...]
    repeated: int

    @property
    def is_whole(self) -> bool:
        return self.cut.piece_shape == self.cut.shape

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.cut.piece_shape, dtype=np.int64)) * self.buffer.data.dtype.itemsize


def stream_in_window(held: collections.deque[ShardBuffer], window_bytes: int, sink: Sink) -> None:
    """Gives `sink` each shard's flat bytes, in order, while the copies of what follows are in flight.

    At most `window_bytes` are in host memory at a time; more only where a shard cannot be cut: one element, an
    array with an axis of 2**31 elements, or an array in the host memory of an accelerator, which is viewed.
    Takes the buffers out of `held`. Raises UnsupportedStateError when an array was deleted meanwhile.
    """
    with jax.transfer_guard("allow"):  # A user's guard is against transfers in the train step.
        _stream(held, window_bytes, sink)


def _stream(held: collections.deque[ShardBuffer], window_bytes: int, sink: Sink) -> None:
    piece_bytes = window_bytes // _PIECES_PER_WINDOW
    room = window_bytes - piece_bytes
    waiting = _pieces(held, piece_bytes)
    following = next(waiting, None)
    flying: collections.deque[tuple[_Piece, jax.Array | np.ndarray]] = collections.deque()
    flying_bytes = 0
    while following or flying:
        while following and (not flying or flying_bytes + following.nbytes <= room):
            flying.append((following, _start_copy(following)))
            flying_bytes += following.nbytes
            following = next(waiting, None)
        flying_bytes -= flying[0][0].nbytes
        _land(*flying.popleft(), sink)


def _pieces(held: collections.deque[ShardBuffer], piece_bytes: int) -> Iterator[_Piece]:
    while held:
        buffer = held.popleft()
        cut = _cut(buffer.data, piece_bytes)
        for start, repeated in cut.pieces():
            yield _Piece(buffer, cut, start, repeated)


def _cut(data: jax.Array | np.ndarray, piece_bytes: int) -> Cut:
    cut = cut_array(data.shape, data.dtype.itemsize, piece_bytes)
    if isinstance(data, np.ndarray) or cut.piece_shape == cut.shape:
        return cut
    if max(data.shape[: cut.axis + 1]) > _LONGEST_CUT_AXIS or not _in_device_memory(data):
        return Cut(data.shape, 0, data.shape[0])
    return cut


def _in_device_memory(data: jax.Array) -> bool:
    (device,) = data.sharding.device_set
    return data.sharding.memory_kind in (None, device.default_memory().kind)


def _start_copy(piece: _Piece) -> jax.Array | np.ndarray:
    """Starts the copy of a piece to the host through an array of our own.

    JAX keeps the host copy with the array object it was asked of. Asked of the state's own array it would stay
    in host memory as long as the state does; ours goes when the piece was written.
    """
    data = piece.buffer.data
    if isinstance(data, np.ndarray):
        index = zip(piece.start, piece.cut.piece_shape, strict=True)
        return data[tuple(slice(begin, begin + length) for begin, length in index)]
    try:
        if piece.is_whole:
            own = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
        else:
            own = _slice_on_device(data, np.array(piece.start, np.int32), piece.cut.piece_shape)
        own.copy_to_host_async()
    except (RuntimeError, ValueError) as error:
        raise_if_deleted(piece.buffer.leaf, data, error)
        raise
    return own


@functools.partial(jax.jit, static_argnames="shape")
def _slice_on_device(data: jax.Array, start: Any, shape: tuple[int, ...]) -> jax.Array:
    """Compiled once per shape of shard and piece, not per start."""
    return jax.lax.dynamic_slice(data, tuple(start), shape)


def _land(piece: _Piece, data: jax.Array | np.ndarray, sink: Sink) -> None:
    """Waits for the copy and hands it over; nothing of it is left when this returns."""
    host = flat_bytes(to_host(piece.buffer._replace(data=data)))
    sink(piece.buffer.shard, host[piece.repeated * piece.buffer.data.dtype.itemsize :])


def to_host(buffer: ShardBuffer) -> np.ndarray:
    """The buffer as a numpy array, a view where possible. Raises UnsupportedStateError when it is gone."""
    try:
        return np.asarray(buffer.data)
    except RuntimeError as error:
        raise_if_deleted(buffer.leaf, buffer.data, error)
        raise


def flat_bytes(array: np.ndarray) -> np.ndarray:
    """The array's elements in C order as flat uint8, copied only when they lie otherwise (device layouts)."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
