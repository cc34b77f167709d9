"""What a program calls before it has a manager: join the job, and let hosts stand where their shards are.

Nothing here is needed for a right restore; it saves the network that hosts in each other's places cost.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from emergency_ckpt.errors import ConfigError
from emergency_ckpt.jaxio.launch import initialize_from_launcher
from emergency_ckpt.local.init_info import FILE_NAME, InitInfo, wait_for_init_info

if TYPE_CHECKING:
    import jax

    from emergency_ckpt.config import Config

INIT_INFO_TIMEOUT_SECONDS = 900.0
"""As long as MaxText waits: the file comes only when the host of process 0 is known, which may need repair."""


def initialize_distributed(
    config: Config,
    *,
    init_info_timeout_seconds: float = INIT_INFO_TIMEOUT_SECONDS,
    **jax_arguments: Any,
) -> None:
    """Joins the job: takes the place of `jax.distributed.initialize(...)`. All processes call it, before any
    other use of jax.

    Where `jax-init-info.txt` lies in `local_checkpoint_directory`, as on GKE's multi-tier volumes, this process
    takes the id that it had before, and with it, where the mesh is built by process index, the shards that are
    on its ramdisk. With `use_replicator_service` or `enable_multi_tier_checkpointing` the file is waited for;
    otherwise it is used if it is there at the first look, so set one of the two on such volumes. In a program
    that `emergency-ckpt launch` started, the launcher says who it is, and of further arguments only the time
    limit counts. Otherwise JAX's own arguments, environment variables and cluster detection count.

    On TPU the id of the file is that of the coordination service; `jax.process_index()` and the places of
    devices are the TPU runtime's affair: `arrange_mesh` sees to those.

    Args:
      config: the flags; `jax_distributed_initialization_timeout` is the limit for the other processes.
      init_info_timeout_seconds: longest wait for the file.
      jax_arguments: further arguments of `jax.distributed.initialize`. A `process_id` or `coordinator_address`
        among them counts instead of the file.

    Raises LocalDirectoryError or CorruptDataError, naming the file, when it does not come or cannot be right;
    JAX's own error when the others do not come within the limit.
    """
    limit = jax_arguments.setdefault("initialization_timeout", config.jax_distributed_initialization_timeout)
    if not jax_arguments.keys() & {"process_id", "coordinator_address"}:
        info = _init_info(config, timedelta(seconds=init_info_timeout_seconds))
        if info is not None:
            count = jax_arguments.get("num_processes")
            if count is not None and info.process_id >= count:
                raise ConfigError(
                    f"{FILE_NAME} in {config.local_checkpoint_directory} says that this is process "
                    f"{info.process_id}, but num_processes={count}. Correct num_processes, or remove the file "
                    "of an earlier job."
                )
            logging.info(
                "joining the job at %s as process %d, as %s in %s says",
                info.coordinator_address,
                info.process_id,
                FILE_NAME,
                config.local_checkpoint_directory,
            )
            jax_arguments["process_id"] = info.process_id
            jax_arguments["coordinator_address"] = info.coordinator_address
        elif initialize_from_launcher(limit) is not None:
            return
    import jax

    jax.distributed.initialize(**jax_arguments)


def arrange_mesh(
    mesh: jax.sharding.Mesh,
    local_directory: str | os.PathLike[str] | None,
    persistent_directory: str | os.PathLike[str],
    *,
    replica_axis: int | str = 0,
    move_hosts: bool = False,
    timeout_seconds: float = 120.0,
) -> jax.sharding.Mesh:
    """`mesh` with its hosts where their ramdisks' shards are needed. Collective.

    Use it on the mesh that you would give to the manager otherwise, before anything is placed on that::

        mesh = Mesh(create_device_mesh(shape), axis_names)
        mesh = arrange_mesh(mesh, config.local_directory, config.checkpoint_directory)

    After a restart hosts may have other process indices, or slices other numbers, than when they saved. Each
    slot says where in the mesh its host stood; all processes tell each other over JAX's coordination service,
    and process 0 decides. Whole slices change places: that is harmless, because slices are connected by the
    data centre's network in any case, and inside of each nothing changes. With `move_hosts` the hosts of a
    slice change places as well, each with its devices in their order. On TPU do that only where the order of
    hosts within a slice means nothing to the program: `mesh_utils.create_device_mesh` puts devices beside each
    other that are neighbours in the torus, and collectives over a mesh that ignores this are slower at every
    step. There it is rarely needed: the order follows the coordinates of the chips, which a host keeps when its
    index changes.

    What belongs to a process index stays with it: extras (a data iterator, say) are exchanged over the
    coordination service, and data that is read by `jax.process_index()` goes where that process stands now.

    Args:
      mesh: over all devices of the job.
      local_directory: ramdisk directory of this host; None returns `mesh`.
      persistent_directory: root of the persistent tier, where the run's id lies.
      replica_axis: name or position of the axis that tells slices apart (`checkpoint_replica_axis`).
      move_hosts: whether hosts may change places within their slice, too.
      timeout_seconds: limit for each of the waits for other processes.

    Returns the same mesh where nothing can be gained, or nothing is known. Raises TopologyError,
    LocalDirectoryError where the directory is missing, CoordinationTimeoutError naming the processes that did
    not call, and PeerFailedError when another process failed.
    """
    if local_directory is None:
        return mesh
    from emergency_ckpt.runtime.arranging import arrange_by_ramdisks

    return arrange_by_ramdisks(
        mesh,
        Path(local_directory),
        persistent_directory,
        replica_axis,
        move_hosts,
        timedelta(seconds=timeout_seconds),
    )


def _init_info(config: Config, limit: timedelta) -> InitInfo | None:
    if not config.local_checkpoint_directory:
        return None
    is_expected = config.use_replicator_service or config.enable_multi_tier_checkpointing
    directory = Path(config.local_checkpoint_directory).expanduser()
    return wait_for_init_info(directory, limit, is_expected=is_expected)
