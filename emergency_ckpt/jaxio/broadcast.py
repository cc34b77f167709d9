"""Device broadcast of slot bytes between slices: raw bytes travel over the mesh in windows of a fixed size.

Regions of slots at the same place in different slices are laid out alike, so bytes can be copied without
knowing what they are. What arrives is not trusted: the caller verifies every block by its checksum before use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emergency_ckpt.errors import PeerFailedError, TopologyError
from emergency_ckpt.jaxio.lanes import Ends, ReadWindow, Transfer, WriteWindow, plan_lanes

__all__ = ["DEFAULT_WINDOW_BYTES", "ReadWindow", "Transfer", "WriteWindow", "broadcast_regions"]

Device = Any  # jax.Device, which type checkers do not take for a type
DEFAULT_WINDOW_BYTES = 16 * 1024 * 1024
_WORD_BYTES = 4


def broadcast_regions(
    mesh: Mesh,
    replica_axis: int | str,
    transfers: Sequence[Transfer],
    read_window: ReadWindow,
    write_window: WriteWindow,
    window_bytes: int = DEFAULT_WINDOW_BYTES,
) -> None:
    """Carries out all transfers. Collective: all processes of the mesh call it with equal arguments.

    Transfers may have different sources, also those at one place of the mesh: parts of one region may come from
    several slices. With no transfers, or in a job of one process, nothing happens. Waits for other processes as
    any device collective does, within the limits of the JAX runtime.

    Memory: a device holds at most three windows at once (what it sends, the sum, and XLA's working copy); the
    host one window per local device. Arrays of the user are not touched.

    A process that cannot read or write does not leave the others waiting: it goes on taking part, sends zeros
    in place of what it could not read, and raises its first error when all is done. Its receivers find
    checksums that do not match, so everyone whom the error concerns notices; the caller lets processes agree on
    success afterwards.

    Args:
      mesh: the job's mesh; the replica axis may be any of its axes.
      replica_axis: name or position of the axis along which devices hold equal state.
      transfers: what goes where; the same sequence on all processes.
      read_window: `(offset, length)` -> uint8 array of that length from this process's region; called on
        sources only. The array is copied before the next call.
      write_window: `(offset, bytes)` stores a uint8 array into this process's region; called on receivers only.
        The array is valid during the call.
      window_bytes: size of a window per device; windows are smaller where the transfers need less.

    Raises:
      TopologyError: a transfer is between processes that do not stand at the same place (on all processes).
      PeerFailedError: the collective failed, probably because another process died.
      Exception: whatever `read_window` or `write_window` raised here first.
    """
    if window_bytes < _WORD_BYTES:
        raise ValueError(f"window_bytes is {window_bytes}, at least {_WORD_BYTES} are needed")
    devices = _devices_by_place(mesh, replica_axis)
    owners = np.vectorize(lambda device: device.process_index, otypes=[int])(devices)
    lanes = plan_lanes(owners, transfers)
    longest = max((lane.bytes_per_device for lane in lanes), default=0)
    if longest == 0:
        return
    words = min(-(-longest // _WORD_BYTES), window_bytes // _WORD_BYTES)
    ends = Ends(jax.process_index(), lanes, words * _WORD_BYTES, read_window, write_window)
    try:
        with jax.transfer_guard("allow"):
            windows = _Windows(devices, words)
            for round_ in range(-(-longest // (words * _WORD_BYTES))):
                windows.exchange(ends, round_)
    except jax.errors.JaxRuntimeError as error:
        raise PeerFailedError(
            f"the device broadcast between slices failed in process {jax.process_index()}: "
            f"{str(error).splitlines()[0]}. Another process may have died: look at the logs of all of them"
        ) from error
    if ends.error is not None:
        raise ends.error


class _Windows:
    """The arrays of one round: one window per device, summed over the replicas of its place."""

    def __init__(self, devices: np.ndarray, words: int) -> None:
        """`devices[replica, place]`; windows are `words` uint32 each."""
        self._mesh = Mesh(devices, ("replica", "place"))
        self._shape = (*devices.shape, words)
        self._sharding = NamedSharding(self._mesh, PartitionSpec("replica", "place", None))
        with jax.set_mesh(self._mesh):  # a mesh that the user has set would be taken for these arrays too
            self._sum = (
                jax.jit(
                    lambda windows: jnp.sum(windows, axis=0, dtype=jnp.uint32),
                    out_shardings=NamedSharding(self._mesh, PartitionSpec("place", None)),
                )
                .lower(jax.ShapeDtypeStruct(self._shape, jnp.uint32, sharding=self._sharding))
                .compile()
            )
        # This process's devices in the order of the mesh; the first one at each place sends and receives.
        self.local: list[tuple[Device, int]] = [
            (device, place)
            for (_, place), device in np.ndenumerate(devices)
            if device.process_index == jax.process_index()
        ]
        self.first_at: dict[int, Device] = {}
        for device, place in self.local:
            self.first_at.setdefault(place, device)
        self._staging = {device: np.zeros(words, np.uint32) for device in self.first_at.values()}
        self._zeros: dict[Device, jax.Array] = {}

    def exchange(self, ends: Ends, round_: int) -> None:
        """One round: all devices send, the sums are stored. Nothing of it is in use when this returns."""
        sent = [self._window_of(device, place, ends, round_) for device, place in self.local]
        summed = self._sum(jax.make_array_from_single_device_arrays(self._shape, self._sharding, sent))
        arrived = {shard.device: shard.data for shard in summed.addressable_shards}
        wanted = [(device, place) for place, device in self.first_at.items() if ends.receives(place, round_)]
        for device, _ in wanted:
            arrived[device].copy_to_host_async()
        # Sources wait here too: what they sent may alias the staging memory, which the next round fills anew.
        summed.block_until_ready()
        for device, place in wanted:
            ends.store(np.asarray(arrived[device]).reshape(-1).view(np.uint8), place, round_)

    def _window_of(self, device: Device, place: int, ends: Ends, round_: int) -> jax.Array:
        if self.first_at[place] is device:
            staging = self._staging[device]
            if ends.fill(staging.view(np.uint8), place, round_):
                self._zeros.pop(device, None)
                return jax.device_put(staging.reshape(1, 1, -1), device)
        if device not in self._zeros:
            self._zeros[device] = jnp.zeros((1, 1, self._shape[-1]), jnp.uint32, device=device)
        return self._zeros[device]


def _devices_by_place(mesh: Mesh, replica_axis: int | str) -> np.ndarray:
    """The devices as `[replica, place]`: the replica axis first, the others flattened."""
    names = list(map(str, mesh.axis_names))
    if replica_axis not in names and replica_axis not in range(len(names)):
        raise TopologyError(
            f"the mesh has no axis {replica_axis!r}, its axes are {names}; name the one over which the slices "
            "hold equal state, or give its position"
        )
    axis = names.index(replica_axis) if isinstance(replica_axis, str) else replica_axis
    return np.moveaxis(mesh.devices, axis, 0).reshape(mesh.devices.shape[axis], -1)
