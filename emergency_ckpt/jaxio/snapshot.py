"""The bytes of a live state, shard by shard, as they were when the save was called.

After `take_snapshot` (and, on accelerators, after its shards were consumed) the arrays may be donated. Each
device buffer is read once.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from emergency_ckpt.core.values import Value
from emergency_ckpt.jaxio.binding import ShardBuffer, StateBinder, raise_if_deleted

DEFAULT_WINDOW_BYTES = 512 * 1024 * 1024


def take_snapshot(binder: StateBinder, state: Any, *, window_bytes: int = DEFAULT_WINDOW_BYTES) -> Snapshot:
    """Holds on to what this process has of `state`. Local; waits until the arrays are computed.

    On CPU devices it takes views that keep the buffers alive, and copies nothing but numpy leaves (their owner
    may change them) and sub-byte dtypes. On accelerators copies to the host begin when shards are iterated:
    at most `window_bytes` of them, or one shard if that is larger, are in host memory at a time.
    Raises StateMismatchError and UnsupportedStateError, naming the leaf.
    """
    bound = binder.bind(state)
    return Snapshot([_hold(buffer) for buffer in bound.buffers], bound.values, window_bytes)


class Snapshot:
    """Shards to be consumed once, and the values of the leaves that are not arrays.

    Attributes:
      values: value by leaf name.
      may_defer: True when every byte is held in host memory: the shards may then be iterated later, in another
        thread, while the training goes on. Otherwise iterate before the arrays are donated.
    """

    def __init__(
        self, held: list[ShardBuffer], values: Mapping[str, Value], window_bytes: int = DEFAULT_WINDOW_BYTES
    ) -> None:
        self.values = values
        self.may_defer = all(isinstance(buffer.data, np.ndarray) for buffer in held)
        self._window_bytes = window_bytes
        self._held: collections.deque[ShardBuffer] | None = collections.deque(held)

    def iter_shards(self) -> Iterator[tuple[int, np.ndarray]]:
        """`(index in Layout.shards, flat uint8 bytes in C order)` of each shard of this process, ascending.

        Each array is let go when the next one is asked for: copy it, do not keep it. Only once per snapshot.
        """
        if self._held is None:
            raise ValueError("the shards of this snapshot were consumed or released; take another snapshot")
        held, self._held = self._held, None
        return _stream(held, self._window_bytes)

    def release(self) -> None:
        """Lets go of all buffers that were not consumed (a save that is skipped)."""
        self._held = None


def _hold(buffer: ShardBuffer) -> ShardBuffer:
    """The shard in host memory that nobody changes, where that is at hand; on accelerators as it is."""
    shard, leaf, data, on_cpu = buffer
    if isinstance(data, np.ndarray):
        return ShardBuffer(shard, leaf, np.array(data, order="C", copy=True, subok=False), True)
    return ShardBuffer(shard, leaf, _to_host(buffer), True) if on_cpu else buffer


def _stream(held: collections.deque[ShardBuffer], window_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
    """Hands out shards in order while the copies of later ones are in flight."""
    flying: collections.deque[ShardBuffer] = collections.deque()
    flying_bytes = 0
    while held or flying:
        while held and (not flying or flying_bytes + held[0].data.nbytes <= window_bytes):
            buffer = _start_copy(held.popleft())
            flying_bytes += buffer.data.nbytes
            flying.append(buffer)
        buffer = flying.popleft()
        yield buffer.shard, _flat_bytes(_to_host(buffer))
        flying_bytes -= buffer.data.nbytes
        del buffer


def _start_copy(buffer: ShardBuffer) -> ShardBuffer:
    """Starts the copy to the host through an array of our own over the same device buffer.

    JAX keeps the host copy with the array object it was asked of. Asked of the state's own array it would stay
    in host memory as long as the state does; ours goes when the shard is consumed.
    """
    data = buffer.data
    if isinstance(data, np.ndarray):
        return buffer
    try:
        alias = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
        alias.copy_to_host_async()
    except (RuntimeError, ValueError) as error:
        raise_if_deleted(buffer.leaf, data, error)
        raise
    return buffer._replace(data=alias)


def _to_host(buffer: ShardBuffer) -> np.ndarray:
    try:
        return np.asarray(buffer.data)
    except RuntimeError as error:
        raise_if_deleted(buffer.leaf, buffer.data, error)
        raise


def _flat_bytes(array: np.ndarray) -> np.ndarray:
    """The array's elements in C order as flat uint8, copied only when they lie otherwise (device layouts)."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
