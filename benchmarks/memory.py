"""What many saves leave in the memory of each process: process 0 holds the coordination service as well."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.samples import Samples
from emergency_ckpt import CheckpointManager, Config

_OURS = "emergency_ckpt"
_LEAVES, _ELEMENTS = 16, 1024


def measure_memory(
    mesh: Mesh, saves: int, ramdisk: Path, shared: Path, samples: Samples, say: Callable[[str], None]
) -> None:
    """Trains and saves a small state `saves` times, every tenth of them to the persistent tier too. Collective.

    Adds this process's private memory, and the job's keys in the coordination service, after 10 %, 50 % and
    100 % of the saves, and the growth from the first of these to the last. Raises RuntimeError when a save was
    not complete.
    """
    local = ramdisk / "memory"
    local.mkdir()
    config = Config(
        run_name="memory",
        base_output_directory=str(shared / "memory"),
        enable_checkpointing=True,
        enable_emergency_checkpoint=True,
        local_checkpoint_directory=str(local),
        local_checkpoint_period=1,
        checkpoint_period=max(1, saves // 10),
        max_num_checkpoints_to_keep=2,
        # As fast as it goes: each save waits for the slot of an earlier one.
        local_checkpoint_slot_wait_seconds=120,
    )
    place = NamedSharding(mesh, P("fsdp"))
    state = {f"leaf_{i}": jax.device_put(jnp.zeros(_ELEMENTS), place) for i in range(_LEAVES)}
    train = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    found = []
    with CheckpointManager.from_config(config, mesh, state) as manager:
        done = 0
        for until in _marks(saves):
            say(f"memory, {until} of {saves} saves")
            for step in range(done + 1, until + 1):
                state = train(state)
                manager.save(step, state)
            done = until
            manager.wait_until_finished()
            manager.check_for_errors()
            if (complete := manager.metrics_snapshot()["saves_complete"]) != done:
                raise RuntimeError(f"{complete:.0f} of {done} saves are complete")
            multihost_utils.sync_global_devices("memory")
            found.append(_private_bytes())
            keys = manager._engine.job.coordinator.entries("")
            samples.add(_OURS, "memory_saves", float(done))
            samples.add(_OURS, "memory_private_bytes", float(found[-1]))
            samples.add(_OURS, "memory_coordination_keys", float(len(keys)))
    samples.add(_OURS, "memory_growth_bytes", float(found[-1] - found[0]))


def _marks(saves: int) -> Iterator[int]:
    yield from sorted({max(1, saves // 10), max(1, saves // 2), saves})


def _private_bytes() -> int:
    """Memory that only this process has (no mapped slots), without what its allocator merely keeps."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise KeyError("/proc/self/status has no field RssAnon")
