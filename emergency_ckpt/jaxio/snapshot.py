"""The bytes of a live state, shard by shard, as they were when the save was called.

After `take_snapshot` (and, on accelerators, after the snapshot was written) the arrays may be donated. Each
device buffer is read once.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from emergency_ckpt.core.values import Value
from emergency_ckpt.jaxio.binding import ShardBuffer, StateBinder
from emergency_ckpt.jaxio.window import Sink, flat_bytes, stream_in_window, to_host

_WINDOW_PART = 20
_LEAST_WINDOW_BYTES = 1024 * 1024
_MOST_WINDOW_BYTES = 512 * 1024 * 1024


def take_snapshot(binder: StateBinder, state: Any, *, window_bytes: int | None = None) -> Snapshot:
    """Holds on to what this process has of `state`. Local; waits until the arrays are computed.

    Where all arrays are in this host's memory (CPU devices), it takes views that keep the buffers alive, and
    copies nothing but numpy leaves (their owner may change them) and sub-byte dtypes. Otherwise everything is
    copied when the snapshot is written, through a window of at most `window_bytes` of host memory; by default
    5 % of this process's bytes, at least 1 MiB and at most 512 MiB.
    Raises StateMismatchError and UnsupportedStateError, naming the leaf.
    """
    with jax.transfer_guard("allow"):  # A user's guard is against transfers in the train step.
        bound = binder.bind(state)
        if all(buffer.on_cpu for buffer in bound.buffers):
            return Snapshot([_hold(buffer) for buffer in bound.buffers], bound.values)
    if window_bytes is None:
        window_bytes = default_window_bytes(sum(buffer.data.nbytes for buffer in bound.buffers))
    return Snapshot(bound.buffers, bound.values, window_bytes)


def default_window_bytes(nbytes: int) -> int:
    """5 % of all bytes; small states need some room all the same, and large ones gain nothing by more."""
    return min(max(nbytes // _WINDOW_PART, _LEAST_WINDOW_BYTES), _MOST_WINDOW_BYTES)


class Snapshot:
    """Shards to be written once, and the values of the leaves that are not arrays.

    Attributes:
      values: value by leaf name.
      may_defer: True when every byte is held in host memory: the snapshot may then be written later, in another
        thread, while the training goes on. Otherwise write it before the arrays are donated.
    """

    def __init__(
        self, buffers: Iterable[ShardBuffer], values: Mapping[str, Value], window_bytes: int | None = None
    ) -> None:
        """`window_bytes`: copy the buffers through a window of this size; None when they can just be viewed."""
        self.values = values
        self.may_defer = window_bytes is None
        self._window_bytes = window_bytes
        self._held: collections.deque[ShardBuffer] | None = collections.deque(buffers)

    def write(self, sink: Sink) -> None:
        """Hands all bytes of all shards of this process to `sink`, in order. Only once per snapshot.

        Shards come in ascending order, each in one piece or in several; a piece is let go when `sink` returns.
        Raises UnsupportedStateError when an array was deleted meanwhile, and what `sink` raises.
        """
        if self._held is None:
            raise ValueError("the shards of this snapshot were written or released; take another snapshot")
        held, self._held = self._held, None
        if self._window_bytes is not None:
            stream_in_window(held, self._window_bytes, sink)
            return
        while held:
            buffer = held.popleft()
            sink(buffer.shard, flat_bytes(to_host(buffer)))

    def release(self) -> None:
        """Lets go of all buffers that were not written (a save that is skipped)."""
        self._held = None


def _hold(buffer: ShardBuffer) -> ShardBuffer:
    """The shard in host memory that nobody changes."""
    shard, leaf, data, _ = buffer
    if isinstance(data, np.ndarray):
        return ShardBuffer(shard, leaf, np.array(data, order="C", copy=True, subok=False), True)
    return ShardBuffer(shard, leaf, to_host(buffer), True)
