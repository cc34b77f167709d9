"""A process that joins its job by `initialize_distributed`, and says who it is.

python -m tests.integration.joining_job DIRECTORY PROCESSES
"""

from __future__ import annotations

import sys

import jax

from emergency_ckpt import Config, initialize_distributed


def main(directory: str, processes: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    config = Config(
        use_replicator_service=True,
        local_checkpoint_directory=directory,
        jax_distributed_initialization_timeout=60,
    )
    initialize_distributed(config, num_processes=processes, init_info_timeout_seconds=60)
    print(f"process {jax.process_index()} of {jax.process_count()}", flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
